"""Run the rules on a run that is about to start; each passed, found, did not run (and why), or is not for this task.

The same battery serves a report, a refusal and the run's record. A rule that could not run never counts as passed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pipelines.names import nearest
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.watch import WATCHED
from pipelines.progress import progress
from transforms.errors import BundleError, DataError, FiducialError, UsageError, find_error

logger = logging.getLogger(__name__)

Status = Literal["passed", "found", "not run", "not for this task"]


@dataclass(frozen=True)
class Outcome:
    """What a check of a rule came to; ``reason`` says why it did not run."""

    rule: str
    name: str
    status: Status
    findings: tuple[Finding, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Battery:
    """All outcomes, and which findings the user has acknowledged: rule id -> reason."""

    outcomes: tuple[Outcome, ...]
    acknowledged: Mapping[str, str]

    @property
    def findings(self) -> list[Finding]:
        """All findings, errors first, then by rule."""
        found = [finding for outcome in self.outcomes for finding in outcome.findings]
        return sorted(found, key=lambda finding: (finding.severity != "error", finding.rule))

    @property
    def stopping(self) -> list[Finding]:
        """Errors that nobody has acknowledged."""
        return [f for f in self.findings if f.severity == "error" and f.rule not in self.acknowledged]

    def record(self) -> dict[str, Any]:
        """Return the battery as JSON values, for the run's record."""
        counts: dict[str, int] = {}
        for outcome in self.outcomes:
            counts[outcome.status] = counts.get(outcome.status, 0) + 1
        return {
            "checks": counts,
            "findings": [finding.as_json() for finding in self.findings],
            "not_run": [{"rule": o.rule, "name": o.name, "why": o.reason} for o in self.outcomes if o.reason],
            "acknowledged": dict(self.acknowledged),
        }

    def raise_if_stopping(self) -> None:
        """Raise the first error that nobody has acknowledged.

        Raises:
            DataError, BundleError: by what has to change.
        """
        if not self.stopping:
            return
        first, *others = self.stopping
        also = f" (also: {', '.join(sorted({f.rule for f in others} - {first.rule}))})" if others else ""
        kind = DataError if first.source == "data" else BundleError
        raise kind(
            f"{first.rule}: {first.what}{_cases(first)}{also}",
            f"{first.measured}; expected {first.threshold}; likely cause: {first.cause}",
            f"{first.fix.rstrip('.')}; if it is meant, --acknowledge \"['{first.rule}: why']\"",
        )


def run_battery(
    rules: Sequence[Rule],
    inspection: Inspection,
    acknowledge: Sequence[str] = (),
    thresholds: Sequence[str] = (),
) -> Battery:
    """Run every rule, each in a state of the random generators of its own, which is put back afterwards.

    Args:
        rules: to run.
        inspection: what they look at.
        acknowledge: ``<rule>: <reason>`` each; also of the rules that watch a run.
        thresholds: ``<rule>.<limit>=<number>`` each; likewise.

    Raises:
        UsageError: an acknowledgement or threshold that names no rule, or says no reason or number.
    """
    accepted = acknowledgements(acknowledge, (*rules, *WATCHED))
    adjusted = with_thresholds(rules, thresholds, further=WATCHED)
    with _random_generators_kept():
        outcomes = tuple(_outcome(rule, inspection) for rule in progress(adjusted, "preflight"))
    battery = Battery(outcomes, accepted)
    for finding in battery.findings:
        state = f" (acknowledged: {accepted[finding.rule]})" if finding.rule in accepted else ""
        logger.warning(
            "%s %s: %s%s; %s, expected %s; %s%s",
            finding.rule, finding.severity, finding.what, _cases(finding), finding.measured, finding.threshold,
            finding.fix, state,
        )  # fmt: skip
    return battery


def acknowledgements(texts: Sequence[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Return rule id -> reason of ``<rule>: <reason>`` texts.

    Raises:
        UsageError: no such rule, or no reason.
    """
    known = sorted({rule.id for rule in rules})
    accepted = {}
    for text in texts:
        rule, _, reason = str(text).partition(":")
        if rule.strip() not in known:
            raise UsageError(
                f"acknowledge {text!r}", f"there is no rule {rule.strip()!r}", nearest(rule.strip(), known)
            )
        if not reason.strip():
            raise UsageError(f"acknowledge {text!r}", "it gives no reason", f"write '{rule.strip()}: why'")
        accepted[rule.strip()] = reason.strip()
    return accepted


def with_thresholds(rules: Sequence[Rule], texts: Sequence[str], further: Sequence[Rule] = ()) -> list[Rule]:
    """Return the rules with ``<rule>.<limit>=<number>`` texts in place of their defaults.

    Args:
        rules: to adjust.
        texts: of the user.
        further: rules that a text may mean as well, and that others adjust.

    Raises:
        UsageError: no such limit, or no number.
    """
    known = sorted({f"{rule.id}.{name}" for rule in (*rules, *further) for name in rule.limits})
    wanted: dict[str, float] = {}
    for text in texts:
        name, _, value = str(text).partition("=")
        if name.strip() not in known:
            raise UsageError(f"threshold {text!r}", f"there is no {name.strip()!r}", nearest(name.strip(), known))
        try:
            wanted[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"threshold {text!r}", f"{value!r} is no number", f"write {name.strip()}=1.5") from None
    return [
        replace(rule, limits={name: wanted.get(f"{rule.id}.{name}", limit) for name, limit in rule.limits.items()})
        for rule in rules
    ]


def _outcome(rule: Rule, inspection: Inspection) -> Outcome:
    if inspection.task not in rule.tasks:
        return Outcome(rule.id, rule.name, "not for this task")
    try:
        findings = tuple(rule.check(inspection, rule.limits))
    except CannotRun as lacking:
        return Outcome(rule.id, rule.name, "not run", reason=str(lacking))
    except FiducialError:
        raise
    except Exception as problem:  # a check that breaks says so in the report; it is neither passed nor a stop
        known = find_error(problem)
        if known is not None:
            raise known from problem
        return Outcome(rule.id, rule.name, "not run", reason=f"it broke: {type(problem).__name__}: {problem}")
    return Outcome(rule.id, rule.name, "found" if findings else "passed", findings)


def _cases(finding: Finding) -> str:
    shown = ", ".join(finding.cases[:3])
    more = f" and {len(finding.cases) - 3} more" if len(finding.cases) > 3 else ""
    return f" [{shown}{more}]" if finding.cases else ""


@contextmanager
def _random_generators_kept() -> Iterator[None]:
    """A check that draws must not change what the training draws afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
