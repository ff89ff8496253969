"""A training run small enough for a test: boxes in noise, two convolutions, no files but the run's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader as MonaiLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted
from monai.utils import set_determinism
from torch import nn
from torch.utils.data import Dataset

from pipelines.losses import supervised_loss
from pipelines.training import TrainingRun, ValidationDice, averaged_network, plan_phases, training_inferer
from pipelines.training.distributed import share

SIZE = 8


def box(draw: np.random.Generator, case: str) -> dict[str, Any]:
    """A bright box of random place and size in noise, and its label."""
    low = draw.integers(1, 4, size=3)
    high = low + draw.integers(2, 4, size=3)
    label = np.zeros((1, SIZE, SIZE, SIZE), np.uint8)
    label[0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    image = 2.0 * label + draw.normal(0, 0.5, size=label.shape)
    return {"image": torch.as_tensor(image, dtype=torch.float32), "label": torch.as_tensor(label), "case": case}


class Boxes(Dataset):
    """Samples as ``PatchDataset`` gives them: a function of phase, epoch and index; ``spoil`` may change them."""

    def __init__(self, spoil: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.spoil, self.epoch, self.phase = spoil, 0, 0

    def set_epoch(self, epoch: int, phase: int = 0) -> None:
        self.epoch, self.phase = epoch, phase

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = box(np.random.default_rng([self.phase, self.epoch, index]), f"epoch{self.epoch}_sample{index}")
        if self.spoil is not None:
            self.spoil(sample)
        return sample


def validation_cases(number: int) -> list[dict[str, Any]]:
    return [box(np.random.default_rng([99, index]), f"v{index}") for index in range(number)]


def small_network(dropout: float = 0.0) -> nn.Module:
    """Without normalisation, so that samples of a batch do not meet."""
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Dropout3d(dropout), nn.Conv3d(4, 2, 3, padding=1)
    )


def small_run(
    folder: Path,
    *,
    data: Dataset | None = None,
    cases: Sequence[dict[str, Any]] = (),
    network: nn.Module | None = None,
    dropout: float = 0.0,
    phases: Sequence[dict[str, Any]] = (),
    plan: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainingRun:
    """Return a run in ``folder`` with fresh weights, the same every time.

    Args:
        data: training samples; default ``Boxes()``.
        cases: of the validation, shared among the processes; none = no validation.
        plan: attributes of every phase that differ from those below.
        changes: arguments of ``TrainingRun``.
    """
    set_determinism(0)
    network = small_network(dropout) if network is None else network
    average = averaged_network(network, 0.9)
    metrics = {"mean_dice": ValidationDice({1: "box"})}
    validator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=MonaiLoader(list(share(cases)), batch_size=1),
        network=average.module,
        inferer=SimpleInferer(),
        postprocessing=AsDiscreted("pred", argmax=True),
        key_val_metric=metrics,
    )
    common = {"loss": "dice_ce", "max_epochs": 2, "steps_per_epoch": 3, "batch_size": 2}
    arguments: dict[str, Any] = {
        "network": network,
        "average": average,
        "loss": supervised_loss,
        "optimizer": lambda groups: torch.optim.SGD(groups),
        "dataset": Boxes() if data is None else data,
        "max_epochs": common["max_epochs"],
        "phases": plan_phases(phases, 0.5, **{**common, **(plan or {})}),
        "run": folder,
        "header": {"contract": {"modalities": ["flair"]}},
        "colours": {0: "#000000", 1: "#ff0000"},
        "labels": {1: "box"},
        "device": torch.device("cpu"),
        "inferer": training_inferer("fp32"),
        "precision": "fp32",
        "validator": validator if cases else None,
        "metrics": metrics,
    }
    return TrainingRun(**{**arguments, **changes})


def weights_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Return copies of the network's tensors."""
    return {name: tensor.detach().clone() for name, tensor in run.network.state_dict().items()}
