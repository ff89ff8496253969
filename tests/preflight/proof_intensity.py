"""Planted failures of intensity in the two bundles, and the runs that the proofs of all image families share."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose, MapTransform, ScaleIntensityd
from planted import Proof

from pipelines.embedded import head_cohort, pair_cohort
from pipelines.preflight import Finding, Inspection, Rule
from pipelines.preflight.chains import steps_of
from pipelines.preflight.intensity import RULES
from pipelines.runner import bundle_parser
from transforms import FusionConditiond, MeasureIntensityInMaskd, N4BiasFieldCorrectiond

SPACING = (4.0, 4.0, 4.0)
HEADS = {"spacing": list(SPACING), "patch_size": [32, 32, 32], "filters": [4, 8, 8]}
PAIRS = {"spacing": list(SPACING), "patch_size": [48, 56, 1], "channels": [4, 8, 8], "registration_check": "none"}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="preflight_images_")  # removed at the end of the process


def scratch(name: str) -> Path:
    return Path(_folder().name) / name


def inspect(bundle: str, cohort: Path, **overrides: Any) -> Inspection:
    where = {"manifest": str(cohort), "cache_dir": str(scratch("cache")), "runs_dir": str(scratch("runs"))}
    with bundle_parser(bundle, "train", {**where, **overrides}) as parser:
        inspection: Inspection = parser.get_parsed_content("inspection")
        if not hasattr(inspection.train, "preparation"):
            inspection.train.preparation = parser.get_parsed_content("preparation")
    return inspection


@functools.cache
def lesion_run() -> Inspection:
    """The lesion bundle on four heads of 4 mm with FLAIR and T1."""
    cohort = head_cohort(scratch("heads"), 4, SPACING, 3, ("flair", "t1"))
    assert cohort.path is not None
    return inspect("brain_lesion_mri_segmentation", cohort.path, **HEADS)


@functools.cache
def fusion_run() -> Inspection:
    """The fusion bundle on four pairs of 4 mm."""
    cohort = pair_cohort(scratch("pairs"), 4, SPACING, 6, ("t1",))
    assert cohort.path is not None
    return inspect("head_mri_ct_fusion", cohort.path, **PAIRS)


def changed(inspection: Inspection, side: str, **attributes: Any) -> Inspection:
    """The same run with other attributes of its training or validation data set."""
    dataset = copy.copy(getattr(inspection, side))
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return replace(inspection, **{side: dataset})


def rule_named(rules: Sequence[Rule], name: str) -> Rule:
    return next(rule for rule in rules if rule.name == name)


def findings(rule: Rule, *inspections: Inspection) -> list[Finding]:
    return [finding for inspection in inspections for finding in rule.check(inspection, rule.limits)]


class ZScoreBesideUnitRange(MapTransform):
    """The MRI as a z-score, the CT scaled to 0 .. 1: what one of the origin systems did."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        mri, ct = data["image"]
        scaled = torch.stack([(mri - mri.mean()) / mri.std(), (ct - ct.min()) / (ct.max() - ct.min())])
        return {**data, "image": scaled}


SCALE, CHAINS, STAGES, REGIONS = RULES


def with_scales_of_the_origin() -> Inspection:
    run = fusion_run()
    before = [step for step in steps_of(run.validation.transform) if not isinstance(step, FusionConditiond)]
    return changed(run, "validation", transform=Compose([*before, ZScoreBesideUnitRange("image")]))


def with_other_greys_in_training() -> Inspection:
    """Training sees 255 times what validation sees."""
    run = lesion_run()
    chain = Compose([*steps_of(run.train.transform), ScaleIntensityd("image", minv=None, maxv=None, factor=254.0)])
    return changed(run, "train", transform=chain)


def with_statistics_before_n4() -> Inspection:
    """Mean and standard deviation are measured, then N4 changes the image that they are to normalise."""
    run = lesion_run()
    chain = steps_of(run.train.preparation)
    assert isinstance(chain[-1], MeasureIntensityInMaskd)
    n4 = N4BiasFieldCorrectiond("image", mask_key="foreground", shrink_factor=4)
    return changed(run, "train", preparation=Compose([*chain, n4]))


def with_windows(*windows: Sequence[float]) -> Inspection:
    """The fusion with other windows of the CT."""
    run = fusion_run()
    before = [step for step in steps_of(run.validation.transform) if not isinstance(step, FusionConditiond)]
    chain = Compose([*before, FusionConditiond("image", windows)])
    contract = {**run.contract, "windows": [list(window) for window in windows]}
    return replace(changed(run, "validation", transform=chain), contract=contract)


PROOFS = [
    Proof(
        "R01",
        "Percentiles, mean and standard deviation of each input in the foreground, as the network sees it.",
        "the MRI was z-scored and the CT scaled to 0 .. 1: the fusion ignored the CT",
        lambda: findings(SCALE, with_scales_of_the_origin()),
        lambda: findings(SCALE, lesion_run(), fusion_run()),
    ),
    Proof(
        "R02",
        "The same cases through the chains of training and of validation, the random part off.",
        "training saw 0 .. 255, validation 0 .. 1",
        lambda: findings(CHAINS, with_other_greys_in_training()),
        lambda: findings(CHAINS, lesion_run(), fusion_run()),
    ),
    Proof(
        "R03",
        "Digests of the transforms in front of the statistics and in front of what they normalise.",
        "statistics were measured before N4 and applied after it",
        lambda: findings(STAGES, with_statistics_before_n4()),
        lambda: findings(STAGES, lesion_run(), fusion_run()),
    ),
    Proof(
        "R04",
        "Voxels of each region of the loss at a limit of its channel, and the contrast within the region.",
        "the window of the CT saturated the bone whose structure the loss compared",
        lambda: findings(REGIONS, with_windows((40, 80), (40, 160))),
        lambda: findings(REGIONS, lesion_run(), fusion_run()),
    ),
]
