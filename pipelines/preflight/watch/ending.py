"""Is what a run leaves behind what it says it is? Rules on the best weights, the files and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.preflight.finding import Finding

Limits = Mapping[str, float]
COUNTS = "n_"  # a count is rightly 0 in every epoch


def best_weights(
    stored: tuple[int, float] | None,
    metric: Sequence[tuple[int, float]],
    limits: Limits,
    min_delta: float = 0.0,
    written_in: int | None = None,
) -> list[Finding]:
    """R38: the best weights are those of the best validation, and were written then alone.

    Args:
        stored: (epoch, metric) in the header of the file; None = there is no file.
        metric: (epoch, metric) of every validation.
        min_delta: what counts as an improvement: the stored metric may be so far from the best.
        written_in: the epoch in which the file was last seen to change, if that is known.
    """
    if not metric:
        return []
    epoch, best = max(metric, key=lambda entry: entry[1])
    tolerance = min_delta + limits["difference"]
    what, measured, expected = "", "", f"{best:.4f} of epoch {epoch}"
    if stored is None:
        what, measured = "there are no best weights", "no file"
    elif best - stored[1] > tolerance:
        what = "the best weights are not those of the best validation"
        measured = f"{stored[1]:.4f} of epoch {stored[0]}"
    elif all(at != stored[0] or abs(value - stored[1]) > limits["difference"] for at, value in metric):
        what, measured = "the best weights are of no validation", f"{stored[1]:.4f} of epoch {stored[0]}"
        expected = "metric and epoch of a validation of this run"
    elif written_in is not None and written_in != stored[0]:
        what, measured = "the best weights were rewritten without an improvement", f"written in epoch {written_in}"
        expected = f"not changed since epoch {stored[0]}"
    if not what:
        return []
    return [
        Finding(
            "R38", "error", what, measured, expected,
            "something else than the training writes into the run's checkpoints",
            "do not change the checkpoints of a run; start a new one",
        )
    ]  # fmt: skip


def missing_artefacts(present: Mapping[str, bool]) -> list[Finding]:
    """R42: everything that a run declares to leave behind is there.

    Args:
        present: by name, whether the file exists and is not empty.
    """
    return [
        Finding(
            "R42", "warn", f"{name} is missing", "no file, or an empty one", "a file",
            "it was deleted, moved, or never written", "look for an earlier error in the log of the run",
        )
        for name, there in present.items()
        if not there
    ]  # fmt: skip


def silent_curves(history: Sequence[Mapping[str, Any]], limits: Limits) -> list[Finding]:
    """R42: a curve that is 0 in every epoch, or that has no value in any.

    Args:
        history: one entry per epoch, name -> value or None; names of counts begin with ``n_``.
    """
    findings = []
    for name in sorted({name for entry in history for name in entry if not name.startswith(COUNTS)} - {"epoch"}):
        entries = [entry[name] for entry in history if name in entry]
        values = [float(value) for value in entries if value is not None]
        if len(entries) < limits["epochs"] or any(value != 0 for value in values):
            continue
        findings.append(
            Finding(
                "R42", "warn", f"the curve {name} says nothing",
                f"{'0' if values else 'no number'} in all of {len(entries)} epochs", "values that change",
                "a term without effect, or a metric that is never computed",
                f"find out why {name} has no value, or take it out",
            )
        )  # fmt: skip
    return findings
