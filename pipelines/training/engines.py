"""Assemble a training run from MONAI's engines; nothing is computed here.

Every bundle trains through ``supervised_trainer``: what differs between tasks (data, network, loss, inferer, metric)
comes in as an argument.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.inferers import Inferer, SimpleInferer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from pipelines.inference.inferers import AutocastInferer
from pipelines.training.board import TensorBoardLog
from pipelines.training.datasets import collate_batch
from pipelines.training.handlers import (
    AverageLoss,
    ClipGradients,
    FollowOptimizer,
    KeepCheckpoints,
    ReportProgress,
    SeedEpoch,
    StopEarly,
    StopOnNonFiniteLoss,
)
from pipelines.training.run_folder import extend_record
from pipelines.training.schedule import polynomial_with_warmup
from transforms.errors import BundleError

logger = logging.getLogger(__name__)


def patch_loader(dataset: Any, batch_size: int, workers: int) -> DataLoader:
    """Return the loader of training patches; the order is the data set's own, which draws at random."""
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate_batch, shuffle=False)


def supervised_trainer(
    *,
    network: torch.nn.Module,
    average: AveragedModel,
    loss: torch.nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    run: str | Path,
    header: Mapping[str, Any],
    colours: Mapping[int, str],
    max_epochs: int,
    device: torch.device,
    inferer: Inferer,
    precision: str,
    warmup_epochs: int = 0,
    decay_power: float = 0.9,
    accumulation_steps: int = 1,
    clip_norm: float = 12.0,
    validator: SupervisedEvaluator | None = None,
    validation_interval: int = 1,
    early_stopping_patience: int = 0,
    early_stopping_min_delta: float = 0.0,
    handlers: Sequence[Any] = (),
) -> SupervisedTrainer:
    """Return MONAI's ``SupervisedTrainer`` with what every run here has: schedule, clipping, average, validation, log.

    Args:
        average: ``averaged_network(network, decay)``; validated and saved in place of the network.
        loss: on logits, with ``last_terms`` for the log.
        loader: batches of ``collate_batch``; its data set has ``set_epoch``.
        run: the run's folder.
        header: what the weights' header says besides epoch and metric (must hold the ``contract``).
        colours: ``#rrggbb`` per label id, for the overlays.
        precision: from ``choose_precision``; fp16 trains with scaled gradients.
        validator: validates ``average.module`` every ``validation_interval`` epochs; None = no validation cases.
        early_stopping_patience: epochs without improvement, counted after the warm-up and a quarter of the run;
            0 = never stop.
        handlers: further ignite handlers of the bundle.

    Raises:
        BundleError: a hyper-parameter with which nothing could be learnt.
    """
    if accumulation_steps < 1:
        raise BundleError(f"accumulation_steps {accumulation_steps}", "at least 1 expected", "correct it")
    steps_per_epoch = -(-len(loader) // accumulation_steps)
    scheduler = polynomial_with_warmup(
        optimizer, steps_per_epoch * max_epochs, steps_per_epoch * warmup_epochs, decay_power
    )
    keeper = KeepCheckpoints(
        Path(run) / "checkpoints", average.module, dict(header), validator, early_stopping_min_delta
    )

    def rate() -> float:
        return float(optimizer.param_groups[0]["lr"])

    standard: list[Any] = [
        SeedEpoch(loader.dataset),
        StopOnNonFiniteLoss(),
        ClipGradients(clip_norm),
        FollowOptimizer(scheduler, average),
        AverageLoss(),
    ]
    if validator is not None:
        standard.append(ValidationHandler(interval=validation_interval, validator=validator))
    standard.append(keeper)
    standard.append(TensorBoardLog(Path(run) / "tensorboard", rate, validator, colours))
    standard.append(ReportProgress(validator, rate))
    if early_stopping_patience and validator is not None:
        first = max(warmup_epochs, -(-max_epochs // 4))
        standard.append(StopEarly(keeper, early_stopping_patience, first))
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=max_epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        inferer=inferer,
        accumulation_steps=accumulation_steps,
        optim_set_to_none=True,
        amp=precision == "fp16",
        decollate=False,
        train_handlers=[*standard, *handlers],
    )
    trainer.keeper = keeper
    return trainer


def train(trainer: SupervisedTrainer, run: str | Path) -> None:
    """Run the training; add its outcome (best metric, epochs, minutes, history) to ``record.json`` of the run."""
    started = time.monotonic()
    logger.info("training in %s; watch it with: tensorboard --logdir %s", run, Path(run) / "tensorboard")
    trainer.run()
    keeper: KeepCheckpoints = trainer.keeper
    outcome = {
        "epochs": int(trainer.state.epoch),
        "steps": int(trainer.state.iteration),
        "minutes": round((time.monotonic() - started) / 60, 3),
        "best_metric": keeper.best_metric,
        "best_epoch": keeper.best_epoch or None,
        "history": keeper.history,
    }
    extend_record(Path(run), {"outcome": outcome})
    best = (
        f"best validation {keeper.best_metric:.4f} in epoch {keeper.best_epoch}"
        if keeper.best_epoch
        else "no validation"
    )
    logger.info("trained %d epochs in %.1f min: %s", outcome["epochs"], outcome["minutes"], best)


def validator_or_none(evaluator: Engine, dataset: Any) -> Engine | None:
    """Return the evaluator, or None where the cohort has no validation case (then the last weights are the result)."""
    return evaluator if len(dataset) else None


def training_inferer(precision: str) -> Inferer:
    """Return the inferer of a training step, one forward pass; fp16 is left to the trainer, which scales gradients."""
    if precision == "fp16":
        return SimpleInferer()
    return AutocastInferer(precision)


def device_of(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        BundleError: the device is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise BundleError(
            f"device {name!r}", f"not available here: {str(problem).splitlines()[0]}", "use --device_name cpu or auto"
        ) from problem
    return device
