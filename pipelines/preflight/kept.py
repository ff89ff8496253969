"""Findings on the data, kept by the digest of all that they depend on, so that an unchanged cohort is judged once.

A rule that is ``of_data`` depends on the cohort, on the deterministic chain, on its own code and on its limits. Its
entry in ``<cache_dir>/preflight`` is named by the digest of all four: change one, and another entry is made. What did
not run is never kept, and an entry that cannot be read, or is not what was written, is made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.files import write_json
from pipelines.manifests.cache import CachedCase, chain_digest
from pipelines.manifests.digest import canonical_digest
from pipelines.preflight.battery import Battery, Outcome, run_battery, with_thresholds
from pipelines.preflight.finding import Finding, finding_from_json
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Check, Rule
from pipelines.preflight.watch import WATCHED
from pipelines.training.run_folder import code_digest
from transforms.errors import BundleError, ResourceError

logger = logging.getLogger(__name__)

FOLDER = "preflight"


def kept_battery(
    rules: Sequence[Rule],
    inspection: Inspection,
    cache_dir: str | Path,
    acknowledge: Sequence[str] = (),
    thresholds: Sequence[str] = (),
) -> Battery:
    """Run the rules as ``run_battery`` does, those of the data only where their findings are not kept.

    Args:
        rules: to run.
        inspection: what they look at.
        cache_dir: findings stand in ``preflight`` of it. A folder that cannot be written is named in a warning.
        acknowledge, thresholds: see ``run_battery``.

    Raises:
        UsageError: see ``run_battery``.
    """
    adjusted = with_thresholds(rules, thresholds, further=WATCHED)
    data = data_digest(inspection)
    entries = {} if data is None else _entries(adjusted, inspection, Path(cache_dir) / FOLDER, data)
    kept = {path: _read(path) for path in entries.values()}
    battery = run_battery(
        [_with_kept(rule, kept[entries[place]] if place in entries else None) for place, rule in enumerate(adjusted)],
        inspection,
        acknowledge,
    )
    for place, path in entries.items():
        if kept[path] is None:
            _write(path, battery.outcomes[place])
    return battery


def data_digest(inspection: Inspection) -> str | None:
    """Return the digest of what rules on the data look at, or None where it cannot be told.

    The name of an entry of the content cache is the digest of its files and of the chain that has made it; what follows
    that chain on every access belongs to it too.
    """
    if inspection.cohort is None:
        return None
    cases: dict[str, list[str]] = {}
    following: dict[str, str] = {}
    for name in ("train", "validation"):
        dataset = getattr(inspection, name)
        held = list(getattr(dataset, "cases", ()))
        if not all(isinstance(case, CachedCase) for case in held):
            return None
        cases[name] = [case.folder.name for case in held]
        if name == "validation" and dataset is not None:
            try:
                following[name] = chain_digest(getattr(dataset, "transform", None))
            except BundleError:  # it draws, or cannot be described
                return None
    about = {
        "task": inspection.task,
        "cohort": inspection.cohort.digest,
        "root": str(inspection.cohort.root),  # findings name files
        "contract": inspection.contract,
        "extra": {name: value for name, value in inspection.extra.items() if isinstance(value, (str, int, float))},
        "cases": cases,
        "following": following,
    }
    return canonical_digest(json.loads(json.dumps(about, default=repr)))


def _entries(rules: Sequence[Rule], inspection: Inspection, folder: Path, data: str) -> dict[int, Path]:
    """Return the entry of every rule whose findings may be kept, by its place among the rules."""
    code = code_digest()
    entries = {}
    for place, rule in enumerate(rules):
        if rule.of_data and inspection.task in rule.tasks:
            try:
                check = chain_digest(rule.check)
            except BundleError:
                continue
            parts = [data, rule.id, rule.name, dict(rule.limits), check, code]
            entries[place] = folder / f"{canonical_digest(parts)}.json"
    return entries


def _with_kept(rule: Rule, findings: Sequence[Finding] | None) -> Rule:
    return rule if findings is None else replace(rule, check=_giving(findings))


def _giving(findings: Sequence[Finding]) -> Check:
    def check(inspection: Inspection, limits: Mapping[str, float]) -> Iterable[Finding]:
        return findings

    return check


def _read(path: Path) -> list[Finding] | None:
    """Return the findings of an entry; None where there is none, or one that is not what was written."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if canonical_digest(content["findings"]) != content["digest"]:
            raise ValueError("its digest is not that of its findings")
        return [finding_from_json(raw) for raw in content["findings"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        logger.warning("%s: kept findings are made again, %s", path, problem)
        return None


def _write(path: Path, outcome: Outcome) -> None:
    if outcome.status not in ("passed", "found"):
        return
    try:
        findings: list[dict[str, Any]] = json.loads(json.dumps([finding.as_json() for finding in outcome.findings]))
        write_json(path, {"rule": outcome.rule, "digest": canonical_digest(findings), "findings": findings})
    except (ResourceError, TypeError, ValueError) as problem:  # the next preflight looks again
        logger.warning("findings of %s are not kept: %s", outcome.rule, " ".join(str(problem).split()))
