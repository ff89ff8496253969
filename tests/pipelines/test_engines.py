"""A whole training in miniature: it learns, it repeats bit for bit, it logs what it says, and no error is swallowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.utils import set_determinism
from small_runs import SIZE, Boxes, small_network, small_run, validation_cases, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pipelines.losses import supervised_loss
from pipelines.training import TrainingRun, ValidationDice, load_weights, read_header, training_inferer
from pipelines.training.engines import ScalerState, device_of, validator_or_none
from transforms.errors import BundleError, DataError

CPU = torch.device("cpu")
ADAMW = {"optimizer": torch.optim.AdamW}
PLAN = {"rates": {".*": 0.02}, "steps_per_epoch": 4}


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in ((1, 8), (8, 8)):
        layers += [nn.Conv3d(*channels, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Conv3d(8, 2, 1))


def make(run: Path, plan: dict[str, Any] | None = None, validation: bool = True, **changes: Any) -> TrainingRun:
    """A run as a bundle configures it, with AdamW and three validation cases."""
    torch.manual_seed(0)
    options = {"network": network(), "cases": validation_cases(3) if validation else [], **ADAMW, **changes}
    return small_run(run, plan={**PLAN, **(plan or {})}, **options)


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingRun]:
    folder = tmp_path_factory.mktemp("runs") / "learns"
    run = make(folder, {"max_epochs": 6, "steps_per_epoch": 10, "warmup_epochs": 1})
    run.run()
    return folder, run


def outcome_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())["outcome"]


def same(one: TrainingRun, two: TrainingRun) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights_of(one).values(), weights_of(two).values(), strict=True))


def test_it_learns(finished: tuple[Path, TrainingRun]) -> None:
    outcome = outcome_of(finished[0])
    assert outcome["best_metric"] > 0.8
    assert outcome["history"][-1]["loss"] < 0.5 * outcome["history"][0]["loss"]


def test_the_saved_network_is_the_validated_one(finished: tuple[Path, TrainingRun]) -> None:
    folder, _ = finished
    header = read_header(folder / "checkpoints" / "best.safetensors")
    history = {entry["epoch"]: entry["mean_dice"] for entry in header["history"]}
    best = outcome_of(folder)["best_metric"]
    assert header["metric"] == history[header["epoch"]] == max(history.values()) == best
    assert header["contract"] == {"modalities": ["flair"]}
    net = load_weights(network(), folder / "checkpoints" / "best.safetensors").eval()
    metric = ValidationDice({1: "box"})
    for item in validation_cases(3):
        with torch.no_grad():
            prediction = net(item["image"][None]).argmax(dim=1)
        metric.update([{"pred": prediction, "label": item["label"]}])
    assert metric.compute() == pytest.approx(header["metric"], abs=1e-6)


def test_the_record_has_the_outcome(finished: tuple[Path, TrainingRun]) -> None:
    outcome = outcome_of(finished[0])
    assert outcome["epochs"] == 6
    assert outcome["steps"] == 60
    assert outcome["best_metric"] == max(entry["mean_dice"] for entry in outcome["history"])
    assert [entry["epoch"] for entry in outcome["history"]] == [1, 2, 3, 4, 5, 6]
    assert outcome["skipped_steps"] == 0
    assert outcome["bad_cases"] == {}
    assert outcome["minutes"] > 0


def test_tensorboard_shows_terms_rate_metrics_and_overlays(finished: tuple[Path, TrainingRun]) -> None:
    folder, _ = finished
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert {"loss/step", "loss/epoch", "learning_rate", "validation/mean_dice", "validation/dice_box"} <= set(scalars)
    loss = supervised_loss("dice_ce")
    loss(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))
    assert len(loss.last_terms) >= 4  # Dice and cross-entropy, over all heads and of the main one
    assert {f"loss/{term}" for term in loss.last_terms} <= set(scalars)
    assert [step for step, _ in scalars["learning_rate"]] == list(range(1, 61))
    rates = [value for _, value in scalars["learning_rate"]]
    assert max(rates) == pytest.approx(0.02)
    assert rates[-1] == 0.0
    dice = [entry["mean_dice"] for entry in outcome_of(folder)["history"]]
    assert [value for _, value in scalars["validation/mean_dice"]] == pytest.approx(dice, abs=1e-6)
    images = board.Tags()["images"]
    assert sorted(images) == [f"overlay/v{case}/{name}" for case in (0, 1) for name in ("middle", "most_lesioned")]
    event = board.Images("overlay/v0/middle")[-1]
    assert (event.step, event.width, event.height) == (6, 3 * SIZE, SIZE)


def test_two_identical_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    one, two = (make(tmp_path / place / "r") for place in "ab")
    one.run()
    two.run()
    assert same(one, two)
    files = [(tmp_path / place / "r" / "checkpoints" / "best.safetensors").read_bytes() for place in "ab"]
    assert files[0] == files[1]


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    # they are made anew in every epoch, after the data set has been told which one it is
    here, there = (make(tmp_path / str(n), workers=n, validation=False) for n in (0, 2))
    here.run()
    there.run()
    assert same(here, there)


def test_two_batches_of_one_accumulated_are_a_batch_of_two(tmp_path: Path) -> None:
    results = []
    for batch_size, steps, accumulation in ((2, 4, 1), (1, 8, 2)):
        torch.manual_seed(0)
        run = small_run(
            tmp_path / str(batch_size),
            network=small_network(),  # without normalisation, so that samples of a batch do not meet
            plan={
                "rates": {".*": 0.1},
                "steps_per_epoch": steps,
                "batch_size": batch_size,
                "accumulation_steps": accumulation,
            },
            clip_norm=0.1,
        )
        before = weights_of(run)
        run.run()
        results.append(weights_of(run))
        # it moved much further than the tolerance
        assert float((before["0.weight"] - results[-1]["0.weight"]).abs().max()) > 2e-4
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-5)


def test_a_loss_that_stays_nan_ends_the_run_with_an_error(tmp_path: Path) -> None:
    def spoil(sample: dict[str, Any]) -> None:
        if sample["case"].endswith("_sample5"):
            sample["image"][0, 0, 0, 0] = float("nan")

    run = make(tmp_path, {"max_epochs": 5}, data=Boxes(spoil))
    # samples 4 and 5 are the third of four batches: iterations 3, 7 and 11
    with pytest.raises(DataError, match=r"epoch 3, iteration 11, cases epoch3_sample4, epoch3_sample5") as caught:
        run.run()
    assert "term" in caught.value.what
    assert not (tmp_path / "record.json").exists()
    assert all(torch.isfinite(weight).all() for weight in weights_of(run).values())


class Raise:
    """A handler that raises in the first step."""

    def __init__(self, problem: BaseException) -> None:
        self.problem = problem

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        raise self.problem


def test_an_error_in_the_validation_and_an_interruption_come_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", handlers=[Raise(KeyboardInterrupt())]).run()
    run = make(tmp_path / "b")
    Raise(DataError("planted")).attach(run.validator)
    with pytest.raises(DataError, match="planted"):
        run.run()


def test_early_stopping_waits_for_warm_up_and_a_quarter_of_the_run(tmp_path: Path) -> None:
    # With a rate this small no weight changes, and nothing improves after epoch 1. Counting starts at epoch
    # max(2, 12 / 4) = 3, patience 2: epoch 5.
    plan = {"rates": {".*": 1e-30}, "steps_per_epoch": 1, "max_epochs": 12, "warmup_epochs": 2, "patience": 2}
    make(tmp_path, plan, optimizer=torch.optim.SGD).run()
    assert outcome_of(tmp_path)["epochs"] == 5


def test_without_validation_there_is_only_the_last_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, {"max_epochs": 1, "patience": 1}, validation=False).run()
    names = [file.name for file in (tmp_path / "checkpoints").iterdir() if not file.name.startswith("state-")]
    assert names == ["last.safetensors"]
    assert outcome_of(tmp_path)["best_metric"] is None


@pytest.mark.parametrize("n_cases", [0, 2])
def test_a_cohort_without_validation_cases_has_no_validator(n_cases: int) -> None:
    evaluator, dataset = Engine(lambda engine, batch: None), type("Data", (), {"n_cases": n_cases})()
    assert validator_or_none(evaluator, dataset) is (evaluator if n_cases else None)


def test_validation_every_second_epoch(tmp_path: Path) -> None:
    make(tmp_path, {"max_epochs": 3, "steps_per_epoch": 1}, validation_interval=2).run()
    assert ["mean_dice" in entry for entry in outcome_of(tmp_path)["history"]] == [False, True, False]


def test_bf16_trains(tmp_path: Path) -> None:
    run = make(tmp_path, {"steps_per_epoch": 1}, precision="bf16", inferer=training_inferer("bf16"), validation=False)
    before = weights_of(run)
    run.run()
    after = weights_of(run)
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in after.values())


def test_the_gradient_scaler_goes_on_with_its_scale() -> None:
    def trainer() -> Any:
        engine = Engine(lambda engine, batch: None)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as MONAI's trainer makes one at its start
        return engine

    before, after = trainer(), trainer()
    before.scaler.scale(torch.ones(1))
    before.scaler.update(64.0)
    state = ScalerState(before).state_dict()
    assert state["scale"] == 64.0
    ScalerState(after).load_state_dict(state)
    after.run([0])
    after.scaler.scale(torch.ones(1))
    assert after.scaler.get_scale() == 64.0
    assert ScalerState(Engine(lambda engine, batch: None)).state_dict() == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        ({"accumulation_steps": 0}, {}, "accumulation_steps 0"),
        ({}, {"clip_norm": 0.0}, "clip_norm"),
        ({"warmup_epochs": 2}, {}, "warm-up"),
        ({"max_epochs": 0}, {}, "max_epochs 0"),
        ({"patience": -1}, {}, "early_stopping_patience"),
    ],
)
def test_a_run_that_could_learn_nothing_is_refused(
    tmp_path: Path, plan: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        make(tmp_path, plan, **changes).run()
    assert not (tmp_path / "checkpoints" / "last.safetensors").exists()


def test_devices() -> None:
    assert device_of("cpu") == CPU
    assert device_of("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(BundleError, match=name):
            device_of(name)
