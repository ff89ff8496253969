"""What happens around a training step: when, how often, in which order, and what stops it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.training import handlers as module
from pipelines.training.averaging import averaged_network
from pipelines.training.checkpoints import read_header
from pipelines.training.faults import FaultTolerantTrainer, NonFiniteSteps
from pipelines.training.handlers import (
    AverageLoss,
    ClipGradients,
    FollowOptimizer,
    KeepCheckpoints,
    ReportProgress,
    SeedEpoch,
    StopEarly,
    is_better,
)
from pipelines.training.schedule import polynomial_with_warmup
from transforms.errors import BundleError, DataError

HEADER = {"contract": {"modalities": ["flair"]}}


class Squares(nn.Module):
    """Loss of two terms: the mean square of prediction minus target, and 10 times the first target."""

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        square, offset = ((prediction - target) ** 2).mean(), 10 * target.flatten()[0]
        self.last_terms = {"square": square.detach(), "offset": offset.detach()}
        return square + offset


def batches(*targets: float) -> list[dict[str, Any]]:
    return [
        {"image": torch.ones(1, 1), "label": torch.full((1, 1), target), "case": [f"p{index}"]}
        for index, target in enumerate(targets)
    ]


def trainer(handlers: list[Any], data: Any, epochs: int = 1, accumulation: int = 1) -> FaultTolerantTrainer:
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    return FaultTolerantTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=Squares(),
        accumulation_steps=accumulation,
        decollate=False,
        train_handlers=handlers,
    )


def non_finite(folder: Path) -> NonFiniteSteps:
    return NonFiniteSteps(folder, nn.Linear(1, 1), HEADER)


def record_steps(engine: FaultTolerantTrainer) -> list[float]:
    """Record the norm of the gradient at every step of the optimiser."""
    norms: list[float] = []
    real = engine.optimizer.step

    def step(*arguments: Any) -> Any:
        norms.append(float(engine.network.weight.grad.norm()))
        return real(*arguments)

    engine.optimizer.step = step
    return norms


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 5), (2, 3), (3, 2), (5, 1), (7, 1)])
def test_clipping_happens_once_per_optimiser_step_and_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulation: int, steps: int
) -> None:
    clipped: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, max_norm: float) -> torch.Tensor:
        clipped.append(float(real(parameters, max_norm)))
        return torch.tensor(clipped[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    engine = trainer([ClipGradients(0.5, non_finite(tmp_path))], batches(30, -4, 5, -6, 7), 2, accumulation)
    norms = record_steps(engine)
    engine.run()
    # five batches in groups of two are 2 + 2 + 1: three steps in every epoch
    assert len(norms) == len(clipped) == 2 * steps
    assert all(norm <= 0.5 + 1e-6 for norm in norms)
    assert max(clipped) > 0.5


def test_a_gradient_below_the_limit_is_left_alone(tmp_path: Path) -> None:
    engine = trainer([ClipGradients(100.0, non_finite(tmp_path))], batches(3))
    norms = record_steps(engine)
    engine.run()
    assert norms == pytest.approx([4.0])  # d/dw (w - 3)^2 = 2 (1 - 3)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_with_which_nothing_is_learnt_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(BundleError, match="clip_norm"):
        ClipGradients(limit, non_finite(tmp_path))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    engine = trainer([], batches(1, 2, 3))
    handler = NonFiniteSteps(tmp_path, engine.network, HEADER)
    ClipGradients(1.0, handler).attach(engine)
    engine.network.weight.register_hook(lambda grad: grad * float("nan") if engine.state.iteration == 2 else grad)
    norms = record_steps(engine)
    engine.run()
    assert len(norms) == 2
    assert handler.count == 1
    assert torch.isfinite(engine.network.weight).all()


@pytest.mark.parametrize(("accumulation", "epochs"), [(1, 1), (2, 3), (4, 2)])
def test_rate_and_average_follow_the_optimiser(accumulation: int, epochs: int) -> None:
    engine = trainer([], batches(1, 2, 3, 4, 5), epochs, accumulation)
    average = averaged_network(engine.network, 0.0)
    total = math.ceil(5 / accumulation) * epochs
    scheduler = polynomial_with_warmup(engine.optimizer, total, 0, 1.0)
    seen: list[tuple[bool, float]] = []
    FollowOptimizer(scheduler, engine.network, average).attach(engine)
    norms = record_steps(engine)

    @engine.on(module.Events.ITERATION_COMPLETED)
    def _(e: Any) -> None:
        seen.append((torch.equal(average.module.weight, e.network.weight), e.optimizer.param_groups[0]["lr"]))

    engine.run()
    assert len(norms) == total == scheduler.last_epoch == int(average.n_averaged)
    assert all(same for same, _ in seen)  # with decay 0: after every step, and untouched between two
    assert seen[-1][1] == 0.0


def test_the_data_set_is_told_the_epoch_before_its_first_sample() -> None:
    class Data(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.epoch, self.phase, self.drawn = 0, 0, list[tuple[int, int]]()

        def __len__(self) -> int:
            return 2

        def set_epoch(self, epoch: int, phase: int) -> None:
            self.epoch, self.phase = epoch, phase

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.drawn.append((self.epoch, self.phase))
            return {"image": torch.ones(1), "label": torch.ones(1)}

    data = Data()
    trainer([SeedEpoch(data, 4)], torch.utils.data.DataLoader(data), epochs=3).run()
    assert data.drawn == [(1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_stopped_before_it_can_harm(tmp_path: Path, value: float) -> None:
    engine = trainer([], batches(1, value, 1, value, value, 1))
    NonFiniteSteps(tmp_path, engine.network, HEADER).attach(engine)
    norms = record_steps(engine)
    with pytest.raises(DataError) as caught:
        engine.run()
    for words in ("epoch 1, iteration 5", "term loss, offset, square", "cases p4", "third time"):
        assert words in caught.value.what
    assert f"loss {value}" in caught.value.why
    assert len(norms) == 2  # of the two sound steps before
    assert torch.isfinite(engine.network.weight).all()


def test_only_the_term_at_fault_is_named(tmp_path: Path) -> None:
    handler = non_finite(tmp_path)
    handler.count = 2
    state = SimpleNamespace(
        output={"loss": torch.tensor(1.0)},
        epoch=2,
        iteration=7,
        batch={"image": torch.ones(2, 1), "case": ["a", "b"]},
        device="cpu",
    )
    engine = SimpleNamespace(
        state=state,
        loss_function=SimpleNamespace(last_terms={"dice": torch.tensor(float("nan")), "ce": torch.tensor(1.0)}),
    )
    with pytest.raises(DataError, match=r"^error: term dice of the loss is not finite at .*cases a, b"):
        handler._loss(engine)


def test_the_mean_of_the_loss_and_its_terms_is_that_of_each_epoch() -> None:
    engine = trainer([AverageLoss()], batches(1, 2), epochs=1)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine.run()
    # w = 1: squares 0 and 1, offsets 10 and 20
    assert engine.state.metrics == pytest.approx({"loss": 15.5, "square": 0.5, "offset": 15.0})
    again = trainer([AverageLoss()], batches(1, 2), epochs=3)
    again.optimizer.param_groups[0]["lr"] = 0.0
    again.run()
    assert again.state.metrics["loss"] == pytest.approx(15.5)  # not a sum over epochs


def test_the_mean_of_a_resumed_epoch_is_that_of_the_whole(tmp_path: Path) -> None:
    def averaged(data: list[dict[str, Any]], begin: int, state: dict[str, Any] | None = None) -> AverageLoss:
        handler = AverageLoss()
        engine = trainer([handler], data)
        engine.optimizer.param_groups[0]["lr"] = 0.0
        if state is not None:
            handler.load_state_dict(state)
        engine.state.iteration, engine.state.epoch_length = begin, 4
        handler._reset(engine)
        for batch in data:
            loss = engine.loss_function(engine.network(batch["image"]), batch["label"])
            engine.state.output = {"loss": loss}
            engine.state.iteration += 1
            handler._add(engine)
        handler._compute(engine)
        handler.means = dict(engine.state.metrics)  # type: ignore[attr-defined]
        return handler

    whole = averaged(batches(1, 2, 5, 7), 0)
    first = averaged(batches(1, 2), 0)
    second = averaged(batches(5, 7), 2, first.state_dict())
    assert second.means == whole.means  # type: ignore[attr-defined]
    assert averaged(batches(5, 7), 0, first.state_dict()).means != whole.means  # type: ignore[attr-defined]  # a new epoch


def test_a_loss_that_is_not_finite_does_not_count_in_the_mean(tmp_path: Path) -> None:
    losses = AverageLoss()
    engine = trainer([], batches(1, float("nan"), 2))
    engine.optimizer.param_groups[0]["lr"] = 0.0
    NonFiniteSteps(tmp_path, engine.network, HEADER).attach(engine)
    losses.attach(engine)
    engine.run()
    assert engine.state.metrics["loss"] == pytest.approx(15.5)  # as without the second batch


class Run:
    """Plays the epochs of a run whose validation gives ``metrics`` (None: no validation in that epoch)."""

    def __init__(
        self, folder: Path, *handlers_of: Any, min_delta: float = 0.0, patience: int = 0, first: int = 0
    ) -> None:
        self.validator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}, key_metric_name="dice"))
        self.network = nn.Linear(1, 1, bias=False)
        self.keeper = KeepCheckpoints(folder, self.network, dict(HEADER), self.validator, min_delta)  # type: ignore[arg-type]
        self.stopper = StopEarly(self.keeper, patience, first) if patience else None
        self.stopped_at = 0

    def play(self, *metrics: float | None, begin: int = 1) -> Run:
        for epoch, metric in enumerate(metrics, start=begin):
            with torch.no_grad():
                self.network.weight.fill_(float(epoch))
            if metric is not None:
                self.validator.state = SimpleNamespace(epoch=epoch, metrics={"dice": metric}, key_metric_name="dice")
            engine = SimpleNamespace(
                state=SimpleNamespace(epoch=epoch, metrics={"loss": 1.0 / epoch}),
                terminate=lambda e=epoch: self._stop(e),
            )
            self.keeper(engine)  # type: ignore[arg-type]
            if self.stopper is not None:
                self.stopper(engine)  # type: ignore[arg-type]
            if self.stopped_at:
                break
        return self

    def _stop(self, epoch: int) -> None:
        self.stopped_at = epoch


def test_best_and_last_are_what_they_say(tmp_path: Path) -> None:
    Run(tmp_path).play(0.3, 0.5, None, 0.4)
    best, last = read_header(tmp_path / "best.safetensors"), read_header(tmp_path / "last.safetensors")
    assert (best["epoch"], best["metric"]) == (2, 0.5)
    assert (last["epoch"], last["metric"], last["best_metric"]) == (4, 0.4, 0.5)
    assert best["metric"] == max(entry["dice"] for entry in last["history"] if "dice" in entry)
    assert [entry.get("dice") for entry in last["history"]] == [0.3, 0.5, None, 0.4]
    assert [entry["loss"] for entry in last["history"]] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert best["contract"] == HEADER["contract"]
    weights = module_weights(tmp_path / "best.safetensors")
    assert float(weights) == 2.0  # those of epoch 2


def module_weights(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(str(path))["weight"]


def test_nan_is_never_best_not_even_first(tmp_path: Path) -> None:
    run = Run(tmp_path).play(float("nan"), float("inf"), 0.1, float("nan"))
    assert (run.keeper.best_metric, run.keeper.best_epoch) == (0.1, 3)
    last = read_header(tmp_path / "last.safetensors")
    assert last["metric"] is None
    assert [entry["dice"] for entry in last["history"]] == [None, None, 0.1, None]  # JSON has no NaN


def test_without_a_finite_metric_there_is_no_best(tmp_path: Path) -> None:
    Run(tmp_path).play(float("nan"), None)
    assert not (tmp_path / "best.safetensors").exists()
    assert (tmp_path / "last.safetensors").exists()


def test_a_gain_below_min_delta_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path, min_delta=0.01).play(0.5, 0.509, 0.52)
    assert (run.keeper.best_metric, run.keeper.best_epoch) == (0.52, 3)
    assert Run(tmp_path, min_delta=0.01).play(0.5, 0.509).keeper.best_epoch == 1


@pytest.mark.parametrize(
    ("metric", "best", "expected"),
    [
        (0.1, None, True),
        (0.2, 0.1, True),
        (0.1, 0.1, False),
        (None, None, False),
        (math.nan, None, False),
        (math.nan, 0, False),
    ],
)
def test_what_is_better(metric: float | None, best: float | None, expected: bool) -> None:
    assert is_better(metric, best) is expected


@pytest.mark.parametrize(
    ("metrics", "patience", "first", "stopped_at"),
    [
        ([0.5] * 20, 3, 0, 4),  # best in epoch 1, then three without improvement
        ([0.5] * 20, 3, 6, 9),  # counted from epoch 6 on: never inside the warm-up or the first quarter
        ([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], 2, 0, 6),
        ([0.1 * epoch for epoch in range(1, 15)], 2, 0, 0),  # it still learns
        ([float("nan")] * 20, 2, 5, 7),
        ([None, None, 0.5, None, None, 0.4, None], 2, 0, 6),  # judged at a validation only, not in epoch 5
        ([0.5, None, None, 0.6, None, None, 0.7], 2, 0, 0),
    ],
)
def test_early_stopping_by_hand(
    tmp_path: Path, metrics: list[float | None], patience: int, first: int, stopped_at: int
) -> None:
    assert Run(tmp_path, patience=patience, first=first).play(*metrics).stopped_at == stopped_at


def test_keeper_and_stopper_go_on_where_they_were(tmp_path: Path) -> None:
    """Epochs 1 to 3, then a new process with epochs 4 to 6: the same as six in one."""
    values = [0.3, 0.5, 0.4, 0.4, 0.45, 0.4]
    whole = Run(tmp_path / "whole", patience=4).play(*values)
    assert whole.stopper is not None
    first = Run(tmp_path / "parts", patience=4).play(*values[:3])
    second = Run(tmp_path / "parts", patience=4)
    assert second.stopper is not None
    second.keeper.load_state_dict(first.keeper.state_dict())
    second.stopper.load_state_dict({"stopped": False})
    second.play(*values[3:], begin=4)
    assert second.keeper.state_dict() == whole.keeper.state_dict()
    assert second.stopped_at == whole.stopped_at == 6
    assert second.stopper.state_dict() == whole.stopper.state_dict() == {"stopped": True}
    for name in ("best", "last"):
        files = [(tmp_path / part / f"{name}.safetensors").read_bytes() for part in ("whole", "parts")]
        assert files[0] == files[1]


def test_patience_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="early_stopping_patience 0"):
        StopEarly(Run(tmp_path).keeper, 0, 0)


def test_one_line_per_epoch_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipelines.training.handlers"):
        report = ReportProgress(rates=lambda: {"head": 0.1, "rest": 0.02})
        trainer([AverageLoss(), report], batches(1, 2), epochs=2).run()
    lines = [record.getMessage() for record in caplog.records if record.name == "pipelines.training.handlers"]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "lr 1.00e-01, 2.00e-02" in lines[1]
