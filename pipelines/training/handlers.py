"""What happens around a training step: one small ignite handler per concern, each with an ``attach``.

The engine itself is MONAI's ``SupervisedTrainer``; ``pipelines.training.engines`` puts these together.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pipelines.progress import on_terminal
from pipelines.training.checkpoints import save_weights
from pipelines.training.distributed import from_every_process, is_main_process
from pipelines.training.faults import NonFiniteSteps
from transforms.errors import BundleError

logger = logging.getLogger(__name__)


def optimizer_steps_now(engine: Engine) -> bool:
    """Return whether MONAI's trainer steps the optimiser now: enough batches are accumulated, or the epoch ends."""
    local = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return local % engine.accumulation_steps == 0 or local == engine.state.epoch_length


class ClipGradients:
    """Scale the gradients down to a total norm of ``max_norm`` before every optimiser step.

    Args:
        max_norm: in the unit of the gradients.
        non_finite: what to do about a norm that is NaN or infinite. With scaled gradients (fp16) the scaler does it.
    """

    def __init__(self, max_norm: float, non_finite: NonFiniteSteps) -> None:
        if not max_norm > 0:
            raise BundleError(
                f"clip_norm {max_norm}", "gradients of norm 0 teach nothing", "take a positive number, or .inf for none"
            )
        self.max_norm = max_norm
        self.non_finite = non_finite

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if not optimizer_steps_now(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)
        if engine.scaler is None and not bool(torch.isfinite(norm)):  # the same in all processes: gradients are shared
            self.non_finite.leave_out(engine, "the gradient's norm", {"gradient norm": float(norm)})


class FollowOptimizer:
    """After every optimiser step: move the learning rate and the averaged weights."""

    def __init__(self, scheduler: LRScheduler, network: torch.nn.Module, average: AveragedModel) -> None:
        self.scheduler = scheduler
        self.network = network  # the plain one: the engine's may be wrapped for several processes, or compiled
        self.average = average

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if optimizer_steps_now(engine):
            self.average.update_parameters(self.network)
            self.scheduler.step()


class SeedEpoch:
    """Tell the data set which epoch of which phase it draws its samples for."""

    def __init__(self, dataset: Any, phase: int = 0) -> None:
        self.dataset = dataset
        self.phase = phase

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.dataset.set_epoch(e.state.epoch, self.phase))


class KeepCheckpoints:
    """Write ``last`` after every epoch and ``best`` where the validated metric improved; NaN is never an improvement.

    Args:
        folder: the run's ``checkpoints``.
        network: what is saved (the averaged weights).
        header: what goes into the file's header besides epoch, metric and history; must hold ``contract``.
        validator: the evaluator whose key metric decides, or None (then there is no ``best``).
        min_delta: how much better counts as better.
    """

    def __init__(
        self,
        folder: Path,
        network: torch.nn.Module,
        header: dict[str, Any],
        validator: Engine | None = None,
        min_delta: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self.network = network
        self.header = header
        self.validator = validator
        self.min_delta = min_delta
        self.best_metric: float | None = None
        self.best_epoch = 0
        self.history: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after the handler that runs the validation."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = int(engine.state.epoch)
        terms = {f"loss/{k}": v for k, v in engine.state.metrics.items() if k != "loss" and "/" not in k}
        entry: dict[str, Any] = {"epoch": epoch, "loss": engine.state.metrics.get("loss"), **terms}
        metric = validated_metric(self.validator, epoch)
        if self.validator is not None and metric is not None:
            entry |= {name: finite_or_none(float(value)) for name, value in self.validator.state.metrics.items()}
        self.history.append(entry)
        if is_better(metric, self.best_metric, self.min_delta):
            self.best_metric, self.best_epoch = metric, epoch
            self._save("best", epoch, metric)
        self._save("last", epoch, metric)

    def save_last(self, epoch: int) -> None:
        """Write ``last`` in the middle of an epoch."""
        self._save("last", epoch, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the best so far and the history."""
        return {"best_metric": self.best_metric, "best_epoch": self.best_epoch, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best_metric, self.best_epoch = state["best_metric"], int(state["best_epoch"])
        self.history = list(state["history"])

    def _save(self, name: str, epoch: int, metric: float | None) -> None:
        shown = None if metric is None else finite_or_none(metric)  # JSON has no NaN
        if not is_main_process():
            return
        header = {**self.header, "epoch": epoch, "metric": shown, "best_metric": self.best_metric}
        save_weights(self.network, {**header, "history": self.history}, self.folder / f"{name}.safetensors")


class StopEarly:
    """End the run when the validated metric has not improved for ``patience`` epochs.

    It counts only from ``first_epoch`` on: a network that is still warming up stands still for a while and then learns.
    It judges only in epochs with a validation: in between nothing could have improved.
    """

    def __init__(self, keeper: KeepCheckpoints, patience: int, first_epoch: int) -> None:
        if patience < 1:
            raise BundleError(f"early_stopping_patience {patience}", "at least 1 epoch expected", "correct it")
        self.keeper = keeper
        self.patience = patience
        self.first_epoch = first_epoch
        self.stopped = False

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after ``KeepCheckpoints``."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        since = engine.state.epoch - max(self.keeper.best_epoch, self.first_epoch)
        if since >= self.patience and validated_metric(self.keeper.validator, engine.state.epoch) is not None:
            logger.info(
                "stopping after epoch %d: no improvement since epoch %d (patience %d)",
                engine.state.epoch,
                self.keeper.best_epoch,
                self.patience,
            )
            self.stopped = True
            engine.terminate()

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has ended the run."""
        return {"stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.stopped = bool(state["stopped"])


class AverageLoss:
    """Mean of the loss and of each of its terms over an epoch (and over processes), in ``engine.state.metrics``.

    Steps that were left out because their loss is not finite do not count.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, before whatever reports the metrics."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compute)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the epoch so far."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on adding to them."""
        self._sums, self._count = dict(state["sums"]), int(state["count"])

    def _reset(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length == 0:  # else a run goes on in the middle of its epoch
            self._sums, self._count = {}, 0

    def _add(self, engine: Engine) -> None:
        terms = {"loss": engine.state.output["loss"].detach(), **getattr(engine.loss_function, "last_terms", {})}
        if not bool(torch.isfinite(terms["loss"])):
            return
        for name, value in terms.items():
            before = self._sums.get(name)
            self._sums[name] = value.clone() if before is None else before.to(value.device) + value
        self._count += 1

    def _compute(self, engine: Engine) -> None:
        # every process takes part, also one whose steps were all left out
        shares = from_every_process(({name: float(total) for name, total in self._sums.items()}, self._count))
        count = sum(number for _, number in shares)
        for name in sorted({name for sums, _ in shares for name in sums}):
            engine.state.metrics[name] = sum(sums.get(name, 0.0) for sums, _ in shares) / count


class ReportProgress:
    """A progress bar per epoch on a terminal, one plain line per epoch in the log."""

    def __init__(self, validator: Engine | None = None, rates: Callable[[], Mapping[str, float]] | None = None) -> None:
        self.validator = validator
        self.rates = rates
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, as the last handler."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._started = time.monotonic()
        if on_terminal() and is_main_process():
            name = f"epoch {engine.state.epoch}/{engine.state.max_epochs}"
            done = engine.state.iteration % engine.state.epoch_length
            self._bar = tqdm(total=engine.state.epoch_length, initial=done, desc=name, unit="step", leave=False)

    def _advance(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{engine.state.output['loss'].item():.4f}", refresh=False)
            self._bar.update()

    def _finish(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        parts = [f"epoch {engine.state.epoch}/{engine.state.max_epochs}"]
        parts += _figures(engine)
        if self.rates is not None:
            parts.append("lr " + ", ".join(f"{rate:.2e}" for rate in self.rates().values()))
        if validated_metric(self.validator, engine.state.epoch) is not None and self.validator is not None:
            parts += _figures(self.validator)
        logger.info("%s, %.1f s", "  ".join(parts), time.monotonic() - self._started)


def _figures(engine: Engine) -> list[str]:
    """Return the metrics of an engine for one line of a log; counts and single heads are left to TensorBoard."""
    shown = {k: float(v) for k, v in engine.state.metrics.items() if not k.startswith("n_") and "/" not in k}
    return [f"{name} {value:.4f}" for name, value in sorted(shown.items())]


def validated_metric(validator: Engine | None, epoch: int) -> float | None:
    """Return the key metric if the validator ran in this epoch of training, else None."""
    if validator is None or validator.state.epoch != epoch or not validator.state.metrics:
        return None
    return float(validator.state.metrics[validator.state.key_metric_name])


def finite_or_none(value: float) -> float | None:
    """Return ``value``, or None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def is_better(metric: float | None, best: float | None, min_delta: float = 0.0) -> bool:
    """Return whether ``metric`` improves on ``best``; None and NaN never do, anything finite improves on None."""
    if metric is None or not math.isfinite(metric):
        return False
    return best is None or metric > best + min_delta
