"""The fingerprint of a cohort: its grids, its intensities in the foreground, its structures, and who does not fit in.

Grids come from the headers of all files; everything else from the prepared cases of training and validation (the test
split is not looked at), in the units of the files and in mm. Cases are described one by one as plain numbers
(``CaseFigures``); whatever is said of the cohort is a function of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.manifests import Manifest
from pipelines.manifests.model import Case
from pipelines.preflight.finding import CannotRun
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.progress import progress
from transforms.masks import spacing_of

MOST_VOXELS = 200_000  # per case, for percentiles: their standard error is then below 0.12 percentage points
FEWEST_PLANES = 24  # of a volume that are looked at
PERCENTILES = (0.5, 50.0, 99.5)
ROBUST_Z = 3.5  # Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers": |modified z| above it is an outlier
FEWEST_FOR_OUTLIERS = 5
NEGLIGIBLE = 0.1  # of the median
_MAD_TO_SD, _MEAN_DEVIATION_TO_SD = 1.4826, 1.2533  # of a normal distribution


@dataclass(frozen=True)
class Grid:
    """The grid of a case's files with its axes in the order right, anterior, superior: voxels, and mm per voxel."""

    case: str
    split: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class Intensity:
    """A modality inside the foreground of a case, in the file's unit: percentiles 0.5, 50 and 99.5, mean, deviation."""

    low: float
    median: float
    high: float
    mean: float
    sd: float


@dataclass(frozen=True)
class CaseFigures:
    """A prepared case in numbers.

    Attributes:
        case, split: who.
        extent_mm: of what is left after cropping to the foreground, per axis (right, anterior, superior).
        foreground_ml: volume of the foreground, None where the case has none.
        intensity: by modality.
        volume_ml: by label, background left out; empty where the case has no label.
        components: number of face-connected parts by label.
        smallest_ml: volume of the smallest part by label, for labels that are there.
    """

    case: str
    split: str
    extent_mm: tuple[float, ...]
    foreground_ml: float | None
    intensity: Mapping[str, Intensity]
    volume_ml: Mapping[str, float]
    components: Mapping[str, int]
    smallest_ml: Mapping[str, float]


@dataclass(frozen=True)
class Outlier:
    """A case that is far from the others: in which figure, its value, the cohort's median, and its robust z."""

    case: str
    figure: str
    value: float
    median: float
    z: float


@dataclass(frozen=True)
class Fingerprint:
    """A cohort in numbers."""

    grids: tuple[Grid, ...]
    cases: tuple[CaseFigures, ...]
    outliers: tuple[Outlier, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def fingerprint_of(inspection: Inspection) -> Fingerprint:
    """Return the fingerprint of the cohort of a run.

    Raises:
        CannotRun: the bundle names no cohort.
    """
    cohort: Manifest = inspection.need("cohort")
    grids = tuple(grid_of(case, cohort) for case in cohort.cases)
    cases = tuple(
        case_figures(case, split, *names_of(inspection))
        for split, case in progress(prepared(inspection), "fingerprint")
    )
    return Fingerprint(grids, cases, tuple(outliers(figures_by_name(grids, cases))))


def prepared(inspection: Inspection) -> list[tuple[str, dict[str, Any]]]:
    """Return (split, case) of every prepared case, arrays by memory map; none where the bundle has no data sets."""
    found = []
    for split in ("train", "validation"):
        dataset = getattr(inspection, split)
        found += [(split, as_dictionary(case)) for case in getattr(dataset, "cases", ())]
    return found


def names_of(inspection: Inspection) -> tuple[list[str], dict[int, str]]:
    """Return the modalities in the order of the channels, and the names of the labels by id without the background.

    Raises:
        CannotRun: the bundle names no contract.
    """
    contract = inspection.need("contract")
    labels = {int(label["id"]): str(label["name"]) for label in contract.get("labels", ()) if int(label["id"]) > 0}
    return [str(name) for name in contract.get("modalities", ())], labels


def grid_of(case: Case, cohort: Manifest) -> Grid:
    """Return the grid of a case's first image; where its header cannot tell the axes, as the manifest lists them."""
    shape, spacing = case.shape, case.spacing
    try:
        affine = nib.load(cohort.root / next(iter(case.images.values())).path).affine
        order = [int(axis) for axis in np.argsort(nib.io_orientation(affine)[:, 0])]
        shape, spacing = tuple(shape[axis] for axis in order), tuple(spacing[axis] for axis in order)
    except (OSError, StopIteration, ValueError, IndexError, AttributeError, nib.filebasedimages.ImageFileError):
        pass
    return Grid(case.id, case.split, tuple(int(n) for n in shape), tuple(float(mm) for mm in spacing))


def case_figures(
    case: Mapping[str, Any], split: str, modalities: Sequence[str], labels: Mapping[int, str]
) -> CaseFigures:
    """Return a prepared case in numbers.

    Args:
        case: ``image`` (C, *spatial) in the files' units, ``image_affine`` or an image with an affine, and where there
            are any ``foreground`` and ``label`` (1, *spatial).
        split: of the case.
        modalities: names of the channels.
        labels: names by id.
    """
    image = case["image"]
    spacing = spacing_mm_of(case)
    voxel_ml = math.prod(spacing) / 1000.0
    foreground = case.get("foreground")
    label = case.get("label")
    inside = sampled_inside(image, foreground)
    volume, count, smallest = structures(np.asarray(label[0]), labels, voxel_ml) if label is not None else ({}, {}, {})
    return CaseFigures(
        case=str(case.get("case", "")),
        split=split,
        extent_mm=tuple(size * mm for size, mm in zip(image.shape[1:], spacing, strict=True)),
        foreground_ml=None if foreground is None else int(np.count_nonzero(foreground)) * voxel_ml,
        intensity={
            name: intensity_of(inside[channel]) for channel, name in enumerate(modalities) if channel < len(inside)
        },
        volume_ml=volume,
        components=count,
        smallest_ml=smallest,
    )


def spacing_mm_of(case: Mapping[str, Any]) -> list[float]:
    """Return mm per voxel along the axes of a prepared case; 1 where it has no affine (a table, a microscope)."""
    image = case["image"]
    affine = case.get("image_affine")
    if affine is None:
        affine = getattr(image, "affine", None)
    if affine is None:
        return [1.0] * (image.ndim - 1)
    sizes = nib.affines.voxel_sizes(np.asarray(affine, dtype=np.float64))
    return spacing_of(image, [float(mm) for mm in sizes][: image.ndim - 1], f"case {case.get('case', '')}")


def sampled_inside(
    image: NDArray[Any], foreground: NDArray[Any] | None, most: int = MOST_VOXELS
) -> NDArray[np.float64]:
    """Return about ``most`` voxels (C, n) from inside the foreground, evenly spread; from everywhere without one."""
    wanted = max(1, math.prod(image.shape[1:]) // (4 * most))
    # whole planes first: every second voxel of a memory map costs as much as all of them
    planes = min(wanted, max(1, image.shape[1] // FEWEST_PLANES))
    view = (
        slice(None),
        slice(planes // 2, None, planes),
        *[slice(None, None, max(1, wanted // planes))] * (image.ndim > 2),
    )
    values = np.asarray(image[view], dtype=np.float64).reshape(len(image), -1)
    if foreground is not None:
        mask = np.asarray(foreground[view][0]).ravel() > 0
        values = values[:, mask] if mask.any() else values
    return values[:, :: max(1, values.shape[1] // most)]


def intensity_of(values: NDArray[np.floating]) -> Intensity:
    """Return percentiles, mean and standard deviation of values (n,) that are finite; zeros where there are none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Intensity(0.0, 0.0, 0.0, 0.0, 0.0)
    low, median, high = (float(value) for value in np.percentile(known, PERCENTILES))
    return Intensity(low, median, high, float(known.mean()), float(known.std()))


def structures(
    label: NDArray[np.integer], labels: Mapping[int, str], voxel_ml: float
) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """Return volume (mL), number of face-connected parts, and the smallest part (mL), by name of the label.

    Args:
        label: label map (*spatial).
        labels: names by id.
        voxel_ml: volume of a voxel.
    """
    boxes = ndimage.find_objects(label, max_label=max(labels, default=0)) if labels else []
    volume: dict[str, float] = {}
    count: dict[str, int] = {}
    smallest: dict[str, float] = {}
    for number, name in labels.items():
        box = boxes[number - 1]
        if box is None:
            volume[name], count[name] = 0.0, 0
            continue
        parts, found = ndimage.label(label[box] == number)
        sizes = np.bincount(parts.ravel())[1:]
        volume[name], count[name], smallest[name] = int(sizes.sum()) * voxel_ml, found, int(sizes.min()) * voxel_ml
    return volume, count, smallest


def figures_by_name(grids: Iterable[Grid], cases: Iterable[CaseFigures]) -> dict[str, dict[str, float]]:
    """Return value by case, by name of the figure: what outliers are looked for in.

    Volumes of labels enter as their decadic logarithm: lesion loads spread over powers of ten. Those that are absent do
    not enter.
    """
    table: dict[str, dict[str, float]] = {}

    def note(name: str, case: str, value: float) -> None:
        table.setdefault(name, {})[case] = value

    for grid in grids:
        for axis, mm in zip(AXES, grid.spacing_mm, strict=False):
            note(f"voxel size {axis} (mm)", grid.case, mm)
    for case in cases:
        for axis, mm in zip(AXES, case.extent_mm, strict=False):
            note(f"extent {axis} (mm)", case.case, mm)
        if case.foreground_ml is not None:
            note("foreground (mL)", case.case, case.foreground_ml)
        for name, intensity in case.intensity.items():
            note(f"{name}: median", case.case, intensity.median)
            note(f"{name}: width", case.case, intensity.high - intensity.low)
        for name, volume in case.volume_ml.items():
            if volume > 0:
                note(f"{name}: log10 of mL", case.case, math.log10(volume))
    return table


AXES = ("right", "anterior", "superior")


def outliers(figures: Mapping[str, Mapping[str, float]], limit: float = ROBUST_Z) -> list[Outlier]:
    """Return every case that is farther than ``limit`` robust standard deviations from the median, the farthest first.

    With fewer than five cases nobody is called an outlier.
    """
    found = []
    for name, by_case in figures.items():
        values = np.array(list(by_case.values()))
        if len(values) < FEWEST_FOR_OUTLIERS:
            continue
        median = float(np.median(values))
        for case, value, z in zip(by_case, values, robust_z(values), strict=True):
            if abs(z) > limit:
                found.append(Outlier(case, name, float(value), median, float(z)))
    return sorted(found, key=lambda each: -abs(each.z))


def robust_z(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return (x - median) / (1.4826 MAD), the modified z-score of Iglewicz and Hoaglin (1993).

    Where more than half of the values are equal the MAD is 0: the mean absolute deviation from the median stands in for
    it (times 1.2533). Differences of up to 10 % of the median count as none: who differs by so little is not far.
    """
    median = float(np.median(values))
    deviation = np.asarray(values, dtype=np.float64) - median
    deviation[np.abs(deviation) <= NEGLIGIBLE * abs(median)] = 0.0
    scale = _MAD_TO_SD * float(np.median(np.abs(deviation)))
    if scale == 0.0:
        scale = _MEAN_DEVIATION_TO_SD * float(np.mean(np.abs(deviation)))
    return deviation / scale if scale > 0 else np.zeros(len(values))


def require_cases(fingerprint: Fingerprint, split: str = "train") -> list[CaseFigures]:
    """Return the cases of a split.

    Raises:
        CannotRun: there are none.
    """
    cases = [case for case in fingerprint.cases if case.split == split]
    if not cases:
        raise CannotRun(f"no prepared case in split {split}")
    return cases
