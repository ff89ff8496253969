"""Watch a run for failures that nothing else would show: what the watchers find is said, written down, or stops it.

A finding is said once when it appears (log, TensorBoard) and stands in ``record.json`` with its first and last epoch.
An error that nobody has acknowledged ends the run after the state is saved: going on would be pointless.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle
from ignite.metrics import Metric
from torch.optim.lr_scheduler import LRScheduler

from pipelines.preflight.battery import with_thresholds
from pipelines.preflight.finding import Finding
from pipelines.preflight.watch import WATCHED, missing_artefacts, silent_curves
from pipelines.training.board import EVENT_FILES, TensorBoardLog
from pipelines.training.distributed import from_main_process, is_main_process
from pipelines.training.faults import NonFiniteSteps
from pipelines.training.fusion import ValidationFusion
from pipelines.training.handlers import KeepCheckpoints, StopEarly
from pipelines.training.phases import Phase
from pipelines.training.validation import ValidationDice
from pipelines.training.validation_watchers import WatchFusion, WatchValidation
from pipelines.training.watchers import (
    Limits,
    WatchBest,
    WatchData,
    Watcher,
    WatchFaults,
    WatchGap,
    WatchGradient,
    WatchLoss,
    WatchRates,
    WatchStopping,
)
from transforms.errors import BundleError, DataError

logger = logging.getLogger(__name__)

_RULES_AT_THE_END = ("R42",)


class Watchdogs:
    """Ask every watcher at the end of an epoch; say, keep and judge what they find.

    Args:
        watchers: in this order.
        phase: name of the phase, for the record.
        validator: that watchers listen to while the phase trains, or None.
        board: for the text of a finding; None = none.
        acknowledged: rule -> reason: such findings are reported, and never stop the run.
        unwatched: rule -> why it is not watched in this run.
    """

    def __init__(
        self,
        watchers: Sequence[Watcher],
        phase: str = "",
        validator: Engine | None = None,
        board: TensorBoardLog | None = None,
        acknowledged: Mapping[str, str] | None = None,
        unwatched: Mapping[str, str] | None = None,
    ) -> None:
        self.watchers = list(watchers)
        self.phase, self.validator, self.board = phase, validator, board
        self.acknowledged, self.unwatched = dict(acknowledged or {}), dict(unwatched or {})
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self.in_force: dict[str, list[tuple[str, str]]] = {}  # per watcher
        self._epoch = 0
        self._listening: list[RemovableEventHandle] = []

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after validation, checkpoints and log."""
        for watcher in self.watchers:
            watcher.attach(engine)
        engine.add_event_handler(Events.STARTED, lambda _: self._listen())
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._leave())

    def __call__(self, engine: Engine) -> None:
        judged = {type(watcher).__name__: watcher.judge(engine) for watcher in self.watchers}
        epoch = int(engine.state.epoch)
        for name, findings in from_main_process(judged).items():
            if findings is not None:
                self.take(name, findings, epoch)

    def take(self, name: str, findings: Sequence[Finding], epoch: int) -> None:
        """Take what a watcher has found in an epoch; what it no longer finds is over.

        Args:
            name: of the watcher.
            findings: all that are true now.
            epoch: of the training.
        """
        before = self.in_force.get(name, [])
        news: list[Finding] = []
        for finding in findings:
            key = (finding.rule, finding.what)
            if key in self.found:
                entry = self.found[key] | {"severity": finding.severity, "last_epoch": epoch}
                entry |= {"measured": finding.measured, "threshold": finding.threshold}
            else:
                epochs = {"phase": self.phase, "first_epoch": epoch, "last_epoch": epoch}
                entry = {**finding.as_json(), **epochs, "acknowledged": self.acknowledged.get(finding.rule)}
            if key not in before or self.found[key]["severity"] != finding.severity:
                news.append(finding)
            self.found[key] = entry
        self.in_force[name] = [(finding.rule, finding.what) for finding in findings]
        if news and is_main_process():
            self._say(news, epoch)

    def raise_if_stopping(self) -> None:
        """Raise the first error that is true now and that nobody has acknowledged.

        Raises:
            DataError, BundleError: by what has to change.
        """
        for key in (key for keys in self.in_force.values() for key in keys):
            entry = self.found[key]
            if entry["severity"] == "error" and entry["rule"] not in self.acknowledged:
                kind = DataError if entry["source"] == "data" else BundleError
                raise kind(
                    f"{entry['rule']}: {entry['what']}, since epoch {entry['first_epoch']}",
                    f"{entry['measured']}; expected {entry['threshold']}; likely cause: {entry['cause']}",
                    f"{entry['fix']}; the state is saved: if it is meant, resume with "
                    f"--acknowledge \"['{entry['rule']}: why']\"",
                )

    def at_the_end(self, more: Sequence[Finding], epoch: int) -> None:
        """Take what is wrong when the phase has ended.

        Args:
            more: what ``artefacts_at_the_end`` has found.
            epoch: the last one.
        """
        judged = {type(watcher).__name__: watcher.at_the_end() for watcher in self.watchers}
        for name, findings in from_main_process({**judged, "the end": list(more)}).items():
            if findings is not None:
                self.take(name, findings, epoch)

    def after_failure(self) -> list[dict[str, Any]]:
        """Return what was found, with what has just ended the run if that is a finding of a watcher."""
        for watcher in self.watchers:
            findings = watcher.at_failure()
            if findings:
                self.take(type(watcher).__name__, findings, self._epoch)
        if self.board is not None:
            self.board.close()  # the text of a finding has opened it once more
        return self.record()

    def record(self) -> list[dict[str, Any]]:
        """Return all that was found in this phase as JSON values."""
        return list(self.found.values())

    def state_dict(self) -> dict[str, Any]:
        """Return findings and histories."""
        histories = {type(watcher).__name__: watcher.state_dict() for watcher in self.watchers}
        return {"found": self.record(), "in_force": self.in_force, "watchers": histories}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; an acknowledgement given since then counts."""
        self.found = {
            (entry["rule"], entry["what"]): {**entry, "acknowledged": self.acknowledged.get(entry["rule"])}
            for entry in state["found"]
        }
        self.in_force = {name: [(rule, what) for rule, what in keys] for name, keys in state["in_force"].items()}
        for watcher in self.watchers:
            watcher.load_state_dict(state["watchers"][type(watcher).__name__])

    def _say(self, findings: Sequence[Finding], epoch: int) -> None:
        said: dict[str, list[str]] = {}
        for finding in findings:
            reason = self.acknowledged.get(finding.rule)
            text = (
                f"{finding.rule} {finding.severity}: {finding.what}; {finding.measured}, expected {finding.threshold}; "
                f"likely cause: {finding.cause}; {finding.fix}" + (f" (acknowledged: {reason})" if reason else "")
            )
            logger.warning("%s", text)
            said.setdefault(finding.rule, []).append(text)
        if self.board is not None and self.board.active:
            for rule, texts in said.items():
                self.board.writer.add_text(f"watchdogs/{rule}", "\n\n".join(texts), epoch)

    def _start_epoch(self, engine: Engine) -> None:
        self._epoch = int(engine.state.epoch)

    def _listen(self) -> None:
        """Listen to the validator: the phases of a run share it, and each has watchers of its own."""
        if self.validator is None:
            return
        for watcher in self.watchers:
            for event, handler in watcher.listen():
                self._listening.append(self.validator.add_event_handler(event, handler))

    def _leave(self) -> None:
        while self._listening:
            self._listening.pop().remove()


def watch_phase(
    phase: Phase,
    *,
    validator: Engine | None,
    metric: Metric | None,
    labels: Mapping[int, str],
    keeper: KeepCheckpoints,
    non_finite: NonFiniteSteps,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    stop_early: StopEarly | None,
    board: TensorBoardLog | None,
    acknowledge: Sequence[str] = (),
    thresholds: Sequence[str] = (),
) -> Watchdogs:
    """Return the watchdogs of a phase: all that its task and its validation have something for.

    Args:
        phase: that trains.
        validator: of the run, with ``metric`` as what selects the weights; None = no validation cases.
        labels: name per label id; empty where the task has no classes.
        keeper, non_finite, stop_early, board: handlers of the phase.
        optimizer, scheduler: of the phase.
        acknowledge: ``<rule>: <reason>`` each; those of rules that watch no run are left to the preflight.
        thresholds: ``<rule>.<limit>=<number>`` each; likewise.
    """
    limits = watch_limits(thresholds)
    unwatched = {"R44": "no instances are predicted"}
    watchers: list[Watcher] = [
        WatchFaults(non_finite, limits),
        WatchData(limits),
        WatchRates(phase, optimizer, scheduler, limits),
    ]
    validation: WatchValidation | None = None
    if validator is None:
        unwatched |= dict.fromkeys(("R31", "R32", "R34", "R36", "R37", "R38", "R39", "R43"), "no validation cases")
    else:
        fusion = WatchFusion(validator, limits) if isinstance(metric, ValidationFusion) else None
        validation = WatchValidation(phase, validator, metric, limits, fusion)
        watchers += [*([] if fusion is None else [fusion]), validation, WatchBest(keeper, validation.so_far, limits)]
        if isinstance(metric, ValidationDice):
            watchers.append(WatchGap(validation.so_far, limits))
        else:
            unwatched |= dict.fromkeys(("R31", "R36", "R39"), "the metric is no Dice")
        if stop_early is None:
            unwatched["R37"] = "the phase never stops early"
        else:
            watchers.append(WatchStopping(phase, stop_early, validation.so_far, limits))

    def learnt() -> bool:
        return validation is not None and validation.learnt()

    def dice() -> Mapping[str, float]:
        return {} if validation is None else validation.dice()

    watchers.append(WatchLoss(phase, limits, learnt))
    if labels:
        watchers.append(WatchGradient(labels, limits, dice))
    watched = {rule for watcher in watchers for rule in watcher.rules}
    for rule in WATCHED:
        if rule.id not in watched and rule.id not in _RULES_AT_THE_END:
            unwatched.setdefault(rule.id, "not for this task")
    return Watchdogs(watchers, phase.name, validator, board, acknowledged_rules(acknowledge), unwatched)


def artefacts_at_the_end(
    run: Path, keeper: KeepCheckpoints, board: TensorBoardLog, history: Sequence[Mapping[str, Any]], limits: Limits
) -> list[Finding]:
    """R42: return what a phase that has ended should have left behind and has not.

    Args:
        run: folder of the run.
        keeper, board: of the phase.
        history: one entry per epoch.
        limits: of ``watch_limits``.
    """
    if not is_main_process():
        return []
    events = sum(path.stat().st_size for path in board.folder.glob(EVENT_FILES))
    files = [keeper.folder / "last.safetensors"]
    files += [keeper.folder / "best.safetensors"] if keeper.best_epoch else []
    record = run / "record.json"
    of_bundle = record.is_file() and "command" in json.loads(record.read_text())  # which writes both at the start
    files += [run / "config.yaml"] if of_bundle else []
    present = {path.relative_to(run).as_posix(): path.is_file() and path.stat().st_size > 0 for path in files}
    return [
        *missing_artefacts({**present, "the log of TensorBoard": events > 0}),
        *silent_curves(history, limits["R42"]),
    ]


def watch_limits(thresholds: Sequence[str] = ()) -> dict[str, Mapping[str, float]]:
    """Return the limits by rule, with ``<rule>.<limit>=<number>`` texts in place of the defaults.

    Texts for other limits are the preflight's, which also refuses those that mean nothing.

    Raises:
        UsageError: no number.
    """
    own = {f"{rule.id}.{limit}" for rule in WATCHED for limit in rule.limits}
    mine = [text for text in thresholds if str(text).partition("=")[0].strip() in own]
    return {rule.id: rule.limits for rule in with_thresholds(WATCHED, mine)}


def acknowledged_rules(texts: Sequence[str]) -> dict[str, str]:
    """Return rule -> reason of ``<rule>: <reason>`` texts, for the rules that watch runs."""
    own = {rule.id for rule in WATCHED}
    pairs = (str(text).partition(":") for text in texts)
    return {rule.strip(): reason.strip() for rule, _, reason in pairs if rule.strip() in own and reason.strip()}
