"""Lesions of a realistic volume in white matter, whose label is exact.

A lesion is a deformed ellipsoid grown from its centre in the order of a smooth score until it has its volume, to the
voxel: the total load of a subject is what was drawn, to half a voxel. Lesion tissue is placed on the voxels of the
label and on no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from pipelines.phantoms.anatomy import Anatomy
from transforms.errors import UsageError

_SMALLEST_LOAD_ML = 0.2
_CENTRE_WHITE = 0.8
_ALLOWED_WHITE = 0.4
_ALLOWED_CSF = 0.2
_SMALLEST_ML = 0.03
_EDGE_FRACTION = 0.6
_CORE_FRACTION = (0.75, 1.0)


@dataclass(frozen=True)
class LesionPrior:
    """How much lesion the subjects of a cohort have, and how bright it is.

    Attributes:
        median_ml: median over subjects of the total volume in mL, which is log-normal.
        log_sd: standard deviation of the volume's natural logarithm.
        largest_ml: no subject has more; none has less than 0.2 mL.
        t2_ms: bounds between which the T2 of a subject's lesions is drawn, uniformly. White matter has 70, grey matter
            83, so that 90 is next to invisible in FLAIR and 150 twice as bright as white matter.
    """

    median_ml: float = 2.0
    log_sd: float = 1.0
    largest_ml: float = 20.0
    t2_ms: tuple[float, float] = (150.0, 150.0)

    def __post_init__(self) -> None:
        if not (0 < self.median_ml <= self.largest_ml and self.largest_ml >= _SMALLEST_LOAD_ML and self.log_sd >= 0):
            raise UsageError(
                f"lesion volume, median {self.median_ml:g} mL, largest {self.largest_ml:g} mL",
                f"expected 0 < median <= largest, and a largest of {_SMALLEST_LOAD_ML} mL or more",
                "correct the volumes",
            )
        if not 0 < self.t2_ms[0] <= self.t2_ms[1]:
            raise UsageError(f"lesion T2 {self.t2_ms} ms", "expected 0 < lower <= upper", "correct the bounds")


DEFAULT_LESIONS = LesionPrior()


def draw_lesion_load(rng: np.random.Generator, prior: LesionPrior = DEFAULT_LESIONS) -> float:
    """Total lesion volume of one subject in mL: log-normal, then clipped."""
    load = prior.median_ml * np.exp(prior.log_sd * rng.standard_normal())
    return float(np.clip(load, _SMALLEST_LOAD_ML, prior.largest_ml))


def random_lesions(anatomy: Anatomy, rng: np.random.Generator, volume_ml: float) -> NDArray[np.float32]:
    """Place lesions in white matter and return the fraction of lesion tissue per voxel.

    The load is split among 1 + Poisson(2 sqrt(load)) lesions, or as many as have at least 0.03 mL (4 mm across) each.

    Args:
        anatomy: the head, on the image's grid.
        rng: every draw is made from it.
        volume_ml: total volume in mL, for instance from ``draw_lesion_load``.

    Returns:
        (X, Y, Z) float32: 0 without lesion, 0.6 to 1 inside; the label, ``fraction > 0.5``, holds all of it.

    Raises:
        UsageError: the volume exceeds half of the white matter or is less than half a voxel.
    """
    voxels = round(volume_ml / anatomy.voxel_volume_ml)
    white, csf = anatomy.fractions["white"], anatomy.fractions["csf"]
    free = np.argwhere(anatomy.brain & (white > _ALLOWED_WHITE) & (csf < _ALLOWED_CSF))
    if not 1 <= voxels <= len(free) // 2:
        raise UsageError(
            f"head phantom, lesion volume {volume_ml:.3g} mL",
            f"that is {voxels} voxels; the grid allows 1 to {len(free) // 2}",
            "choose another volume or a finer spacing",
        )
    fraction = np.zeros(white.shape, np.float32)
    smallest = max(1, round(_SMALLEST_ML / anatomy.voxel_volume_ml))
    for count in _split(voxels, 1 + int(rng.poisson(2 * np.sqrt(volume_ml))), smallest, rng):
        free = free[fraction[tuple(free.T)] == 0]
        chosen, values = _lesion(free, white[tuple(free.T)], count, anatomy, rng)
        fraction[tuple(chosen.T)] = values
    return fraction


def _split(voxels: int, lesions: int, smallest: int, rng: np.random.Generator) -> list[int]:
    """Split ``voxels`` at random into at most ``lesions`` parts of ``smallest`` voxels or more, the largest first."""
    lesions = max(1, min(lesions, voxels // smallest))
    base = min(smallest, voxels)
    shares = np.floor(rng.dirichlet(np.ones(lesions)) * (voxels - lesions * base)).astype(int) + base
    shares[np.argmax(shares)] += voxels - shares.sum()
    return sorted((int(s) for s in shares), reverse=True)


def _lesion(
    free: NDArray[np.int64], white: NDArray[np.float32], count: int, anatomy: Anatomy, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ``count`` of the ``free`` voxels (N, 3), around a centre deep in white matter, and their fractions."""
    deep = np.flatnonzero(white > _CENTRE_WHITE)
    centre = free[deep[rng.integers(len(deep))] if len(deep) else np.argmax(white)]
    offsets = (free - centre) * np.array(anatomy.spacing_mm)
    score = _ellipsoid_score(offsets, (0.75 / np.pi * count * anatomy.voxel_volume_ml * 1000) ** (1 / 3), rng)
    order = np.argsort(score, kind="stable")[:count]
    # 1 at the lesion's border and 0 at its centre, whatever the deformation has done to the score's range.
    depth = 1 - (score[order] - score[order[0]]) / max(score[order[-1]] - score[order[0]], 1e-9)
    core = rng.uniform(*_CORE_FRACTION)
    values = _EDGE_FRACTION + (core - _EDGE_FRACTION) * np.clip(depth / 0.3, 0, 1)
    return free[order], values.astype(np.float32)


def _ellipsoid_score(
    offsets_mm: NDArray[np.float64], radius_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Normalised distance (N,) from the centre of a random ellipsoid of ``radius_mm``, waved by six cosines."""
    ratios = np.exp(0.25 * rng.standard_normal(3))
    axes = radius_mm * ratios / np.prod(ratios) ** (1 / 3)
    turned = offsets_mm @ Rotation.random(random_state=rng).as_matrix()
    waves = rng.standard_normal((3, 6)) * 2 / radius_mm
    ripple = np.cos(offsets_mm @ waves + rng.uniform(0, 2 * np.pi, 6)).mean(1)
    return np.linalg.norm(turned / axes, axis=1) + 0.6 * ripple
