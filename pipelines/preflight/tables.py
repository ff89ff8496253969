"""Label tables (R12): one table in manifest, contract and metadata, and no value or colour in the files beyond it."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.preflight.finding import CannotRun, Finding, Severity
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.label_counts import ignored_value, losses_of, thinned
from pipelines.preflight.rule import Rule


def contradicting_tables(tables: Mapping[str, Mapping[int, str]], strict: Collection[str] = ()) -> list[Finding]:
    """Find two label tables that say different things: an error where they have to be equal, else a warning.

    Args:
        tables: where it stands -> class id -> name.
        strict: those that have to be equal; of the others it is enough that no name means two ids.
    """
    findings = []
    names = list(tables)
    for place, second in enumerate(names):
        for first in names[:place]:
            ours, theirs = tables[first], tables[second]
            equal = first in strict and second in strict
            if equal:
                wrong = sorted(i for i in {*ours, *theirs} if ours.get(i) != theirs.get(i))
            else:
                by_name = {name: class_id for class_id, name in ours.items()}
                wrong = sorted(i for i, name in theirs.items() if by_name.get(name, i) != i)
            if wrong:
                differing = {i: (ours.get(i), theirs.get(i)) for i in wrong}
                findings.append(_r12_tables(first, second, differing, "error" if equal else "warn"))
    return findings


def _r12_tables(first: str, second: str, differing: Mapping[int, tuple[Any, Any]], severity: Severity) -> Finding:
    shown = "; ".join(
        f"id {i}: {ours or 'none'} in the {first}, {theirs or 'none'} in the {second}"
        for i, (ours, theirs) in differing.items()
    )
    return Finding(
        rule="R12",
        severity=severity,
        what=f"{first} and {second} have different label tables",
        measured=shown,
        threshold="one table",
        cause="one of them was edited by hand, or belongs to another cohort",
        fix="import the cohort with the right table, and let the configuration take it from the manifest",
    )


def unknown_values(
    where: str, counts: Mapping[Hashable, int], known: Collection[Hashable], limits: Mapping[str, float]
) -> list[Finding]:
    """Find values (or colours) of a label that are in no table.

    Args:
        where: case, or files.
        counts: value -> voxels.
        known: values of the table.
        limits: ``unknown``: share of the voxels.
    """
    total = sum(counts.values())
    unknown = {value: number for value, number in counts.items() if value not in known}
    share = sum(unknown.values()) / total if total else 0.0
    if share <= limits["unknown"]:
        return []
    worst = sorted(unknown, key=lambda value: -unknown[value])
    return [
        Finding(
            rule="R12",
            severity="error",
            what=f"{where}: values that are in no label table: {', '.join(str(value) for value in worst[:5])}",
            measured=f"{share:.2%} of the voxels",
            threshold=f"at most {limits['unknown']:.1%}",
            cause="another label table, or colours changed by a lossy or smoothing image format",
            fix="add them to the label table, or export the labels again without smoothing",
            source="data",
            cases=(where,),
            evidence={"values": {str(value): unknown[value] for value in worst[:20]}},
        )
    ]


def colour_counts(image: np.ndarray) -> dict[Hashable, int]:
    """Return ``#rrggbb`` -> pixels of an annotation (H, W, 3 or more), uint8."""
    codes = image[..., :3].astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    values, numbers = np.unique(codes, return_counts=True)
    return {f"#{value:06x}": int(number) for value, number in zip(values, numbers, strict=True)}


def check_tables(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R12: the tables of the manifest, of the contract and of ``configs/metadata.json``."""
    cohort, contract = inspection.need("cohort"), inspection.need("contract")
    tables = {"manifest": {label.id: label.name for label in cohort.labels}}
    if contract.get("labels"):
        tables["contract"] = {int(label["id"]): str(label["name"]) for label in contract["labels"]}
    if inspection.task != "fusion":
        channels = _declared_channels(Path("configs/metadata.json"))
        if channels:
            tables["metadata"] = channels
    return contradicting_tables(tables, strict=("manifest", "contract"))


def _declared_channels(file: Path) -> dict[int, str]:
    """Return the classes that a bundle's metadata declares for its output, where it does."""
    try:
        outputs = json.loads(file.read_text(encoding="utf-8"))["network_data_format"]["outputs"]
        return {int(channel): str(name) for channel, name in outputs["pred"]["channel_def"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def check_values(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R12: the label values of at most 16 training and 16 validation cases."""
    known = {int(label["id"]) for label in inspection.need("contract").get("labels") or []}
    if not known:
        raise CannotRun("the contract has no labels")
    ignored = {ignored_value(loss) for loss in losses_of(inspection).values()} if inspection.loss else set()
    cases = [*inspection.training_cases, *(inspection.validation_cases if inspection.validation else [])]
    findings = []
    for case in cases:
        label = case.get("label")
        if label is None or label.shape[0] > 1:
            continue
        values, numbers = np.unique(thinned(label), return_counts=True)
        counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
        findings += unknown_values(f"case {case.get('case', '')}", counts, known | ignored, limits)
    return findings


RULES: tuple[Rule, ...] = (
    Rule("R12", "label tables", check_tables),
    Rule("R12", "label values", check_values, {"unknown": 0.001}),
)
