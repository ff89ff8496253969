"""Planted failures for the rules that watch a run, each in a real training of a few seconds, and one healthy training.

A run is that of ``tests/pipelines/small_runs.py``: boxes in noise, two convolutions. For fusion it is a pair of noise
images, for instances label maps, because their bundles need more than a few seconds, or are not there yet.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader as MonaiLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.utils import set_determinism
from planted import Proof
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pipelines.metrics import instance_metrics
from pipelines.preflight import Finding
from pipelines.preflight.watch import LIMITS, instance_consistency
from pipelines.training import TrainingRun, ValidationFusion
from transforms.errors import FiducialError
from transforms.fusion import REFERENCE_CHANNELS

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))
from small_runs import SIZE, Boxes, small_run, validation_cases

PLAN: dict[str, Any] = {"rates": {".*": 0.02}, "max_epochs": 8, "steps_per_epoch": 10}
ADAMW = {"optimizer": torch.optim.AdamW}


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for a run, gone afterwards; no seeds are left to others."""
    path = Path(tempfile.mkdtemp())
    try:
        yield path / "run"
    finally:
        set_determinism(None)
        shutil.rmtree(path)


def trained(run: TrainingRun) -> list[Finding]:
    """Train, and return what the watchdogs have found, also where that ended the run."""
    with suppress(FiducialError):
        run.run()
    assert run.watchdogs is not None
    return as_findings(run.watchdogs.after_failure())


def as_findings(entries: Sequence[Mapping[str, Any]]) -> list[Finding]:
    names = [field.name for field in fields(Finding)]
    return [Finding(**{name: entry[name] for name in names}) for entry in entries]


def boxes(
    plan: Mapping[str, Any] | None = None, change: Callable[[TrainingRun], None] | None = None, **changes: Any
) -> list[Finding]:
    """Train on boxes with something changed, and return the findings."""
    with folder() as path:
        options = {"cases": validation_cases(3), **ADAMW, **changes}
        run = small_run(path, plan={**PLAN, **(plan or {})}, **options)
        if change is not None:
            change(run)
        return trained(run)


def of(rule: str, found: Callable[[], Sequence[Finding]]) -> Callable[[], list[Finding]]:
    return lambda: [finding for finding in found() if finding.rule == rule]


@cache
def healthy_boxes() -> tuple[Finding, ...]:
    return tuple(boxes({"patience": 20}))


# ------------------------------------------------------------------------------------------------- failures of boxes


def cross_entropy(
    weights: Sequence[float] | None = None, target: Callable[[torch.Tensor], torch.Tensor] = lambda label: label
) -> Callable[[str], nn.Module]:
    """A loss per name, whose class weights or target are wrong."""

    class Loss(nn.Module):
        def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            weight = None if weights is None else torch.tensor(weights)
            return F.cross_entropy(logits, target(label)[:, 0].long(), weight=weight)

    return lambda name: Loss()


def with_nan() -> Boxes:
    def spoil(sample: dict[str, Any]) -> None:
        if sample["case"] in ("epoch1_sample2", "epoch1_sample9", "epoch2_sample4"):
            sample["image"][0, 0, 0, 0] = float("nan")

    return Boxes(spoil)


def stale_network(run: TrainingRun) -> None:
    """The validation has a network of its own, which nobody trains."""
    assert run.validator is not None
    run.validator.network = deepcopy(run.validator.network)


def random_validation(run: TrainingRun) -> None:
    """Every validation adds other noise."""

    class Noisy(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            case = validation_cases(3)[index]
            return {**case, "image": case["image"] + 0.1 * torch.randn_like(case["image"])}

    assert run.validator is not None
    run.validator.data_loader = MonaiLoader(Noisy(), batch_size=1)


def inverted_boxes() -> list[Finding]:
    """Background and foreground changed places in the training alone."""
    return boxes({"max_epochs": 2}, loss=cross_entropy(target=lambda label: 1 - label))


def dark_cases() -> list[dict[str, Any]]:
    """Validation cases whose boxes are dark instead of bright: another scanner."""
    return [{**case, "image": -case["image"]} for case in validation_cases(3)]


def late_metric(run: TrainingRun) -> None:
    """The validated metric passes 0.1 in epoch 5."""

    def give(validator: Any) -> None:
        validator.state.metrics["mean_dice"] = [0.01, 0.02, 0.03, 0.04, 0.5, 0.6, 0.7, 0.8][validator.state.epoch - 1]

    assert run.validator is not None
    run.validator.add_event_handler(Events.EPOCH_COMPLETED, give)


class CopyLastToBest:
    """As a careless callback does: keep whatever came last as the best."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) / "checkpoints"

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        shutil.copy(self.path / "last.safetensors", self.path / "best.safetensors")


def best_overwritten() -> list[Finding]:
    with folder() as path:
        options = {"cases": validation_cases(3), "handlers": [CopyLastToBest(path)], **ADAMW}
        run = small_run(path, plan=PLAN, **options)

        def give(validator: Any) -> None:
            validator.state.metrics["mean_dice"] = 0.9 - 0.1 * validator.state.epoch

        assert run.validator is not None
        run.validator.add_event_handler(Events.EPOCH_COMPLETED, give)
        return trained(run)


class SlowBoxes(Boxes):
    """Samples from a slow disk."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.1)  # long beside a step, on a busy machine too
        return super().__getitem__(index)


class TenfoldRate:
    """A rate that a handler changes behind the back of the phase."""

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] *= 10


class WithDeadTerm(nn.Module):
    """Cross entropy, and a lesion term that is computed over an empty mask."""

    def __init__(self) -> None:
        super().__init__()
        self.last_terms: dict[str, torch.Tensor] = {}

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(logits, label[:, 0].long())
        self.last_terms = {"ce": value.detach(), "lesion": torch.zeros(())}
        return value


# ------------------------------------------------------------------------------------------------------------ fusion

SHAPE = (16, 16, 12)


def pair(seed: int) -> dict[str, Any]:
    """Textured MRI and CT, a box of brain between two plates of bone; the target is CT in the bone, else MRI."""
    draw = np.random.default_rng([7, seed])
    mri, ct = (np.clip(draw.normal(0.5, 0.15, SHAPE), 0, 1) for _ in range(2))
    brain, bone = np.zeros((2, *SHAPE))
    brain[4:12] = bone[:3] = bone[-3:] = 1
    ct = ct * bone
    target = 2 * np.where(bone > 0, ct, mri) - 1
    reference = dict(zip(REFERENCE_CHANNELS, (target, mri, ct, brain, bone, np.zeros(SHAPE)), strict=True))
    label = np.stack([reference[name] for name in REFERENCE_CHANNELS]).astype(np.float32)
    image = np.stack([mri, ct, bone]).astype(np.float32)
    return {"image": torch.as_tensor(image), "label": torch.as_tensor(label), "case": f"p{seed}"}


class Pairs(Dataset):
    """Samples as ``Boxes``, of pairs."""

    def set_epoch(self, epoch: int, phase: int = 0) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return pair(100 * self.epoch + index)


class TargetError(nn.Module):
    """Mean squared error in display units."""

    def forward(self, fused: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(fused, (label[:, :1] + 1) / 2)


class ConstantOutput(nn.Module):
    """A decoder that the condition does not reach: one grey everywhere, and some noise of arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.zeros(1))

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return self.grey + 1e-3 * condition[:, :1]


def fusion(*last: nn.Module, network: nn.Module | None = None, epochs: int = 6) -> list[Finding]:
    """Train a fusion of pairs; ``last`` comes behind the network."""
    with folder() as path:
        torch.manual_seed(0)
        layers = [nn.Conv3d(3, 8, 1), nn.LeakyReLU(), nn.Conv3d(8, 1, 1)]
        run = small_run(
            path,
            data=Pairs(),
            network=nn.Sequential(*layers, *last) if network is None else network,
            plan={**PLAN, "max_epochs": epochs, "steps_per_epoch": 20},
            loss=lambda name: TargetError(),
            labels={},
            pictures=lambda item: {},
            **ADAMW,
        )
        metric = {"fusion_score": ValidationFusion()}
        validator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=MonaiLoader([pair(seed) for seed in (1, 2)], batch_size=1),
            network=run.average.module,
            inferer=SimpleInferer(),
            key_val_metric=metric,
        )
        run.validator = validator
        run.settings = type(run.settings)(**{**vars(run.settings), "validator": validator, "metrics": metric})
        return trained(run)


@cache
def healthy_fusion() -> tuple[Finding, ...]:
    return tuple(fusion())


# --------------------------------------------------------------------------------------------------------- instances


def discs(*centres: tuple[int, int], radius: int = 4, size: int = 64) -> np.ndarray:
    """Instance map of discs, numbered from 1."""
    x, y = np.mgrid[:size, :size]
    ids = np.zeros((size, size), np.int32)
    for number, (cx, cy) in enumerate(centres, start=1):
        ids[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = number
    return ids


GRID = [(x, y) for x in range(8, 64, 12) for y in range(8, 64, 12)]


def touching_cells_as_one() -> list[Finding]:
    """A quarter of the cells is predicted together with its neighbour, as components of a mask are."""
    truth = discs(*GRID)
    predicted = truth.copy()
    for kept, gone in zip(range(1, 13, 2), range(2, 13, 2), strict=True):
        predicted[truth == gone] = kept
    return instance_consistency(instance_metrics(predicted, truth), LIMITS["R44"])


def separated_cells() -> list[Finding]:
    truth = discs(*GRID)
    return instance_consistency(instance_metrics(discs(*GRID, radius=5), truth), LIMITS["R44"])


# ------------------------------------------------------------------------------------------------------------ proofs


def _proof(
    rule: str,
    check: str,
    origin: str,
    planted: Callable[[], Sequence[Finding]],
    severity: str = "warn",
    healthy: Callable[[], Sequence[Finding]] = healthy_boxes,
) -> Proof:
    return Proof(rule, check, origin, of(rule, planted), of(rule, healthy), severity)


PROOFS: list[Proof] = [
    _proof(
        "R27", "share of the gradient that falls on the voxels of each class over 100 steps",
        "manual class weights starved the other organelles",
        partial(boxes, {"max_epochs": 2, "steps_per_epoch": 50}, loss=cross_entropy(weights=(1.0, 0.0))),
    ),
    _proof(
        "R30", "steps whose loss is not finite", "NaN under fp16, replaced by a constant",
        partial(boxes, data=with_nan()), "error",
    ),
    _proof(
        "R31", "shares of the predicted voxels per class in two validations", "all-positive collapse of an organelle",
        partial(boxes, loss=cross_entropy(target=torch.ones_like)), "error",
    ),
    _proof(
        "R32", "the validated metric and the outputs from one validation to the next",
        "validation of a network that was never updated", partial(boxes, {"max_epochs": 2}, change=stale_network),
    ),
    _proof(
        "R33", "values of a fused image exactly at its minimum or maximum", "a hard clamp on the sample",
        lambda: fusion(nn.Hardtanh(-1.0, 0.6), epochs=2), healthy=healthy_fusion,
    ),
    _proof(
        "R34", "the validated metric against that of the best constant prediction, or of the mean of MRI and CT",
        "mIoU .03, below the majority class",
        lambda: [*inverted_boxes(), *fusion(network=ConstantOutput(), epochs=2)],
        healthy=lambda: [*healthy_boxes(), *healthy_fusion()],
    ),
    _proof(
        "R35", "fall of the smoothed loss since the first epoch", "a diffusion that did not see its input",
        partial(boxes, {"rates": {".*": 1e-7}, "max_epochs": 6, "steps_per_epoch": 5}),
    ),
    _proof(
        "R36", "Dice of the training against Dice of the validation in five validations",
        "validation images on another scale than those of the training",
        partial(boxes, {"max_epochs": 6}, cases=dark_cases()),
    ),
    _proof(
        "R37", "patience against the epoch in which the metric first passed 0.1",
        "early stopping in the plateau before learning began",
        partial(boxes, {"patience": 2}, change=late_metric),
    ),
    _proof(
        "R38", "metric and epoch in the header of the best weights against the history",
        "the best checkpoint rewritten in every epoch", best_overwritten, "error",
    ),
    _proof(
        "R39", "recall and precision per class in two validations", "recall .94 with precision .21",
        partial(boxes, loss=cross_entropy(target=lambda label: F.max_pool3d(label.float(), 5, 1, 2))),
    ),
    _proof(
        "R40", "time without a batch against the time of the steps", "GPUs that waited for zarr",
        partial(boxes, {"max_epochs": 1}, data=SlowBoxes(), thresholds=["R40.least_seconds=0.05", "R40.share=0.2"]),
    ),
    _proof(
        "R41", "rate of every group against phase and schedule", "a decoder at ten times its rate",
        partial(boxes, {"max_epochs": 2}, handlers=[TenfoldRate()]),
    ),
    _proof(
        "R42", "files and curves that a run leaves behind", "a lesion term under no_grad, 0 for a whole training",
        partial(boxes, {"max_epochs": 2}, loss=lambda name: WithDeadTerm()),
    ),
    _proof(
        "R43", "digests of the validation samples from epoch to epoch", "a random crop in the validation",
        partial(boxes, {"max_epochs": 2}, change=random_validation),
    ),
    _proof(
        "R44", "RQ against F1, predicted against true number of instances",
        "touching cells taken for one", touching_cells_as_one, healthy=separated_cells,
    ),
]  # fmt: skip

assert SIZE == 8  # the shares of voxels above hold for boxes in 512 voxels
