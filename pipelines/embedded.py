"""The embedded cohorts with their manifests: generated once, proven afterwards to be the ones that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.manifests import Manifest, SplitPlan, import_folder, load_manifest, write_manifest
from pipelines.phantoms import DEFAULT_LESIONS, TISSUE_SD, LesionPrior, write_head_cohort, write_pair_cohort
from transforms.errors import UsageError

LICENCE = "generated; anatomy from the MNI152 template (ICBM, free to use with attribution)"
MANIFEST = "manifest.json"


def head_cohort(
    folder: Path,
    subjects: int,
    spacing_mm: Sequence[float],
    seed: int,
    modalities: Sequence[str],
    skull: bool = True,
    lesions: LesionPrior = DEFAULT_LESIONS,
    tissue_sd: float = TISSUE_SD,
) -> Manifest:
    """Return the manifest of the embedded head cohort in ``folder``, generated there unless it is there already.

    Raises:
        UsageError: the folder holds a cohort that was generated with other arguments.
    """
    source = (
        f"pipelines.phantoms.head, seed {seed}, {subjects} subjects, {_mm(spacing_mm)}, "
        f"{' '.join(modalities)}, {'with' if skull else 'without'} skull, {lesions}, tissue_sd {tissue_sd:g}"
    )
    there = _generated_before(folder, source)
    if there is not None:
        return there
    write_head_cohort(folder, subjects, spacing_mm, seed, modalities, skull=skull, lesions=lesions, tissue_sd=tissue_sd)
    manifest = import_folder(
        folder,
        {modality: f"{{subject}}/{modality}.nii.gz" for modality in modalities},
        "{subject}/lesion.nii.gz",
        {"brain": "{subject}/brain.nii.gz"},
        ["1:lesion"],
        name="head_phantoms",
        licence=LICENCE,
        source=source,
        units={"ct": "HU"} if "ct" in modalities else {},
        split=SplitPlan((0.6, 0.2, 0.2), seed=seed),
    )
    return write_manifest(manifest, folder / MANIFEST)


def pair_cohort(
    folder: Path,
    subjects: int,
    spacing_mm: Sequence[float],
    seed: int,
    contrasts: Sequence[str],
    lesions: LesionPrior = DEFAULT_LESIONS,
    tissue_sd: float = TISSUE_SD,
) -> Manifest:
    """Return the manifest of clean pairs of MRI and CT in ``folder``, generated there unless it is there already.

    Every contrast of a subject is a case of its own; the split is by subject.

    Raises:
        UsageError: the folder holds a cohort that was generated with other arguments.
    """
    source = (
        f"pipelines.phantoms.cohorts pairs, seed {seed}, {subjects} subjects, {_mm(spacing_mm)}, "
        f"{' '.join(contrasts)}, {lesions}, tissue_sd {tissue_sd:g}"
    )
    there = _generated_before(folder, source)
    if there is not None:
        return there
    write_pair_cohort(folder, subjects, spacing_mm, seed, contrasts, lesions=lesions, tissue_sd=tissue_sd)
    manifest = import_folder(
        folder,
        {modality: f"{{subject}}/{{session}}/{modality}.nii.gz" for modality in ("mri", "ct")},
        "{subject}/{session}/lesion.nii.gz",
        {role: f"{{subject}}/{{session}}/{role}.nii.gz" for role in ("brain", "bone")},
        ["1:lesion"],
        name="head_pairs",
        licence=LICENCE,
        source=source,
        task="fusion",
        units={"ct": "HU"},
        split=SplitPlan((0.6, 0.2, 0.2), seed=seed),
    )
    return write_manifest(manifest, folder / MANIFEST)


def _mm(spacing_mm: Sequence[float]) -> str:
    return f"{'x'.join(f'{s:g}' for s in spacing_mm)} mm"


def _generated_before(folder: Path, source: str) -> Manifest | None:
    """Return the cohort that stands in ``folder``, or None; ``source`` says with which arguments it must be made."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder / MANIFEST, check="sha256")
    if manifest.source != source:
        raise UsageError(
            f"cohort {folder}: generated with other arguments",
            f"there: {manifest.source}; asked for: {source}",
            "choose another folder, or remove this one",
        )
    return manifest
