"""Assemble the engine of one phase of training from MONAI's; nothing is computed here.

Every bundle trains through ``phase_engine``: what differs between tasks (data, network, loss, inferer, metric) comes in
as an argument. ``pipelines.training.run`` takes a run through its phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from monai.inferers import Inferer, SimpleInferer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from pipelines.inference.inferers import AutocastInferer
from pipelines.training.board import TensorBoardLog
from pipelines.training.distributed import is_main_process, local_device, world_size
from pipelines.training.faults import CountBadCases, FaultTolerantTrainer, NonFiniteSteps
from pipelines.training.handlers import (
    AverageLoss,
    ClipGradients,
    FollowOptimizer,
    KeepCheckpoints,
    ReportProgress,
    SeedEpoch,
    StopEarly,
)
from pipelines.training.phases import Phase
from pipelines.training.state import NetworkState, Stateful
from pipelines.training.tracking import MlflowLog
from pipelines.training.watchdogs import Watchdogs, watch_phase
from transforms.errors import BundleError


@dataclass(frozen=True)
class EngineSettings:
    """What the engines of all phases of a run have in common.

    Attributes:
        device, inferer: of a training step.
        precision: from ``choose_precision``; fp16 trains with scaled gradients.
        clip_norm: largest total norm of the gradient.
        compiled: run the network through ``torch.compile``.
        validator: validates the averaged network; None = no validation cases.
        metrics: of the validator, by name.
        validation_interval: epochs.
        min_delta: what counts as an improvement of the validator's metric.
        colours: ``#rrggbb`` per label id, for the overlays.
        labels: name per label id, for the precision-recall curves.
        pictures: draws a case of the validation; None = as a segmentation.
        handlers: further ignite handlers of the bundle.
        acknowledge, thresholds: of the watchdogs, see ``watch_phase``.
    """

    device: torch.device
    inferer: Inferer
    precision: str
    clip_norm: float
    compiled: bool
    validator: SupervisedEvaluator | None
    metrics: Mapping[str, Metric]
    validation_interval: int
    min_delta: float
    colours: Mapping[int, str]
    labels: Mapping[int, str]
    pictures: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] | None
    handlers: Sequence[Any]
    acknowledge: Sequence[str] = ()
    thresholds: Sequence[str] = ()


@dataclass(frozen=True)
class PhaseEngine:
    """A trainer and what belongs to it.

    Attributes:
        trainer: MONAI's trainer with every handler attached.
        parts: by name, everything whose state a run must not lose and which is the same in every process.
        own: the same for what every process has of its own.
        keeper: of the phase's checkpoints.
        board, non_finite, bad_cases, watchdogs: the handlers of these names.
        stop_early: None where the phase never stops early.
    """

    trainer: FaultTolerantTrainer
    parts: dict[str, Stateful]
    own: dict[str, Stateful]
    keeper: KeepCheckpoints
    board: TensorBoardLog
    non_finite: NonFiniteSteps
    bad_cases: CountBadCases
    stop_early: StopEarly | None
    watchdogs: Watchdogs

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        state = self.trainer.state
        return state.epoch >= state.max_epochs or (self.stop_early is not None and self.stop_early.stopped)


class Validate(ValidationHandler):
    """MONAI's handler; where there are more processes than cases, one without a case adds nothing to the metrics."""

    def __init__(self, validator: SupervisedEvaluator, interval: int, metrics: Mapping[str, Metric]) -> None:
        super().__init__(interval=interval, validator=validator)
        self.metrics = dict(metrics)

    def __call__(self, engine: Engine) -> None:
        assert self.validator is not None
        if len(self.validator.data_loader):
            super().__call__(engine)
            return
        self.validator.state.epoch = engine.state.epoch
        for name, metric in self.metrics.items():  # the others wait for this process's share of the sums
            metric.reset()
            metric.completed(self.validator, name)


def phase_engine(
    phase: Phase,
    number: int,
    settings: EngineSettings,
    *,
    network: torch.nn.Module,
    average: AveragedModel,
    loss: torch.nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    checkpoints: Path,
    tensorboard: Path,
    batches: Path,
    header: Mapping[str, Any],
    mlflow: MlflowLog | None = None,
) -> PhaseEngine:
    """Return the engine of one phase: schedule, clipping, average, validation, checkpoints, log.

    Args:
        phase: what learns, how long.
        number: of the phase in its run, from 0.
        settings: of the run.
        average: ``averaged_network(network, decay)``; validated and saved in place of the network.
        loss: on logits, with ``last_terms`` for the log.
        loader: of ``patch_loader``.
        checkpoints: folder of ``best`` and ``last``.
        tensorboard: folder of the log.
        batches: folder for batches whose loss is not finite.
        header: what the weights' header says besides epoch and metric (must hold the ``contract``).
        mlflow: a second log, of the whole run; None = TensorBoard alone.
    """
    validator = settings.validator
    keeper = KeepCheckpoints(checkpoints, average.module, dict(header), validator, settings.min_delta)
    non_finite = NonFiniteSteps(batches, network, header)
    losses = AverageLoss()
    bad_cases = CountBadCases()
    parts: dict[str, Stateful] = {
        "network": NetworkState(network),
        "average": NetworkState(average),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "keeper": keeper,
        "non_finite": non_finite,
    }

    def rates() -> dict[str, float]:
        return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}

    standard: list[Any] = [
        SeedEpoch(loader.dataset, number),
        bad_cases,
        non_finite,
        ClipGradients(settings.clip_norm, non_finite),
        FollowOptimizer(scheduler, network, average),
        losses,
    ]
    if validator is not None:
        standard.append(Validate(validator, settings.validation_interval, settings.metrics))
    standard.append(keeper)
    board = TensorBoardLog(
        tensorboard,
        rates,
        validator,
        settings.colours,
        settings.labels,
        pictures=settings.pictures,
        active=is_main_process(),
    )
    parts["board"] = board
    standard += [board, ReportProgress(validator, rates)]
    if mlflow is not None:
        parts["mlflow"] = mlflow
        standard.append(mlflow)
    stop_early = None
    if phase.patience and validator is not None:
        first = max(phase.warmup_epochs, -(-phase.max_epochs // 4))
        stop_early = StopEarly(keeper, phase.patience, first)
        parts["stop_early"] = stop_early
        standard.append(stop_early)
    watchdogs = watch_phase(
        phase,
        validator=validator,
        metric=settings.metrics.get(validator.state.key_metric_name) if validator is not None else None,
        labels=settings.labels,
        keeper=keeper,
        non_finite=non_finite,
        optimizer=optimizer,
        scheduler=scheduler,
        stop_early=stop_early,
        board=board,
        acknowledge=settings.acknowledge,
        thresholds=settings.thresholds,
    )
    parts["watchdogs"] = watchdogs
    standard.append(watchdogs)
    trainer = FaultTolerantTrainer(
        device=settings.device,
        max_epochs=phase.max_epochs,
        train_data_loader=loader,
        network=shared_network(network),
        optimizer=optimizer,
        loss_function=loss,
        inferer=settings.inferer,
        accumulation_steps=phase.accumulation_steps,
        optim_set_to_none=True,
        amp=settings.precision == "fp16",
        compile=settings.compiled,
        decollate=False,
        train_handlers=[*standard, *settings.handlers],
    )
    parts["scaler"] = ScalerState(trainer)
    own: dict[str, Stateful] = {"losses": losses, "bad_cases": bad_cases}
    return PhaseEngine(trainer, parts, own, keeper, board, non_finite, bad_cases, stop_early, watchdogs)


class ScalerState:
    """The gradient scaler of fp16, which MONAI's trainer makes anew when it starts."""

    def __init__(self, trainer: FaultTolerantTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return scale and growth, or nothing without fp16."""
        scaler = getattr(self.trainer, "scaler", None)
        return {} if scaler is None else dict(scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back as soon as there is a scaler."""
        if state:
            self.trainer.add_event_handler(Events.STARTED, lambda e: e.scaler.load_state_dict(dict(state)))


def shared_network(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network, in several processes wrapped so that they average their gradients."""
    if world_size() == 1:
        return network
    device = local_device()
    devices = None if device is None else [device]
    # else it groups the gradients anew after its first step: a resumed run would add them up in another order
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=True)


def validator_or_none(evaluator: Engine, dataset: Any) -> Engine | None:
    """Return the evaluator, or None where the cohort has no validation case (then the last weights are the result)."""
    return evaluator if dataset.n_cases else None


def training_inferer(precision: str) -> Inferer:
    """Return the inferer of a training step, one forward pass; fp16 is left to the trainer, which scales gradients."""
    if precision == "fp16":
        return SimpleInferer()
    return AutocastInferer(precision)


def device_of(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is this process's GPU, or the CPU where there is none.

    Raises:
        BundleError: the device is not on this machine.
    """
    if name == "auto":
        return local_device() or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise BundleError(
            f"device {name!r}", f"not available here: {str(problem).splitlines()[0]}", "use --device_name cpu or auto"
        ) from problem
    return device
