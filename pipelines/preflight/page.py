"""The page of a check: every case with picture, grid, intensities and what was found on it; and the cohort as a whole.

Values in, one HTML text out that needs no other file, in the look and under the security policy of the report. It shows
case ids, never subjects or paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifests.model import Case
from pipelines.preflight.battery import Battery
from pipelines.preflight.finding import Finding
from pipelines.preflight.fingerprint import (
    AXES,
    CaseFigures,
    Fingerprint,
    Grid,
    names_of,
    prepared,
    sampled_inside,
    spacing_mm_of,
)
from pipelines.preflight.inspection import Inspection, spread
from pipelines.preflight.planner import Plan
from pipelines.progress import progress
from pipelines.reports.charts import Chart, distribution, line_chart
from pipelines.reports.gallery import (
    GAP_PX,
    PLANES,
    PlanePicture,
    fit,
    jpeg_address,
    largest_error_slices,
    plane_of,
    sampled_window,
)
from pipelines.reports.html import format_number, page_environment
from pipelines.reports.overlay import paint, to_grey, upright
from pipelines.reports.panels import Panel, panel_of
from transforms.errors import FiducialError
from transforms.nifti import read_header, read_voxels

PANEL_PX = 128
MOST_PICTURES = 200  # cases with a picture; about 40 kB each
MOST_HISTOGRAMS = 24  # cases whose files are read once more, for the intensities before and after the chain
BINS = 48
SHOWN_SHARE = (0.1, 99.9)  # percentiles between which a histogram is drawn


@dataclass(frozen=True)
class CaseShown:
    """A case of the page.

    Attributes:
        case, split: who.
        grid: in words.
        rows: pictures: one per modality, then the label over the first.
        charts: intensities in the foreground, before and after the chain.
        figures: of the fingerprint, as (what, value).
        problem: why something is not shown, or empty.
    """

    case: str
    split: str
    grid: str
    rows: Sequence[PlanePicture] = ()
    charts: Sequence[Chart] = ()
    figures: Sequence[tuple[str, Any]] = ()
    problem: str = ""


@dataclass(frozen=True)
class Checked:
    """All that a check has to show; ``why_no_plan`` says why there is no plan."""

    inspection: Inspection
    battery: Battery
    fingerprint: Fingerprint | None = None
    plan: Plan | None = None
    why_no_plan: str = ""
    cases: Sequence[CaseShown] = field(default_factory=tuple)


def render_page(bundle: str, checked: Checked | None, error: Mapping[str, Any] | None = None) -> str:
    """Return the page of a check as HTML; of one that was stopped, the error alone."""
    template = page_environment().get_template("preflight.html.j2")
    context: dict[str, Any] = {"title": bundle, "version": version("fiducial"), "error": error, "checked": None}
    return template.render({**context, **(_context(checked) if checked is not None else {})})


def shown_cases(inspection: Inspection, battery: Battery, fingerprint: Fingerprint | None) -> list[CaseShown]:
    """Return the prepared cases as the page shows them, those that findings name first.

    Pictures are made of ``MOST_PICTURES``, histograms of ``MOST_HISTOGRAMS`` of them.
    """
    if fingerprint is None:
        return []
    named = [case for finding in battery.findings for case in finding.cases]
    rank = {case: place for place, case in reversed(list(enumerate(named)))}
    everyone = sorted(prepared(inspection), key=lambda entry: rank.get(str(entry[1].get("case")), len(named)))
    pictured = everyone[:MOST_PICTURES]
    first = [case for _, case in pictured if case.get("case") in rank][:MOST_HISTOGRAMS]
    others = [case for _, case in pictured if case.get("case") not in rank]
    left = MOST_HISTOGRAMS - len(first)
    with_histogram = {str(case.get("case")) for case in [*first, *(spread(others, left) if left and others else [])]}
    grids = {grid.case: grid for grid in fingerprint.grids}
    figures = {figure.case: figure for figure in fingerprint.cases}
    files = {case.id: case for case in inspection.need("cohort").cases}
    shown = []
    for split, case in progress(pictured, "pictures of the cases"):
        name = str(case.get("case"))
        about = CaseShown(name, split, grid_words(grids.get(name)), figures=figure_rows(figures.get(name)))
        shown.append(_with_pictures(about, case, inspection, files.get(name), name in with_histogram))
    return shown


def grid_words(grid: Grid | None) -> str:
    """Return shape and spacing of a case's files in words."""
    if grid is None:
        return ""
    shape = " × ".join(str(n) for n in grid.shape)
    return f"{shape} voxels of {' × '.join(f'{mm:.4g}' for mm in grid.spacing_mm)} mm"


def figure_rows(figures: CaseFigures | None) -> list[tuple[str, Any]]:
    """Return a case's figures as (what, value)."""
    if figures is None:
        return []
    rows: list[tuple[str, Any]] = [("extent (mm)", " × ".join(f"{mm:.4g}" for mm in figures.extent_mm))]
    if figures.foreground_ml is not None:
        rows.append(("foreground (mL)", figures.foreground_ml))
    for name, volume in figures.volume_ml.items():
        count = figures.components[name]
        rows.append((name, f"{format_number(volume)} mL in {count} part{'' if count == 1 else 's'}"))
    for name, each in figures.intensity.items():
        texts = " / ".join(format_number(value) for value in (each.low, each.median, each.high))
        rows.append((f"{name}: 0.5 / 50 / 99.5 %", texts))
    return rows


def plane_pictures(
    case: Mapping[str, Any], modalities: Sequence[str], colours: Mapping[int, str]
) -> list[PlanePicture]:
    """Return one strip of three planes per modality, then one with the label over the first modality.

    The slices are those with most labelled voxels; without a label, the middle ones.

    Args:
        case: prepared, RAS+: ``image`` (C, X, Y, Z) or (C, X, Y), ``label`` (1, ...) where there is one.
        modalities: names of the channels.
        colours: ``#rrggbb`` per label id.
    """
    image = _volume(np.asarray(case["image"]))
    truth = case.get("label")
    label = np.zeros(image.shape[1:], np.uint8) if truth is None else _volume(np.asarray(truth))[0]
    spacing = [*spacing_mm_of(case), 1.0, 1.0][:3]
    slices, _ = largest_error_slices(label, label)
    flat = [axis for axis in range(3) if image.shape[axis + 1] == 1]
    axes = flat[:1] or list(range(3))
    strips = []
    for channel, name in enumerate([*modalities, "label"]):
        over = channel == len(modalities)
        if over and truth is None:
            break
        voxels = image[0 if over else channel]
        window = sampled_window(voxels)
        panels = []
        for axis in axes:
            grey = to_grey(upright(plane_of(voxels, axis, slices[axis])), window)
            if over:
                grey = paint(grey, upright(plane_of(label, axis, slices[axis])), colours)
            across, up = (mm for a, mm in enumerate(spacing) if a != axis)
            panels.append(fit(grey, (up, across), PANEL_PX))
        gap = np.ones((PANEL_PX, GAP_PX, 3), np.float32)
        strip = np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)
        strips.append(PlanePicture(name, slices[axes[0]], jpeg_address(strip), strip.shape[1], strip.shape[0]))
    return strips


def histogram(title: str, values: Mapping[str, NDArray[np.floating]], unit: str) -> Chart | None:
    """Return the share of voxels (%) against intensity, a line per modality, between two percentiles of each.

    Args:
        title: of the chart.
        values: (n,) by modality.
        unit: under the axis.
    """
    series: dict[str, list[tuple[float, float | None]]] = {}
    for name, own in values.items():
        known = own[np.isfinite(own)]
        if not len(known):
            continue
        low, high = np.percentile(known, SHOWN_SHARE)
        counts, edges = np.histogram(known, BINS, (float(low), float(high) if high > low else float(low) + 1.0))
        middles = (edges[:-1] + edges[1:]) / 2
        series[name] = [(float(x), 100.0 * float(n) / len(known)) for x, n in zip(middles, counts, strict=True)]
    return line_chart(title, series, unit)


def stored_inside(case: Mapping[str, Any], files: Case, root: Any, modalities: Sequence[str]) -> dict[str, NDArray]:
    """Return a modality's values as its file has them, at places inside the prepared case's foreground, by modality.

    Each place is carried to the file's grid by both affines, to the nearest voxel; places outside of it are left out.

    Raises:
        DataError: a file cannot be read.
    """
    foreground = np.asarray(case["foreground"])[0]
    places = np.argwhere(foreground > 0)
    places = places[:: max(1, len(places) // 50_000)]
    world = np.c_[places, np.ones(len(places))] @ np.asarray(case["image_affine"], np.float64).T
    found = {}
    for name in modalities:
        entry = files.images.get(name)
        if entry is None:
            continue
        path = root / entry.path
        header = read_header(path, case=files.id, key=name)
        index = np.rint(world @ np.linalg.inv(header.affine).T)[:, :3].astype(int)
        index = index[((index >= 0) & (index < header.shape)).all(axis=1)]
        found[name] = read_voxels(path, entry.channel, case=files.id, key=name)[tuple(index.T)]
    return found


def _with_pictures(
    about: CaseShown, case: Mapping[str, Any], inspection: Inspection, files: Case | None, with_histogram: bool
) -> CaseShown:
    """Add pictures and charts; one that fails is named with its reason, and the page goes on."""
    modalities, _ = names_of(inspection)
    colours = {int(label["id"]): str(label["colour"]) for label in inspection.contract.get("labels", ())}
    try:
        about = replace(about, rows=plane_pictures(case, modalities, colours))
        if with_histogram:
            about = replace(about, charts=_histograms(case, inspection, files, modalities))
    except Exception as problem:
        reason = f"{problem.what}; {problem.why}" if isinstance(problem, FiducialError) else type(problem).__name__
        return replace(about, problem=f"Not everything can be shown: {reason}.")
    return about


def _histograms(
    case: Mapping[str, Any], inspection: Inspection, files: Case | None, modalities: Sequence[str]
) -> list[Chart]:
    foreground = case.get("foreground")
    if files is not None and foreground is not None and "image_affine" in case:
        before = stored_inside(case, files, inspection.need("cohort").root, modalities)
        units = {m.name: m.unit for m in inspection.need("cohort").modalities}
        unit = ", ".join(sorted({units.get(name, "") for name in before}))
        charts = [histogram("as stored, inside the foreground", before, unit)]
    else:
        inside = sampled_inside(np.asarray(case["image"]), foreground)
        charts = [histogram("prepared, inside the foreground", dict(zip(modalities, inside, strict=False)), "")]
    after = _after(str(case.get("case")), inspection)
    if after is not None:
        image = np.asarray(after["image"])
        inside = sampled_inside(image, after.get("foreground", foreground))
        names = modalities if len(modalities) == len(image) else [f"channel {n}" for n in range(len(image))]
        charts.append(histogram("as the network sees it", dict(zip(names, inside, strict=True)), "after the chain"))
    return [chart for chart in charts if chart is not None]


def _after(name: str, inspection: Inspection) -> dict[str, Any] | None:
    """Return a case behind the whole deterministic chain, that of validation."""
    chain = getattr(inspection.validation, "transform", None)
    for dataset in (inspection.train, inspection.validation):
        for case in getattr(dataset, "cases", ()):
            values = case if isinstance(case, Mapping) else case.values
            if chain is not None and str(values.get("case")) == name:
                whole = case.whole() if hasattr(case, "whole") else dict(case)
                return dict(chain({key: value for key, value in whole.items() if not key.startswith("centres_")}))
    return None


def _volume(array: NDArray[Any]) -> NDArray[Any]:
    """Return (C, X, Y, Z) of an image with two or three axes."""
    return array[..., None] if array.ndim == 3 else array


def _context(checked: Checked) -> dict[str, Any]:
    battery, inspection = checked.battery, checked.inspection
    root = str(inspection.cohort.root) if inspection.cohort is not None else ""
    numbers = {shown.case: number for number, shown in enumerate(checked.cases, start=1)}
    findings = [_finding(finding, battery, root) for finding in battery.findings]
    counts: dict[str, int] = {}
    for outcome in battery.outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    return {
        "checked": checked,
        "findings": findings,
        "numbers": numbers,
        "counts": counts,
        "stopping": len(battery.stopping),
        "findings_of": {
            shown.case: [entry for entry in findings if shown.case in entry["finding"].cases] for shown in checked.cases
        },
        "plan": checked.plan,
        "planes": ("image",) if _flat(checked.cases) else PLANES,
        "panel_px": PANEL_PX,
        "labels": [label for label in inspection.contract.get("labels", ()) if int(label["id"]) > 0],
        "about": _about(checked),
        "cohort_rows": cohort_rows(checked.fingerprint) if checked.fingerprint else [],
        "outliers": checked.fingerprint.outliers if checked.fingerprint else (),
        "distributions": cohort_charts(checked.fingerprint) if checked.fingerprint else [],
        "not_shown": (len(checked.fingerprint.cases) if checked.fingerprint else 0) - len(checked.cases),
        "number_of_histograms": sum(bool(shown.charts) for shown in checked.cases),
    }


def cohort_rows(fingerprint: Fingerprint) -> list[tuple[str, int, float, float, float]]:
    """Return the cohort's figures as rows: figure, number of cases, smallest, median, largest."""
    table: dict[str, list[float]] = {}
    for grid in fingerprint.grids:
        for axis, size, mm in zip(AXES, grid.shape, grid.spacing_mm, strict=False):
            table.setdefault(f"voxels {axis}", []).append(size)
            table.setdefault(f"voxel size {axis} (mm)", []).append(mm)
    for case in fingerprint.cases:
        for axis, mm in zip(AXES, case.extent_mm, strict=False):
            table.setdefault(f"foreground extent {axis} (mm)", []).append(mm)
        if case.foreground_ml is not None:
            table.setdefault("foreground (mL)", []).append(case.foreground_ml)
        for name, each in case.intensity.items():
            for text, value in (("0.5 %", each.low), ("50 %", each.median), ("99.5 %", each.high)):
                table.setdefault(f"{name} {text} in the foreground", []).append(value)
        for name, volume in case.volume_ml.items():
            table.setdefault(f"{name} (mL)", []).append(volume)
            table.setdefault(f"{name}: parts", []).append(case.components[name])
        for name, volume in case.smallest_ml.items():
            table.setdefault(f"{name}: smallest part (mL)", []).append(volume)
    return [
        (name, len(values), _short(min(values)), _short(np.median(values)), _short(max(values)))
        for name, values in table.items()
    ]


def cohort_charts(fingerprint: Fingerprint) -> list[Chart]:
    """Return the distributions over the cases: medians of the modalities, volumes and parts of the labels."""
    intensity = [
        {
            "case": case.case,
            "label": name,
            "median in the foreground": each.median,
            "width (0.5 to 99.5 %)": each.high - each.low,
        }
        for case in fingerprint.cases
        for name, each in case.intensity.items()
    ]
    labels = [
        {"case": case.case, "label": name, "volume (mL)": volume, "parts": case.components[name]}
        for case in fingerprint.cases
        for name, volume in case.volume_ml.items()
    ]
    extents = [
        {"case": case.case, "label": axis, "foreground extent (mm)": mm}
        for case in fingerprint.cases
        for axis, mm in zip(AXES, case.extent_mm, strict=False)
    ]
    charts = [distribution("foreground extent (mm)", extents)] if extents else []
    charts += [distribution(m, intensity) for m in ("median in the foreground", "width (0.5 to 99.5 %)") if intensity]
    charts += [distribution(metric, labels) for metric in ("volume (mL)", "parts") if labels]
    return [chart for chart in charts if chart is not None]


def _short(value: Any) -> float:
    """Return a whole number as one, so that the page writes it without decimals."""
    return int(value) if float(value).is_integer() else float(value)


def _flat(cases: Sequence[CaseShown]) -> bool:
    return bool(cases) and bool(cases[0].rows) and cases[0].rows[0].width == PANEL_PX


def _finding(finding: Finding, battery: Battery, root: str) -> dict[str, Any]:
    texts = {
        name: getattr(finding, name).replace(root, "…") if root else getattr(finding, name)
        for name in ("what", "measured", "threshold", "cause", "fix")
    }
    evidence: Panel | None = panel_of("evidence", dict(finding.evidence)) if finding.evidence else None
    return {"finding": finding, **texts, "evidence": evidence, "accepted": battery.acknowledged.get(finding.rule, "")}


def _about(checked: Checked) -> list[tuple[str, str]]:
    cohort, contract = checked.inspection.cohort, checked.inspection.contract
    splits: dict[str, int] = {}
    for case in cohort.cases if cohort is not None else ():
        splits[case.split] = splits.get(case.split, 0) + 1
    pairs = [
        ("cohort", cohort.name if cohort is not None else ""),
        ("digest of the cohort", cohort.digest if cohort is not None else ""),
        ("cases", ", ".join(f"{number} {split}" for split, number in splits.items())),
        ("modalities", ", ".join(str(name) for name in contract.get("modalities", ()))),
        ("spacing (mm)", " × ".join(str(mm) for mm in contract.get("spacing", ()))),
        ("patch (voxels)", " × ".join(str(n) for n in contract.get("patch_size", ()))),
        ("arithmetic", checked.inspection.precision),
    ]
    return [(what, value) for what, value in pairs if value]
