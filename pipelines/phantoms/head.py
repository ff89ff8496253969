"""The embedded head cohort: T1w, T2w, FLAIR and CT of heads with lesions, generated, with labels that are exact.

Subject k of seed s is the same, bit for bit, whenever and with whatever other modalities it is made: pose, lesions,
tissues and each modality draw from generators of their own. Nothing is downloaded and nothing is resampled after the
lesions are placed. Images hold whole numbers, as a scanner stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.phantoms.anatomy import Anatomy, head_anatomy, random_pose
from pipelines.phantoms.lesions import DEFAULT_LESIONS, LesionPrior, draw_lesion_load, random_lesions
from pipelines.phantoms.signal import (
    MODALITIES,
    TISSUE_SD,
    TISSUES,
    Tissue,
    bias_field,
    rician_noise,
    tissue_image,
    tissue_signal,
    varied_tissues,
)
from transforms.errors import UsageError

MR_NOISE = 0.04
CT_NOISE_HU = 4.0
MR_WHITE = 400.0
_GAIN_LOG_SD = 0.25
_CT_RANGE_HU = (-1024, 3071)


@dataclass(frozen=True)
class HeadSubject:
    """One generated subject.

    Attributes:
        subject: ``head_000``, ``head_001``, ...
        images: modality -> (X, Y, Z) float32 of whole numbers; ``ct`` in HU, the others in arbitrary units.
        lesion: (X, Y, Z) uint8, 1 exactly where lesion tissue was placed.
        brain: (X, Y, Z) uint8.
        bone: (X, Y, Z) uint8, disjoint from ``brain``; empty without skull.
        affine: (4, 4), RAS, voxel indices to mm.
        lesion_volume_ml: volume of ``lesion`` in mL.
        source: ``mni152`` or ``ellipsoid``.
    """

    subject: str
    images: dict[str, NDArray[np.float32]]
    lesion: NDArray[np.uint8]
    brain: NDArray[np.uint8]
    bone: NDArray[np.uint8]
    affine: NDArray[np.float64]
    lesion_volume_ml: float
    source: str


def head_subject(
    seed: int,
    subject_index: int,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    modalities: Sequence[str] = MODALITIES,
    source: str = "auto",
    skull: bool = True,
    lesions: LesionPrior = DEFAULT_LESIONS,
    tissue_sd: float = TISSUE_SD,
    clean: bool = False,
) -> HeadSubject:
    """Generate one subject.

    MR: a bias field of +-20 % in the brain, a gain that differs from subject to subject, and Rician noise of 4 % of the
    white matter signal (BrainWeb's definition of percent noise). CT: Gaussian noise of 4 HU.

    Args:
        seed: of the cohort.
        subject_index: within the cohort.
        spacing_mm: voxel size, as in ``head_anatomy``.
        modalities: any of ``t1``, ``t2``, ``flair``, ``ct``.
        source: ``mni152``, ``ellipsoid`` or ``auto``.
        skull: False leaves the brain alone in air.
        lesions: how much lesion, and how bright.
        tissue_sd: relative standard deviation over subjects of every property of every tissue.
        clean: without noise and bias field, a reference for what degrades images.

    Raises:
        UsageError: an argument is out of its range, or nilearn is missing for ``mni152``.
    """
    check_modalities(modalities)
    if seed < 0 or subject_index < 0:
        raise UsageError(
            f"head phantom, seed {seed}, subject {subject_index}", "both must be 0 or more", "choose others"
        )
    streams = np.random.SeedSequence([seed, subject_index]).spawn(4 + len(MODALITIES))
    for_pose, for_lesions, for_tissues, *for_images, for_t2 = (np.random.default_rng(stream) for stream in streams)
    anatomy = head_anatomy(spacing_mm, source, random_pose(for_pose), skull)
    lesion_fraction = random_lesions(anatomy, for_lesions, draw_lesion_load(for_lesions, lesions))
    diseased = with_lesions(anatomy, lesion_fraction)
    tissues = varied_tissues(for_tissues, tissue_sd)
    brightness = for_t2.uniform(*lesions.t2_ms) / TISSUES["lesion"].t2_ms
    tissues["lesion"] = replace(tissues["lesion"], t2_ms=tissues["lesion"].t2_ms * brightness)
    generators = dict(zip(MODALITIES, for_images, strict=True))
    label = (lesion_fraction > 0.5).astype(np.uint8)
    return HeadSubject(
        subject=f"head_{subject_index:03d}",
        images={m: _image(m, diseased, tissues, generators[m], clean) for m in modalities},
        lesion=label,
        brain=anatomy.brain.astype(np.uint8),
        bone=anatomy.bone.astype(np.uint8),
        affine=anatomy.affine,
        lesion_volume_ml=float(label.sum()) * anatomy.voxel_volume_ml,
        source=anatomy.source,
    )


def with_lesions(anatomy: Anatomy, lesion_fraction: NDArray[np.float32]) -> Anatomy:
    """Return ``anatomy`` with the tissue ``lesion``, which takes its share of a voxel from the tissues there."""
    fractions = {tissue: fraction * (1 - lesion_fraction) for tissue, fraction in anatomy.fractions.items()}
    return replace(anatomy, fractions={**fractions, "lesion": lesion_fraction})


def check_modalities(modalities: Sequence[str]) -> None:
    """Raise ``UsageError`` unless ``modalities`` are different ones of ``MODALITIES``, at least one."""
    unknown = [m for m in modalities if m not in MODALITIES]
    if unknown or not modalities or len(set(modalities)) < len(modalities):
        raise UsageError(
            f"head phantom, modalities {list(modalities)}",
            f"expected different ones of {', '.join(MODALITIES)}",
            "correct the list",
        )


def _image(
    modality: str, anatomy: Anatomy, tissues: dict[str, Tissue], rng: np.random.Generator, clean: bool
) -> NDArray[np.float32]:
    signals = {name: tissue_signal(modality, tissue) for name, tissue in tissues.items()}
    image = tissue_image(anatomy.fractions, signals)
    if modality == "ct":
        image = image if clean else image + CT_NOISE_HU * rng.standard_normal(image.shape)
        return np.clip(np.rint(image), *_CT_RANGE_HU).astype(np.float32)
    white = tissue_signal(modality, TISSUES["white"])
    gain = MR_WHITE / white * np.exp(_GAIN_LOG_SD * rng.standard_normal())
    received = gain * image
    if not clean:
        received = rician_noise(received * bias_field(anatomy.brain, rng), MR_NOISE * gain * white, rng)
    return np.rint(received).astype(np.float32)
