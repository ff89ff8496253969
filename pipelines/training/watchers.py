"""What a run shows while it trains, collected for the rules of ``pipelines.preflight.watch``: one watcher per concern.

A watcher listens to the engines, keeps a history, and judges it at the end of an epoch. Where several processes train,
all of them judge together; ``watchdogs.py`` takes what the main process has found. Here are the watchers of the
training; those of the validation stand in ``validation_watchers.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor
from torch.optim.lr_scheduler import LRScheduler

from pipelines.preflight.finding import Finding
from pipelines.preflight.watch import (
    Validated,
    best_weights,
    data_wait,
    early_stopping,
    followed_schedule,
    non_finite_steps,
    not_learning,
    overfitting,
    starved_classes,
)
from pipelines.preflight.watch.histories import BACKGROUND
from pipelines.training.checkpoints import read_header
from pipelines.training.distributed import is_main_process
from pipelines.training.faults import NON_FINITE_STEPS_ALLOWED, NonFiniteSteps
from pipelines.training.handlers import KeepCheckpoints, StopEarly, optimizer_steps_now
from pipelines.training.phases import Phase
from pipelines.training.schedule import learning_rate_factor
from transforms.errors import FiducialError

Limits = Mapping[str, Mapping[str, float]]
Listen = Iterable[tuple[Any, Callable[[Engine], None]]]
GRADIENT_EVERY = 10  # steps


class Watcher:
    """A concern of the watchdogs. This one collects nothing, keeps nothing and never judges."""

    rules: tuple[str, ...] = ()

    def attach(self, engine: Engine) -> None:
        """Register on the trainer what collects during training."""

    def listen(self) -> Listen:
        """Return events of the validator, and what collects then."""
        return ()

    def judge(self, engine: Engine) -> list[Finding] | None:
        """Return what is wrong now, at the end of an epoch; None = nothing new to judge."""
        return None

    def at_failure(self) -> list[Finding]:
        """Return what has just ended the run, if it is this watcher's concern."""
        return []

    def at_the_end(self) -> list[Finding] | None:
        """Return what is wrong when the phase has ended; None = nothing new."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class WatchGradient(Watcher):
    """R27: how the gradient is shared among the classes in the first steps, while none is learnt yet.

    Args:
        labels: name per label id, without the background.
        dice: returns the Dice per label name of the newest validation.
    """

    rules = ("R27",)

    def __init__(self, labels: Mapping[int, str], limits: Limits, dice: Callable[[], Mapping[str, float]]) -> None:
        self.names = {0: BACKGROUND, **labels}
        self.limits, self.dice = limits["R27"], dice
        self.sums: torch.Tensor | list[list[float]] = [[0.0] * len(self.names)] * 2  # shares, voxels
        self.measured = 0

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._hook)

    def judge(self, engine: Engine) -> list[Finding] | None:
        """Judge once the first steps are over."""
        steps = self.measured * GRADIENT_EVERY
        if steps < self.limits["steps"]:
            return None
        shares, voxels = self._numbers()
        of_class = zip(self.names.values(), shares, voxels, strict=True)
        occurred = {name: share / self.measured for name, share, number in of_class if number}
        return starved_classes(occurred, steps, self.limits, self.dice())

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"sums": self._numbers(), "measured": self.measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on adding to them."""
        self.sums, self.measured = state["sums"], int(state["measured"])

    def _numbers(self) -> list[list[float]]:
        """Return the sums, from wherever they are added up: asking a GPU in every step would make it wait."""
        return self.sums.tolist() if isinstance(self.sums, torch.Tensor) else self.sums

    def _hook(self, engine: Any) -> None:
        output = engine.state.output
        enough = self.measured * GRADIENT_EVERY >= self.limits["steps"]
        if enough or (engine.state.iteration - 1) % GRADIENT_EVERY:
            return
        logits = output["pred"] if isinstance(output["pred"], torch.Tensor) else output["pred"][0]
        label = convert_to_tensor(output["label"])
        stacked = logits.ndim == label.ndim + 1  # the heads of a DynUNet, the main one first
        if not logits.requires_grad or label.shape[1] != 1 or logits.shape[3 if stacked else 2 :] != label.shape[2:]:
            return

        def add(gradient: torch.Tensor) -> None:
            size = convert_to_tensor(gradient[:, 0] if stacked else gradient).detach().abs().sum(1, keepdim=True)
            of_class = [label == value for value in self.names]
            parts = torch.stack([(size * mask).sum() for mask in of_class]).double()
            share = parts / parts.sum()
            if bool(torch.isfinite(share).all()):
                now = torch.stack([share, torch.stack([mask.sum() for mask in of_class]).double()])
                self.sums = torch.as_tensor(self.sums, dtype=torch.float64, device=now.device) + now
                self.measured += 1

        logits.register_hook(add)


class WatchFaults(Watcher):
    """R30: steps that are not finite, and steps that the gradient scaler of fp16 leaves out."""

    rules = ("R30",)

    def __init__(self, non_finite: NonFiniteSteps, limits: Limits) -> None:
        self.non_finite, self.limits = non_finite, limits["R30"]
        self.skips = self.steps = self._iteration = 0
        self._scale: float | None = None

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge all steps so far."""
        return self._judged(int(engine.state.iteration))

    def at_failure(self) -> list[Finding]:
        """Judge the steps up to the one that has ended the run."""
        return self._judged(self._iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skips": self.skips, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.skips, self.steps = int(state["skips"]), int(state["steps"])

    def _judged(self, iteration: int) -> list[Finding]:
        left_out = self.non_finite.count
        return non_finite_steps(left_out, iteration, self.limits, NON_FINITE_STEPS_ALLOWED, self.skips, self.steps)

    def _start(self, engine: Engine) -> None:
        self._iteration = int(engine.state.iteration)

    def _step(self, engine: Any) -> None:
        scaler = getattr(engine, "scaler", None)
        if scaler is None or not optimizer_steps_now(engine):
            return
        scale = float(scaler.get_scale())
        self.steps += 1
        self.skips += self._scale is not None and scale < self._scale
        self._scale = scale


class WatchLoss(Watcher):
    """R35: whether the loss falls.

    Args:
        phase: that trains.
        learnt: returns whether the validation says that the network has learnt.
    """

    rules = ("R35",)

    def __init__(self, phase: Phase, limits: Limits, learnt: Callable[[], bool]) -> None:
        self.phase, self.limits, self.learnt = phase, limits["R35"], learnt
        self.losses: list[tuple[int, float]] = []
        self.noise: list[tuple[int, float]] = []

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge the epochs so far."""
        for name, values in (("loss", self.losses), ("noise_mse", self.noise)):
            value = engine.state.metrics.get(name)
            if value is not None and math.isfinite(value):
                values.append((int(engine.state.epoch), float(value)))
        return not_learning(self.losses, self.phase.warmup_epochs, self.limits, self.learnt(), self.noise)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses per epoch."""
        return {"losses": self.losses, "noise": self.noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.losses = [(int(epoch), float(value)) for epoch, value in state["losses"]]
        self.noise = [(int(epoch), float(value)) for epoch, value in state["noise"]]


class WatchGap(Watcher):
    """R36: Dice of the training against Dice of the validation; the training's is read from its loss.

    Args:
        validations: returns the history of the validations.
    """

    rules = ("R36",)

    def __init__(self, validations: Callable[[], Sequence[Validated]], limits: Limits) -> None:
        self.validations, self.limits = validations, limits["R36"]
        self.training: list[tuple[int, float]] = []

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge the epochs so far."""
        dice = dice_of_terms(engine.state.metrics)
        if dice is not None:
            self.training.append((int(engine.state.epoch), dice))
        return overfitting(self.training, [(each.epoch, each.metric) for each in self.validations()], self.limits)

    def state_dict(self) -> dict[str, Any]:
        """Return the Dice of the training per epoch."""
        return {"training": self.training}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.training = [(int(epoch), float(value)) for epoch, value in state["training"]]


class WatchStopping(Watcher):
    """R37: whether early stopping waits long enough for this training."""

    rules = ("R37",)

    def __init__(self, phase: Phase, stop: StopEarly, validations: Callable[[], Sequence[Validated]], limits: Limits):
        self.phase, self.stop, self.validations, self.limits = phase, stop, validations, limits["R37"]

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge the validations so far."""
        metric = [(each.epoch, each.metric) for each in self.validations()]
        first, last = self.stop.first_epoch, self.phase.max_epochs
        return early_stopping(metric, self.stop.patience, first, last, self.limits, self.stop.stopped)


class WatchBest(Watcher):
    """R38: whether the file of the best weights is what the history says."""

    rules = ("R38",)

    def __init__(self, keeper: KeepCheckpoints, validations: Callable[[], Sequence[Validated]], limits: Limits) -> None:
        self.keeper, self.validations, self.limits = keeper, validations, limits["R38"]
        self._seen: tuple[int, int, int] | None = None
        self._changed_in: int | None = None

    def judge(self, engine: Engine) -> list[Finding] | None:
        """Read the header of the file; the main process has written it."""
        return self._judged(int(engine.state.epoch))

    def at_the_end(self) -> list[Finding] | None:
        """Read it again: handlers that come later may have changed the file."""
        return self._judged(None)

    def _judged(self, epoch: int | None) -> list[Finding] | None:
        metric = [(each.epoch, each.metric) for each in self.validations()]
        if not is_main_process() or not metric:
            return None
        path = self.keeper.folder / "best.safetensors"
        stored = None
        if path.is_file():
            status = path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._seen is not None and seen != self._seen:
                self._changed_in = metric[-1][0] if epoch is None else epoch
            self._seen = seen
            stored = _epoch_and_metric(path)
        if epoch is not None and stored is not None and stored[0] > epoch:
            return None  # a life of the run that was killed has come further than this one yet
        return best_weights(stored, metric, self.limits, self.keeper.min_delta, self._changed_in)


class WatchData(Watcher):
    """R40: how long a step waits for its batch. Times are not part of a run's state: they never repeat."""

    rules = ("R40",)

    def __init__(self, limits: Limits) -> None:
        self.limits = limits["R40"]
        self._forget()

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self._forget())
        engine.add_event_handler(Events.GET_BATCH_STARTED, lambda _: self._ask())
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda _: self._get())

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge the epoch. Its first batch, for which workers start, does not count."""
        return data_wait(self.waited, self.whole, self.limits)

    def _forget(self) -> None:
        self.waited = self.whole = 0.0
        self._asked: float | None = None
        self._got: float | None = None

    def _ask(self) -> None:
        self._asked = time.monotonic()

    def _get(self) -> None:
        now = time.monotonic()
        if self._got is not None and self._asked is not None:
            self.waited += now - self._asked
            self.whole += now - self._got
        self._got = now


class WatchRates(Watcher):
    """R41: whether the schedule and the rates are those of the phase."""

    rules = ("R41",)

    def __init__(self, phase: Phase, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, limits: Limits) -> None:
        self.phase, self.optimizer, self.scheduler, self.limits = phase, optimizer, scheduler, limits["R41"]

    def judge(self, engine: Engine) -> list[Finding]:
        """Judge the rates now in force."""
        phase, per_epoch = self.phase, self.phase.optimizer_steps_per_epoch
        done = per_epoch * int(engine.state.epoch)
        whole, warmup = per_epoch * phase.max_epochs, per_epoch * phase.warmup_epochs
        factor = learning_rate_factor(done, whole, warmup, phase.decay_power)
        rates = {
            str(group["name"]): (float(group["lr"]), factor * phase.rates[group["name"]])
            for group in self.optimizer.param_groups
        }
        return followed_schedule(int(self.scheduler.last_epoch), done, rates, self.limits)


def dice_of_terms(terms: Mapping[str, float]) -> float | None:
    """Return the mean soft Dice that the terms of a loss say, of the main head; None where no term is a Dice."""
    for prefix in ("main_head/", ""):
        dice, log_cosh = terms.get(f"{prefix}dice"), terms.get(f"{prefix}log_cosh_dice")
        if dice is not None:
            return 1 - float(dice)
        if log_cosh is not None:  # log cosh(1 - Dice) of the mean is nearly the mean
            return 1 - math.acosh(math.exp(max(0.0, float(log_cosh))))
    return None


def _epoch_and_metric(path: Path) -> tuple[int, float] | None:
    try:
        header = read_header(path)
        return int(header["epoch"]), float(header["metric"])
    except (FiducialError, KeyError, TypeError):
        return None
