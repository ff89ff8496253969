"""The embedded cohorts: small, deterministic, generated on the user's machine, no download."""

from __future__ import annotations

from pipelines.phantoms.anatomy import Anatomy, Pose, head_anatomy
from pipelines.phantoms.cohorts import write_head_cohort, write_pair_cohort
from pipelines.phantoms.head import HeadSubject, head_subject
from pipelines.phantoms.lesions import DEFAULT_LESIONS, LesionPrior, draw_lesion_load, random_lesions
from pipelines.phantoms.signal import TISSUE_SD

__all__ = [
    "DEFAULT_LESIONS",
    "TISSUE_SD",
    "Anatomy",
    "HeadSubject",
    "LesionPrior",
    "Pose",
    "draw_lesion_load",
    "head_anatomy",
    "head_subject",
    "random_lesions",
    "write_head_cohort",
    "write_pair_cohort",
]
