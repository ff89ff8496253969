"""A whole training in miniature: it learns, it repeats bit for bit, it logs what it says, and no error is swallowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader as MonaiLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted
from monai.utils import set_determinism
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

from pipelines.losses import DeepSupervisionLoss, segmentation_loss
from pipelines.training import (
    ValidationDice,
    averaged_network,
    create_run,
    device_of,
    load_weights,
    patch_loader,
    read_header,
    supervised_trainer,
    train,
    training_inferer,
    validator_or_none,
)
from transforms.errors import BundleError, DataError

CPU = torch.device("cpu")
SIZE = 16


def blob(draw: np.random.Generator, case: str) -> dict[str, Any]:
    """A bright box of random place and size in noise, and its label."""
    low = draw.integers(1, 8, size=3)
    high = low + draw.integers(3, 7, size=3)
    label = np.zeros((1, SIZE, SIZE, SIZE), np.uint8)
    label[0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    image = 2.0 * label + draw.normal(0, 0.5, size=label.shape)
    return {"image": torch.as_tensor(image, dtype=torch.float32), "label": torch.as_tensor(label), "case": case}


class Blobs(Dataset):
    """Patches as ``PatchDataset`` gives them: a function of seed, epoch and index."""

    def __init__(self, length: int, bad: int | None = None) -> None:
        self.length, self.bad, self.epoch = length, bad, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = blob(np.random.default_rng([0, self.epoch, index]), f"p{index}")
        if index == self.bad:
            item["image"][0, 0, 0, 0] = float("nan")
        return item


def plain_network() -> nn.Module:
    """Without normalisation, so that samples of a batch do not meet."""
    return nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(6, 2, 3, padding=1))


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in ((1, 8), (8, 8)):
        layers += [nn.Conv3d(*channels, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Conv3d(8, 2, 1))


def make(run: Path, net: nn.Module | None = None, **changes: Any) -> SupervisedTrainer:
    """A run as a bundle configures it; ``changes``: its arguments, or data, batch_size, workers, decay, validation."""
    set_determinism(0)
    net = network() if net is None else net
    average = averaged_network(net, changes.pop("decay", 0.9))
    loader = patch_loader(changes.pop("data", Blobs(8)), changes.pop("batch_size", 2), changes.pop("workers", 0))
    validator = None
    if changes.pop("validation", True):
        cases = [blob(np.random.default_rng([1, index]), f"v{index}") for index in range(3)]
        validator = SupervisedEvaluator(
            device=CPU,
            val_data_loader=MonaiLoader(cases, batch_size=1),
            network=average.module,
            inferer=SimpleInferer(),
            postprocessing=AsDiscreted("pred", argmax=True),
            key_val_metric={"mean_dice": ValidationDice({1: "lesion"})},
        )
    arguments: dict[str, Any] = {
        "network": net,
        "average": average,
        "loss": DeepSupervisionLoss(segmentation_loss("dice_ce")),
        "loader": loader,
        "optimizer": torch.optim.AdamW(net.parameters(), lr=0.02),
        "run": run,
        "header": {"contract": {"modalities": ["flair"]}},
        "colours": {0: "#000000", 1: "#ff0000"},
        "max_epochs": 2,
        "device": CPU,
        "inferer": training_inferer("fp32"),
        "precision": "fp32",
        "validator": validator,
    }
    return supervised_trainer(**{**arguments, **changes})


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


def weights_of(trainer: SupervisedTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.network.parameters()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SupervisedTrainer]:
    run = create_run(tmp_path_factory.mktemp("runs"), "b", "learns")
    trainer = make(run, data=Blobs(20), max_epochs=6, warmup_epochs=1)
    train(trainer, run)
    return run, trainer


def test_it_learns(finished: tuple[Path, SupervisedTrainer]) -> None:
    _, trainer = finished
    history = trainer.keeper.history
    assert trainer.keeper.best_metric > 0.8
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_the_saved_network_is_the_validated_one(finished: tuple[Path, SupervisedTrainer]) -> None:
    run, trainer = finished
    header = read_header(run / "checkpoints" / "best.safetensors")
    history = {entry["epoch"]: entry["mean_dice"] for entry in header["history"]}
    assert header["metric"] == history[header["epoch"]] == max(history.values()) == trainer.keeper.best_metric
    assert header["contract"] == {"modalities": ["flair"]}
    net = load_weights(network(), run / "checkpoints" / "best.safetensors").eval()
    metric = ValidationDice({1: "lesion"})
    for index in range(3):
        item = blob(np.random.default_rng([1, index]), "")
        with torch.no_grad():
            prediction = net(item["image"][None]).argmax(dim=1)
        metric.update([{"pred": prediction, "label": item["label"]}])
    assert metric.compute() == pytest.approx(header["metric"], abs=1e-6)


def test_the_record_has_the_outcome(finished: tuple[Path, SupervisedTrainer]) -> None:
    run, trainer = finished
    outcome = json.loads((run / "record.json").read_text())["outcome"]
    assert outcome["epochs"] == 6
    assert outcome["steps"] == 60
    assert outcome["best_metric"] == trainer.keeper.best_metric
    assert len(outcome["history"]) == 6


def test_tensorboard_shows_terms_rate_metrics_and_overlays(finished: tuple[Path, SupervisedTrainer]) -> None:
    run, trainer = finished
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert {"loss/step", "loss/epoch", "learning_rate", "validation/mean_dice", "validation/dice_lesion"} <= set(
        scalars
    )
    terms = set(trainer.loss_function.last_terms)
    assert len(terms) >= 4  # Dice and cross-entropy, over all heads and of the main one
    assert {f"loss/{term}" for term in terms} <= set(scalars)
    assert [step for step, _ in scalars["learning_rate"]] == list(range(1, 61))
    rates = [value for _, value in scalars["learning_rate"]]
    assert max(rates) == pytest.approx(0.02)
    assert rates[-1] == 0.0
    dice = [entry["mean_dice"] for entry in trainer.keeper.history]
    assert [value for _, value in scalars["validation/mean_dice"]] == pytest.approx(dice, abs=1e-6)
    images = board.Tags()["images"]
    assert sorted(images) == [f"overlay/v{case}/{name}" for case in (0, 1) for name in ("middle", "most_lesioned")]
    event = board.Images("overlay/v0/middle")[-1]
    assert (event.step, event.width, event.height) == (6, 3 * SIZE, SIZE)


def test_two_identical_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    trainers = [make(tmp_path / name) for name in "ab"]
    for trainer in trainers:
        trainer.run()
    one, two = (weights_of(trainer) for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    files = [(tmp_path / name / "checkpoints" / "best.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    # they are made anew in every epoch, after the data set has been told which one it is
    here, there = (make(tmp_path / str(n), workers=n, validation=False) for n in (0, 2))
    here.run()
    there.run()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(here), weights_of(there), strict=True))


def test_two_batches_of_one_accumulated_are_a_batch_of_two(tmp_path: Path) -> None:
    results = []
    for batch_size, accumulation in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        net = plain_network()
        trainer = make(
            tmp_path / str(batch_size),
            net,
            batch_size=batch_size,
            accumulation_steps=accumulation,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            validation=False,
            clip_norm=0.1,
        )
        before = weights_of(trainer)
        trainer.run()
        results.append(weights_of(trainer))
        assert float((before[0] - results[-1][0]).abs().max()) > 2e-4  # it moved much further than the tolerance
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_loss_that_is_nan_ends_the_run_with_an_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, data=Blobs(8, bad=5))
    with pytest.raises(DataError, match=r"epoch 1, iteration 3, term .*cases p4, p5"):
        train(trainer, tmp_path)
    assert not (tmp_path / "record.json").exists()
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer))


def test_an_error_in_the_validation_and_an_interruption_come_through(tmp_path: Path) -> None:
    class Raise:
        def __init__(self, problem: BaseException) -> None:
            self.problem = problem

        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine: Any) -> None:
            raise self.problem

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", handlers=[Raise(KeyboardInterrupt())]).run()
    trainer = make(tmp_path / "b")
    Raise(DataError("planted")).attach(trainer.keeper.validator)
    with pytest.raises(DataError, match="planted"):
        trainer.run()


def test_early_stopping_waits_for_warm_up_and_a_quarter_of_the_run(tmp_path: Path) -> None:
    # With a rate of 0 nothing improves after epoch 1. Counting starts at epoch max(2, 12 / 4) = 3, patience 2: epoch 5.
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    trainer = make(
        tmp_path,
        net,
        data=Blobs(2),
        optimizer=optimizer,
        max_epochs=12,
        warmup_epochs=2,
        early_stopping_patience=2,
    )
    trainer.run()
    assert trainer.state.epoch == 5


def test_without_validation_there_is_only_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, validation=False, max_epochs=1, early_stopping_patience=1)
    train(trainer, tmp_path)
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.safetensors"]
    outcome = json.loads((tmp_path / "record.json").read_text())["outcome"]
    assert outcome["best_metric"] is None
    assert validator_or_none(object(), []) is None  # type: ignore[arg-type]


def test_validation_every_second_epoch(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_epochs=3, validation_interval=2, data=Blobs(2))
    trainer.run()
    assert ["mean_dice" in entry for entry in trainer.keeper.history] == [False, True, False]


def test_bf16_trains(tmp_path: Path) -> None:
    trainer = make(tmp_path, precision="bf16", inferer=training_inferer("bf16"), validation=False, data=Blobs(2))
    before = weights_of(trainer)
    trainer.run()
    assert not torch.equal(before[0], weights_of(trainer)[0])
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in weights_of(trainer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps 0"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"warmup_epochs": 2}, "warm-up"),
        ({"max_epochs": 0}, "warm-up of 0 steps in a run of 0"),
        ({"early_stopping_patience": -1}, "early_stopping_patience"),
    ],
)
def test_a_run_that_could_learn_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        make(tmp_path, **changes)


def test_devices() -> None:
    assert device_of("cpu") == CPU
    assert device_of("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(BundleError, match=name):
            device_of(name)
