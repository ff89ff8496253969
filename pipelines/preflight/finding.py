"""What a check has found: which rule, what was measured against which limit, the likely cause, and what to do.

The same finding is a row of a table, a refusal in three lines, and an entry of the run's record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warn"]
Source = Literal["data", "configuration"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong.

    Attributes:
        rule: id in the failure catalogue, e.g. ``R05``.
        severity: ``error`` stops the run, ``warn`` is reported and recorded.
        what: what is wrong, naming case, key, class or option.
        measured: the measured figure with its unit.
        threshold: what was expected of it.
        cause: the likely cause.
        fix: what a user can do.
        source: what has to change: ``data`` (exit code 3) or ``configuration`` (4).
        cases: case ids at fault, the worst first.
        evidence: further figures, JSON-able.
    """

    rule: str
    severity: Severity
    what: str
    measured: str
    threshold: str
    cause: str
    fix: str
    source: Source = "configuration"
    cases: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {**asdict(self), "cases": list(self.cases), "evidence": dict(self.evidence)}


def finding_from_json(raw: Mapping[str, Any]) -> Finding:
    """Return what ``as_json`` has written."""
    return Finding(**{**raw, "cases": tuple(raw["cases"])})


class CannotRun(Exception):  # noqa: N818 - an outcome of a rule, no error of the program
    """A rule lacks what it needs; the message says what. It then counts as not run, never as passed."""
