"""A rule of the failure catalogue as a value: its id, when and for which tasks it runs, its limits, and its check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines.preflight.finding import Finding
from pipelines.preflight.inspection import TASKS, Inspection

When = Literal["preflight", "smoke", "training", "validation", "export"]
Check = Callable[[Inspection, Mapping[str, float]], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """One check of a rule; a rule that looks at several things has several.

    Attributes:
        id: in the failure catalogue.
        name: of this check, a few words.
        check: (inspection, limits) -> findings. It raises ``CannotRun`` where it lacks something.
        limits: thresholds by name; a user overrides ``<id>.<name>``.
        when: ``preflight`` (static and data, before every training) or ``smoke`` (real steps, under a minute).
        tasks: that it makes sense for.
        of_data: it depends on cohort and deterministic chain alone, so that its findings may be kept by their digest.
    """

    id: str
    name: str
    check: Check
    limits: Mapping[str, float] = field(default_factory=dict)
    when: When = "preflight"
    tasks: tuple[str, ...] = TASKS
    of_data: bool = False
