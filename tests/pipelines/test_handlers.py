"""What happens around a training step: when, how often, in which order, and what stops it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn

from pipelines.training import handlers as module
from pipelines.training.averaging import averaged_network
from pipelines.training.checkpoints import read_header
from pipelines.training.handlers import (
    AverageLoss,
    ClipGradients,
    FollowOptimizer,
    KeepCheckpoints,
    ReportProgress,
    SeedEpoch,
    StopEarly,
    StopOnNonFiniteLoss,
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


def trainer(handlers: list[Any], data: Any, epochs: int = 1, accumulation: int = 1) -> SupervisedTrainer:
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    return SupervisedTrainer(
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


def record_steps(engine: SupervisedTrainer) -> list[float]:
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
    monkeypatch: pytest.MonkeyPatch, accumulation: int, steps: int
) -> None:
    clipped: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, max_norm: float) -> torch.Tensor:
        clipped.append(float(real(parameters, max_norm)))
        return torch.tensor(clipped[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    engine = trainer([ClipGradients(0.5)], batches(30, -4, 5, -6, 7), 2, accumulation)
    norms = record_steps(engine)
    engine.run()
    # five batches in groups of two are 2 + 2 + 1: three steps in every epoch
    assert len(norms) == len(clipped) == 2 * steps
    assert all(norm <= 0.5 + 1e-6 for norm in norms)
    assert max(clipped) > 0.5


def test_a_gradient_below_the_limit_is_left_alone() -> None:
    engine = trainer([ClipGradients(100.0)], batches(3))
    norms = record_steps(engine)
    engine.run()
    assert norms == pytest.approx([4.0])  # d/dw (w - 3)^2 = 2 (1 - 3)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_with_which_nothing_is_learnt_is_refused(limit: float) -> None:
    with pytest.raises(BundleError, match="clip_norm"):
        ClipGradients(limit)


@pytest.mark.parametrize(("accumulation", "epochs"), [(1, 1), (2, 3), (4, 2)])
def test_rate_and_average_follow_the_optimiser(accumulation: int, epochs: int) -> None:
    engine = trainer([], batches(1, 2, 3, 4, 5), epochs, accumulation)
    average = averaged_network(engine.network, 0.0)
    total = math.ceil(5 / accumulation) * epochs
    scheduler = polynomial_with_warmup(engine.optimizer, total, 0, 1.0)
    seen: list[tuple[bool, float]] = []
    FollowOptimizer(scheduler, average).attach(engine)
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
            self.epoch, self.drawn = 0, list[int]()

        def __len__(self) -> int:
            return 2

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.drawn.append(self.epoch)
            return {"image": torch.ones(1), "label": torch.ones(1)}

    data = Data()
    trainer([SeedEpoch(data)], torch.utils.data.DataLoader(data), epochs=3).run()
    assert data.drawn == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_can_harm(value: float) -> None:
    engine = trainer([StopOnNonFiniteLoss()], batches(1, 1, value))
    norms = record_steps(engine)
    with pytest.raises(DataError) as caught:
        engine.run()
    for words in (f"loss is {value}", "epoch 1, iteration 3", "term square, offset", "cases p2"):
        assert words in caught.value.what
    assert len(norms) == 2
    assert torch.isfinite(engine.network.weight).all()


def test_only_the_term_at_fault_is_named() -> None:
    engine = SimpleNamespace(
        state=SimpleNamespace(
            output={"loss": torch.tensor(float("nan"))}, epoch=2, iteration=7, batch={"case": ["a", "b"]}
        ),
        loss_function=SimpleNamespace(last_terms={"dice": torch.tensor(float("nan")), "ce": torch.tensor(1.0)}),
    )
    with pytest.raises(DataError, match="term dice, cases a, b"):
        StopOnNonFiniteLoss()(engine)  # type: ignore[arg-type]


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

    def play(self, *metrics: float | None) -> Run:
        for epoch, metric in enumerate(metrics, start=1):
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


def test_patience_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="early_stopping_patience 0"):
        StopEarly(Run(tmp_path).keeper, 0, 0)


def test_one_line_per_epoch_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipelines.training.handlers"):
        trainer([AverageLoss(), ReportProgress(learning_rate=lambda: 0.1)], batches(1, 2), epochs=2).run()
    lines = [record.getMessage() for record in caplog.records if record.name == "pipelines.training.handlers"]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "lr 1.00e-01" in lines[1]
