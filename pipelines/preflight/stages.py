"""R03: statistics belong to the stage of the chain that they normalise.

Mean and deviation that were measured before a transform of intensities, and are applied after it, normalise an image
that nobody has measured. Which transforms change intensities is found by trying them on a case with noise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Randomizable,
)

from pipelines.manifests.cache import chain_digest
from pipelines.preflight.chains import preparation_of, steps_of, thinned
from pipelines.preflight.distributions import RELATIVE
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from transforms.fusion import FusionConditiond, FusionReferenced, MeasurePaird
from transforms.fusion_samples import RandFuseByRuled
from transforms.intensity import MeasureIntensityInMaskd, NormalizeIntensityInMaskd
from transforms.masks import as_numpy

NOISE_SHARE = 0.25  # of the range: what is added to a case to see whether a transform changes intensities


def stage_findings(
    between: Sequence[str], transforms: tuple[str, str], chain: str, digests: tuple[str, str]
) -> list[Finding]:
    """R03: judge the stage of statistics by the digests of what stands in front of them and of the normalisation.

    Args:
        between: transforms that change intensities after the statistics and before the normalisation.
        transforms: the one that measures, the one that normalises.
        chain: ``training`` or ``validation``.
        digests: of the transforms of intensity in front of the one and of the other.
    """
    if digests[0] == digests[1]:
        return []
    statistics, normaliser = transforms
    return [
        Finding(
            "R03",
            "error",
            f"{statistics} measures in front of {', '.join(between)}, {normaliser} of {chain} uses it behind",
            f"digests {digests[0][:8]} and {digests[1][:8]} of what comes before",
            "the same transforms before both",
            "statistics of another stage: the image that is normalised is not the one that was measured",
            f"Move {statistics} behind {between[-1] if between else 'them'}.",
        )
    ]


def check_stages(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R03 in both chains, from the files to the network."""
    preparation = steps_of(preparation_of(inspection))
    findings: list[Finding] = []
    for name in ("train", "validation"):
        chain = [*preparation, *steps_of(inspection.need(name).transform)]
        for user in range(len(chain)):
            measured = _where_measured(chain, user)
            if measured is not None:
                between = _that_change(chain[measured + 1 : user], inspection)
                before = [step for step in chain[:measured] if not isinstance(step, Randomizable)]
                digests = chain_digest(before), chain_digest([*before, *between])
                names = type(chain[measured]).__name__, type(chain[user]).__name__
                split = "training" if name == "train" else name
                findings += stage_findings([type(step).__name__ for step in between], names, split, digests)
    return findings


def _where_measured(chain: Sequence[Any], user: int) -> int | None:
    """Return where the statistics that a normalisation uses were measured last, or None where it uses none."""
    step = chain[user]
    keys: set[Any] = set()
    if isinstance(step, NormalizeIntensityInMaskd):
        keys = set(step.statistics_keys) - {None}
    elif isinstance(step, (FusionConditiond, FusionReferenced, RandFuseByRuled)):
        keys = {step.scale_key}
    for index in reversed(range(user)):
        other = chain[index]
        made: set[Any] = set()
        if isinstance(other, MeasureIntensityInMaskd):
            made = set(other.statistics_keys)
        elif isinstance(other, MeasurePaird):
            made = {other.scale_key}
        if keys & made:
            return index
    return None


def _that_change(steps: Sequence[Any], inspection: Inspection) -> list[Any]:
    """Return the deterministic steps that change intensities, tried on a noisy case: it has values to clip and scale.

    Raises:
        CannotRun: a step does not work on a prepared case.
    """
    if not steps:
        return []
    sample = thinned(inspection.training_cases[0])
    image = as_numpy(sample["image"]).astype(np.float32)
    draw = np.random.default_rng(0)
    noise = [NOISE_SHARE * (channel.max() - channel.min()) for channel in image]
    noisy = image + np.stack([draw.uniform(-n, n, image.shape[1:]) for n in noise]).astype(np.float32)
    sample["image"] = _same_kind(noisy, sample["image"])
    changing = []
    for step in steps:
        if isinstance(step, (Randomizable, MeasureIntensityInMaskd, MeasurePaird)) or _moves(step):
            continue
        before = as_numpy(sample["image"])
        try:
            sample = dict(copy.deepcopy(step)(sample))
        except Exception as problem:
            raise CannotRun(f"{type(step).__name__} cannot be tried on a prepared case: {problem}") from problem
        after = as_numpy(sample["image"])
        span = float(before.max()) - float(before.min())
        if after.shape != before.shape or float(np.abs(after - before).max()) > RELATIVE * span:
            changing.append(step)
    return changing


def _same_kind(values: np.ndarray, image: torch.Tensor) -> torch.Tensor:
    plain = torch.from_numpy(values)
    return MetaTensor(plain, affine=image.affine) if isinstance(image, MetaTensor) else plain


def _moves(step: Any) -> bool:
    """Whether a transform of MONAI moves voxels or cuts them away, which leaves intensities what they are."""
    return type(step).__module__.startswith(("monai.transforms.spatial", "monai.transforms.croppad"))


RULES: tuple[Rule, ...] = (Rule("R03", "statistics of the stage that they normalise", check_stages),)
