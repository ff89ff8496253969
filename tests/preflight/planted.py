"""The form of a proof: for a rule, a planted failure that it finds and a healthy run at which it stays quiet.

Every ``proof_<family>.py`` beside this file has a list ``PROOFS``; the matrix over all rules is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.preflight import Finding

Run = Callable[[], Sequence[Finding]]


@dataclass(frozen=True)
class Proof:
    """A rule and what proves it.

    Attributes:
        rule: id in the failure catalogue.
        check: what is measured, one sentence.
        origin: the failure that really happened, in a few words.
        planted: runs the rule's own check on a planted failure; returns at least one finding of the rule.
        healthy: the same on a healthy run; returns none.
        severity: of the planted finding.
    """

    rule: str
    check: str
    origin: str
    planted: Run
    healthy: Run
    severity: str = "error"
