"""The head phantom's anatomy on an image grid: fuzzy fractions of every tissue at any spacing, in any small rigid pose.

The source's brain is sampled linearly, once, in the pose of the subject; skull and scalp are computed on the image's
own grid from the two distances of the source. Whatever is made later (lesions, contrast, noise) lives on this grid, so
that no label is ever resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from pipelines.phantoms.sources import SKULL_MM, HeadSource, averaged_tissues, head_source, resolve_source
from transforms.errors import UsageError

BRAIN_TISSUES = ("csf", "grey", "white")
BONE_TISSUES = ("cortical_bone", "diploe")
SOFT_TISSUES = ("skin", "fat", "muscle")
MAX_ROTATION_DEG = 5.0
MAX_TRANSLATION_MM = 4.0
_TABLE_MM = 2.0
_SKIN_MM = 2.0
_FAT_MM = 3.0
_MARGIN_MM = 14.0


@dataclass(frozen=True)
class Pose:
    """A small rigid motion about the centre of the field of view.

    Attributes:
        rotation_deg: angles about the fixed x, y and z axes (right, anterior, superior), applied in that order.
        translation_mm: shift after the rotation, in world mm.
    """

    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    translation_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Anatomy:
    """Tissues of one head on an image grid.

    Attributes:
        fractions: tissue name -> fraction (X, Y, Z), float32 in [0, 1]; they sum to 1 in every voxel, air included.
        brain: (X, Y, Z) bool, where at least half of the voxel is brain (its sulci and ventricles included).
        affine: (4, 4), RAS, voxel indices to mm.
        source: ``mni152`` or ``ellipsoid``.
    """

    fractions: Mapping[str, NDArray[np.float32]]
    brain: NDArray[np.bool_]
    affine: NDArray[np.float64]
    source: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along the three axes."""
        x, y, z = np.diag(self.affine)[:3]
        return float(x), float(y), float(z)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in mL."""
        return float(np.prod(self.spacing_mm)) / 1000

    @property
    def bone(self) -> NDArray[np.bool_]:
        """(X, Y, Z) bool, where more than half of the voxel is bone; disjoint from ``brain``."""
        return self.fractions["cortical_bone"] + self.fractions["diploe"] > 0.5


def random_pose(rng: np.random.Generator) -> Pose:
    """Draw a pose: each angle uniform within 5 degrees, each shift uniform within 4 mm."""
    angles = rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG, 3)
    shifts = rng.uniform(-MAX_TRANSLATION_MM, MAX_TRANSLATION_MM, 3)
    return Pose((angles[0], angles[1], angles[2]), (shifts[0], shifts[1], shifts[2]))


def head_anatomy(
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), source: str = "auto", pose: Pose | None = None, skull: bool = True
) -> Anatomy:
    """Return the tissue fractions of the head on a grid of ``spacing_mm``.

    Args:
        spacing_mm: voxel size in mm along right, anterior, superior; each within 0.5 to 6.
        source: ``mni152`` (needs nilearn), ``ellipsoid`` (needs nothing) or ``auto`` (the first that is there).
        pose: rigid motion of the head; None leaves it in the source's own space.
        skull: False leaves the brain alone in air, as after an ideal skull-stripping.

    Raises:
        UsageError: spacing or source make no sense, or nilearn is missing for ``mni152``.
    """
    spacing = _checked_spacing(spacing_mm)
    name = resolve_source(source)
    head = head_source(name)
    shape, affine = _field_of_view(head, spacing)
    to_source = _pull_back(pose or Pose(), affine, shape)
    tissues = averaged_tissues(name, spacing)
    sampled = np.stack([_sample(t, head.affine, to_source, shape, "constant") for t in tissues])
    total = sampled.sum(0)
    brain = total >= 0.5
    fractions = dict(zip(BRAIN_TISSUES, sampled, strict=True))
    if skull:
        inner = _sample(head.inner, head.depth_affine, to_source, shape, "nearest")
        outer = _sample(head.outer, head.depth_affine, to_source, shape, "nearest")
        shells = _shells(inner, outer, float(np.mean(spacing)))
        room = np.clip(1 - total, 0, 1)
        fractions["csf"] = fractions["csf"] + shells.pop("csf") * room
        fractions |= {tissue: shell * room for tissue, shell in shells.items()}
    else:
        fractions |= {tissue: np.zeros(shape, np.float32) for tissue in (*BONE_TISSUES, *SOFT_TISSUES)}
    fractions["air"] = np.clip(1 - sum(fractions.values()), 0, 1).astype(np.float32)
    return Anatomy(MappingProxyType(fractions), brain, affine, name)


def _checked_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not all(0.5 <= s <= 6 for s in spacing):
        raise UsageError(
            f"head phantom, spacing_mm {list(spacing)}",
            "expected three numbers from 0.5 to 6",
            "give x, y, z in mm, e.g. 2 2 2",
        )
    return spacing[0], spacing[1], spacing[2]


def _field_of_view(
    head: HeadSource, spacing: tuple[float, float, float]
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Grid that holds the head in every pose that can be drawn, with air around it, and its RAS affine."""
    centre, extent = (head.low + head.high) / 2, head.high - head.low + 2 * _MARGIN_MM
    shape = np.ceil(extent / np.array(spacing)).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = centre - (shape - 1) / 2 * np.array(spacing)
    return (int(shape[0]), int(shape[1]), int(shape[2])), affine


def _pull_back(pose: Pose, affine: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """(4, 4) from voxel indices of the image to world mm of the source: the inverse of the pose after the affine."""
    centre = (affine @ [*((np.array(shape) - 1) / 2), 1.0])[:3]
    rotation = Rotation.from_euler("xyz", pose.rotation_deg, degrees=True).as_matrix()
    inverse = np.eye(4)
    inverse[:3, :3] = rotation.T
    inverse[:3, 3] = centre - rotation.T @ (centre + pose.translation_mm)
    return inverse @ affine


def _sample(
    array: NDArray[np.float32],
    array_affine: NDArray[np.float64],
    to_source: NDArray[np.float64],
    shape: tuple[int, int, int],
    mode: str,
) -> NDArray[np.float32]:
    matrix = np.linalg.inv(array_affine) @ to_source
    return ndimage.affine_transform(array, matrix, output_shape=shape, order=1, mode=mode)


def _shells(inner: NDArray[np.float32], outer: NDArray[np.float32], width_mm: float) -> dict[str, NDArray[np.float32]]:
    """Fractions of the shells around the brain, blurred over one voxel width as partial volume would.

    From inside out: CSF up to the inner table, two tables of cortical bone with diploe between them (Lynnerup et al.,
    Forensic Sci Int 117, 2001: 6-7 mm in all), then muscle where there is room, subcutaneous fat, and skin.
    """

    def beyond(distance: NDArray[np.float32], limit_mm: float) -> NDArray[np.float32]:
        return np.clip((distance - limit_mm) / width_mm + 0.5, 0, 1)

    past_inner, past_diploe = beyond(inner, 0), beyond(inner, _TABLE_MM)
    past_outer_table, past_bone = beyond(inner, SKULL_MM - _TABLE_MM), beyond(inner, SKULL_MM)
    out, past_fat, past_muscle = beyond(outer, 0), beyond(outer, -_SKIN_MM), beyond(outer, -_SKIN_MM - _FAT_MM)
    return {
        "csf": 1 - past_inner,
        "cortical_bone": past_inner - past_diploe + past_outer_table - past_bone,
        "diploe": past_diploe - past_outer_table,
        "skin": past_bone * (past_fat - out),
        "fat": past_bone * (past_muscle - past_fat),
        "muscle": past_bone * (1 - past_muscle),
    }
