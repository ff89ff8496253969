"""A map of real values (a fused image, an uncertainty) as a DICOM Parametric Map of floats on the source's slices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from highdicom.content import PlanePositionSequence, VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from pipelines.dicom.objects import FIRST_SERIES_NUMBER, Origin, concept, equipment, finished
from pipelines.dicom.privacy import cleaned
from pipelines.dicom.volume import Volume
from transforms.errors import BundleError


@dataclass(frozen=True)
class Quantity:
    """What a map shows: its code (at most 16 characters), what it means, whether a face can be recognised in it."""

    code: str
    meaning: str
    shows_anatomy: bool = False


QUANTITIES = {
    "entropy": Quantity("entropy", "Predictive entropy (nat)"),
    "mutual_information": Quantity("mutual-info", "Mutual information (nat)"),
    "fused": Quantity("fused", "Fused MRI and CT (display units)", True),
    "uncertainty": Quantity("uncertainty", "Standard deviation of samples"),
}


def parametric_map(values: NDArray[np.floating], volume: Volume, name: str, origin: Origin) -> Dataset:
    """Return a map as a DICOM Parametric Map (float32) on the source's slices.

    Args:
        values: (columns, rows, slices), on the volume's grid.
        volume: the series it was made from.
        name: a key of ``QUANTITIES``.
        origin: who made it.

    Raises:
        BundleError: values that are not finite.
        DataError: another shape than the volume's.
    """
    if not np.isfinite(values).all():
        raise BundleError(
            f"{volume.series.what}: the map {name} has values that are not finite",
            f"{int((~np.isfinite(values)).sum())} of {values.size} voxels",
            "look at the image and at the weights",
        )
    quantity = QUANTITIES[name]
    slices = volume.to_slices(values.astype(np.float32))
    low, high = float(slices.min()), float(slices.max())
    sources = [cleaned(header) for header in volume.sources]
    mapping = RealWorldValueMapping(
        quantity.code,
        quantity.meaning[:64],
        codes.UCUM.NoUnits,
        (low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=concept(quantity.code, quantity.meaning),
    )
    result = ParametricMap(
        sources,
        slices,
        series_number=FIRST_SERIES_NUMBER + 2 + list(QUANTITIES).index(name),
        contains_recognizable_visual_features=quantity.shows_anatomy,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[VOILUTTransformation((low + high) / 2, max(high - low, 1e-6))],
        content_label=quantity.code.upper().replace("-", "_"),
        content_description=quantity.meaning[:64],
        plane_positions=[
            PlanePositionSequence("PATIENT", [float(x) for x in source.ImagePositionPatient]) for source in sources
        ],
        **equipment(origin),
    )
    return finished(result, origin, volume.series, f"{origin.bundle} {name}")


def values_of_map(result: Dataset, volume: Volume) -> NDArray[np.float32]:
    """Return the values (source slice, row, column) that a parametric map holds, in the volume's order of slices."""
    frames = np.frombuffer(result.FloatPixelData, dtype="<f4").reshape(-1, int(result.Rows), int(result.Columns))
    position = {
        tuple(float(x) for x in header.ImagePositionPatient): index for index, header in enumerate(volume.sources)
    }
    stack = np.zeros((len(position), *frames.shape[1:]), np.float32)
    for group, frame in zip(result.PerFrameFunctionalGroupsSequence, frames, strict=True):
        at = tuple(float(x) for x in group.PlanePositionSequence[0].ImagePositionPatient)
        stack[position[at]] = frame
    return stack
