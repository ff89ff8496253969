"""``fiducial check``: run the rules on a bundle and a cohort without training, and write what they found.

Into the folder go ``preflight.json`` (everything, for programs) and ``preflight.html`` (for people), each whole or not
at all. A cohort or configuration that stops the check before a rule could run is written down too, then raised.
"""

from __future__ import annotations

import logging
import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.files import write_atomically, write_json
from pipelines.preflight.battery import Battery, run_battery
from pipelines.preflight.finding import CannotRun
from pipelines.preflight.fingerprint import Fingerprint, fingerprint_of
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.kept import kept_battery
from pipelines.preflight.page import Checked, render_page, shown_cases
from pipelines.preflight.planner import Plan, plan_for
from pipelines.preflight.rule import Rule
from pipelines.preflight.rules import RULES
from pipelines.reports.tables import aligned
from pipelines.runner import absolute, bundle_parser, bundle_root
from transforms.errors import BundleError, FiducialError, find_error

JSON_NAME, PAGE_NAME = "preflight.json", "preflight.html"
NARROWEST, WIDEST = 100, 180  # characters of the table
ROWS_OF = {"found": 0, "not run": 1, "passed": 2, "not for this task": 3}  # order of the table


@dataclass(frozen=True)
class Asked:
    """What to check: a bundle, one of its trainings, overrides, further files, and whether real steps are run too."""

    bundle: str
    config: str = "train"
    overrides: Mapping[str, Any] | None = None
    variants: Sequence[str] = ()
    smoke: bool = False
    memory_gb: float | None = None


def check_bundle(asked: Asked, output: str | Path | None = None, rules: Sequence[Rule] | None = None) -> Path:
    """Check a bundle, write the findings, print them as a table, and return the path of the page.

    Args:
        asked: bundle, configuration and options.
        output: folder for both files; None = ``preflight/<bundle>`` in the caller's folder.
        rules: to run; None = all that there are.

    Raises:
        DataError, BundleError: an error that nobody has acknowledged, by what has to change.
        FiducialError: whatever stops the check itself; ``preflight.json`` then says so.
    """
    name = bundle_root(asked.bundle).name
    folder = Path(absolute(output if output is not None else Path("preflight") / name))
    try:
        checked = _checked(asked, name, RULES if rules is None else rules)
    except Exception as problem:
        error = find_error(problem)
        said = {
            "what": f"{type(problem).__name__}: {problem}",
            "why": "nothing expected this",
            "fix": "",
            "exit_code": 1,
        }
        if error is not None:
            said = {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}
        write_json(folder / JSON_NAME, {"bundle": name, "config": asked.config, "error": said, **_about()})
        write_atomically(folder / PAGE_NAME, render_page(name, None, said).encode())
        raise
    write_json(folder / JSON_NAME, plain(_as_json(asked, name, checked)))
    page = folder / PAGE_NAME
    write_atomically(page, render_page(name, checked).encode())
    print("\n".join(table(checked.battery, shutil.get_terminal_size((WIDEST, 24)).columns)))
    if checked.plan is not None:
        print(f"\nthe cohort suggests: {checked.plan.command}")
    print(f"\n{page}")
    checked.battery.raise_if_stopping()
    return page


def exit_code(battery: Battery) -> int:
    """Return 0, or the code of the first error that nobody has acknowledged: 3 = data, 4 = configuration."""
    try:
        battery.raise_if_stopping()
    except FiducialError as error:
        return error.exit_code
    return 0


def table(battery: Battery, width: int = WIDEST) -> list[str]:
    """Return the lines of a table: rule, check, status, what was measured, fix; findings first.

    Args:
        battery: outcomes of the rules.
        width: characters, at least ``NARROWEST``.
    """
    texts = max(20, (min(max(width, NARROWEST), WIDEST) - 50) // 2)
    rows: list[tuple[str, ...]] = []
    for outcome in sorted(battery.outcomes, key=lambda each: (ROWS_OF[each.status], each.rule)):
        if outcome.status == "not for this task":
            continue
        if not outcome.findings:
            rows += _wrapped((outcome.rule, outcome.name, outcome.status), (outcome.reason, ""), texts)
        for finding in outcome.findings:
            status = f"{finding.severity}, accepted" if finding.rule in battery.acknowledged else finding.severity
            cases = (
                f" [{', '.join(finding.cases[:3])}{', ...' if len(finding.cases) > 3 else ''}]" if finding.cases else ""
            )
            measured = f"{finding.what}{cases}: {finding.measured}; expected {finding.threshold}"
            rows += _wrapped((outcome.rule, outcome.name, status), (measured, finding.fix), texts)
    counts: dict[str, int] = {}
    for outcome in battery.outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    header = ("rule", "check", "status", "measured", "fix")
    return [
        *(aligned(header, rows, len(header)) if rows else []),
        f"{len(battery.outcomes)} checks: {summary or 'none'}",
    ]


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: a number that is not finite is null, what JSON does not know is text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor | np.generic):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _checked(asked: Asked, name: str, rules: Sequence[Rule]) -> Checked:
    chosen = [rule for rule in rules if rule.when == "preflight" or (asked.smoke and rule.when == "smoke")]
    quiet = _quiet(run_battery.__module__)  # the table says what it would say
    with quiet, bundle_parser(asked.bundle, asked.config, dict(asked.overrides or {}), asked.variants) as parser:
        if parser.get("inspection", None) is None:
            raise BundleError(
                f"bundle {name}: configs/{asked.config}.yaml",
                "it has no id inspection, so there is nothing that the rules could look at",
                "add it as in the other bundles, see docs/preflight.md",
            )
        torch.manual_seed(int(parser.get_parsed_content("seed")))
        inspection: Inspection = parser.get_parsed_content("inspection")
        options = [parser.get_parsed_content(key) for key in ("cache_dir", "acknowledge", "thresholds")]
        battery = kept_battery(chosen, inspection, *options)
        fingerprint, plan, why_not = _described(inspection, asked.memory_gb)
        cases = shown_cases(inspection, battery, fingerprint)
    return Checked(inspection, battery, fingerprint, plan, why_not, cases)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence the warnings of a logger for a while."""
    named = logging.getLogger(name)
    before = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(before)


def _described(inspection: Inspection, memory_gb: float | None) -> tuple[Fingerprint | None, Plan | None, str]:
    """Return fingerprint and plan, None where they cannot be made, and why the plan cannot."""
    try:
        fingerprint = fingerprint_of(inspection)
    except CannotRun as lacking:
        return None, None, str(lacking)
    try:
        return fingerprint, plan_for(inspection, fingerprint, memory_gb), ""
    except (CannotRun, BundleError) as lacking:
        return fingerprint, None, str(getattr(lacking, "what", lacking))


def _as_json(asked: Asked, name: str, checked: Checked) -> dict[str, Any]:
    battery, cohort, plan = checked.battery, checked.inspection.cohort, checked.plan
    return {
        "bundle": name,
        "config": asked.config,
        "error": None,
        "exit_code": exit_code(battery),
        "cohort": None
        if cohort is None
        else {"name": cohort.name, "digest": cohort.digest, "cases": len(cohort.cases)},
        **battery.record(),
        "outcomes": [
            {"rule": o.rule, "name": o.name, "status": o.status, "findings": len(o.findings)} for o in battery.outcomes
        ],
        "fingerprint": None if checked.fingerprint is None else checked.fingerprint.as_json(),
        "plan": None if plan is None else {**asdict(plan), "command": plan.command},
        "no_plan": checked.why_no_plan,
        **_about(),
    }


def _about() -> dict[str, Any]:
    return {"fiducial": version("fiducial")}


def _wrapped(words: Sequence[str], texts: Sequence[str], width: int) -> list[tuple[str, ...]]:
    """Return the lines of one row: its texts broken at ``width`` characters, its words on the first line only."""
    columns = [textwrap.wrap(" ".join(text.split()), width) or [""] for text in texts]
    height = max(len(column) for column in columns)
    filled = [column + [""] * (height - len(column)) for column in columns]
    return [
        (*(words if line == 0 else [""] * len(words)), *(column[line] for column in filled)) for line in range(height)
    ]
