"""What came of a phase and of the whole run: the figures that ``record.json``, the log and TensorBoard show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.preflight.watch import took_steps
from pipelines.training.distributed import from_every_process
from pipelines.training.engines import PhaseEngine
from transforms.errors import BundleError

FIGURES = ("best_metric", "best_epoch", "epochs", "steps", "minutes")


def phase_outcome(name: str, engine: PhaseEngine, validated: bool) -> dict[str, Any]:
    """Return the outcome of a phase that has ended; every process of the run takes part.

    Args:
        name: of the phase.
        engine: of the phase, trained.
        validated: whether the run has validation cases.

    Raises:
        BundleError: the phase took no step, or its weights were never worth keeping.
    """
    state, keeper = engine.trainer.state, engine.keeper
    for finding in took_steps(name, int(state.iteration)):
        raise BundleError(f"{finding.rule}: {finding.what}", finding.measured, finding.fix)
    if validated and not keeper.best_epoch:
        raise BundleError(
            f"phase {name}: no validation was worth keeping",
            f"the metric was never a number in {state.epoch} epochs, or val_interval is longer than the phase",
            "look at the validation cases; shorten val_interval",
        )
    bad_cases: Counter[str] = sum(from_every_process(engine.bad_cases.counts), Counter())
    return {
        "phase": name,
        "epochs": int(state.epoch),
        "steps": int(state.iteration),
        "best_metric": keeper.best_metric,
        "best_epoch": keeper.best_epoch or None,
        "skipped_steps": engine.non_finite.count,
        "bad_cases": bad_cases,
        "history": keeper.history,
    }


def outcome_line(outcome: Mapping[str, Any], minutes: float) -> str:
    """Return the outcome of a phase as one line of the log."""
    best = "no validation"
    if outcome["best_epoch"]:
        best = f"best validation {outcome['best_metric']:.4f} in epoch {outcome['best_epoch']}"
    return f"{outcome['phase']}: trained {outcome['epochs']} epochs in {minutes:.1f} min: {best}"


def run_outcome(phases: Sequence[Mapping[str, Any]], minutes: float) -> dict[str, Any]:
    """Return the outcome of a run: that of its last phase, with the others beside it; findings stand elsewhere."""
    own = [{key: value for key, value in phase.items() if key != "findings"} for phase in phases]
    outcome = {**own[-1], "minutes": round(minutes, 3)}
    return {**outcome, "phases": own[:-1]} if len(own) > 1 else outcome


def watch_record(
    phases: Sequence[Mapping[str, Any]], acknowledged: Mapping[str, str], unwatched: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the watchdogs of a run have found, phase after phase, for its record.

    Args:
        phases: per phase what ``Watchdogs.record`` says, at ``findings``.
        acknowledged: rule -> reason.
        unwatched: rule -> why nothing watched it.
    """
    findings = [finding for phase in phases for finding in phase["findings"]]
    return {"findings": findings, "acknowledged": dict(acknowledged), "not_watched": dict(unwatched)}


def figures_of(outcome: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a run's outcome that a table of runs compares."""
    return {key: float(outcome[key]) for key in FIGURES if outcome[key] is not None}
