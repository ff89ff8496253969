"""The chain of a bundle as the rules run it: everything random off, on a case thinned to a few hundred thousand voxels.

What a rule has to know of a chain is here: its steps in order, what it declares, the names of the channels that it
makes, the foreground that it knows, and the cases that come out of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    OneOf,
    Randomizable,
    RandomizableTransform,
    ResizeWithPadOrCrop,
    ScaleIntensity,
    ScaleIntensityd,
    ScaleIntensityRange,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentiles,
    ScaleIntensityRangePercentilesd,
)

from pipelines.preflight.finding import CannotRun
from pipelines.preflight.inspection import Inspection
from transforms.degradation import Severity
from transforms.degraded_pairs import DegradePaird, RandDegradePaird
from transforms.fusion import FusionConditiond
from transforms.fusion_samples import RandFuseByRuled
from transforms.gamma import Z_SCORES
from transforms.intensity import NormalizeIntensityInMask, NormalizeIntensityInMaskd
from transforms.masks import as_numpy

VOXELS = 200_000  # of a case: percentiles 1 and 99 are then known to a fraction of a percent
_SCALINGS = (
    ScaleIntensity,
    ScaleIntensityd,
    ScaleIntensityRange,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentiles,
    ScaleIntensityRangePercentilesd,
)


def steps_of(chain: Any) -> list[Any]:
    """Return the transforms of a chain in the order in which they run; ``OneOf`` and its kin stay one."""
    if isinstance(chain, (list, tuple)):
        return [step for member in chain for step in steps_of(member)]
    if type(chain) is Compose:
        return steps_of(chain.transforms)
    return [] if chain is None else [chain]


def without_randomness(chain: Any) -> Compose:
    """Return a copy of a chain with everything that is random switched off, and every degradation on purpose with it.

    What a random transform does in any case (the crop to a patch's size, a further channel) it still does.
    """
    off = copy.deepcopy(chain)
    for step in steps_of(off):
        _switch_off(step)
    return Compose(steps_of(off))


def _switch_off(step: Any) -> None:
    if isinstance(step, (Compose, OneOf)):  # OneOf, SomeOf, RandomOrder: whichever is drawn does nothing
        for member in step.transforms:
            _switch_off(member)
    elif isinstance(step, RandDegradePaird):
        step.probabilities = dict.fromkeys(step.probabilities, 0.0)
    elif isinstance(step, DegradePaird):
        step.severity = Severity()
    elif isinstance(step, RandFuseByRuled):
        step.target_probability = 1.0
    elif (
        isinstance(step, Randomizable)
        and hasattr(step, "prob")
        and (not isinstance(step, RandomizableTransform) or step.prob < 1 or type(step).__module__.startswith("monai."))
    ):
        step.prob = 0.0


def preparation_of(inspection: Inspection) -> Any:
    """Return the chain from files to prepared cases.

    Raises:
        CannotRun: the data set does not hold it.
    """
    preparation = getattr(inspection.need("train"), "preparation", None)
    if preparation is None:
        raise CannotRun("the training data set does not hold its preparation")
    return preparation


def declared_z_score(chain: Any) -> str:
    """Return over what the last normalisation of a chain is a z-score: ``foreground``, ``all`` voxels, or nothing."""
    over = ""
    for step in steps_of(chain):
        if isinstance(step, (NormalizeIntensityInMask, NormalizeIntensityInMaskd)):
            over = "foreground"
        elif isinstance(step, Z_SCORES):
            array_transform: Any = getattr(step, "normalizer", step)
            over = "foreground" if array_transform.nonzero else "all"
        elif isinstance(step, (*_SCALINGS, FusionConditiond)):
            over = ""
    return over


def seen_cases(inspection: Inspection, chain: Any) -> Iterator[dict[str, Any]]:
    """Yield training cases, thinned, after a chain with all that is random off."""
    off = without_randomness(chain)
    parity = getattr(inspection.need("train"), "crop_size", None)
    for case in inspection.training_cases:
        sample = thinned(case, parity)
        off.set_random_state(seed=0)
        yield {"foreground": sample.get("foreground"), **off(sample)}


def thinned(case: Mapping[str, Any], parity_of: Sequence[int] | None = None) -> dict[str, Any]:
    """Return a case with every n-th voxel of each axis, about ``VOXELS`` in all, as the chain after the cache takes it.

    Args:
        case: arrays (C, *spatial) and values, see ``spread``; lists of centres are left out.
        parity_of: voxels per axis; even or odd decides which voxel is the middle, and a chain that crops keeps its
            grid only where the case is even or odd too.
    """
    shape = np.shape(case["image"])[1:]
    n = max(1, round((np.prod([float(s) for s in shape]) / VOXELS) ** (1 / len(shape))))
    keep = [-(-size // n) for size in shape]
    if parity_of is not None and len(parity_of) == len(keep):
        keep = [k - 1 if k > 1 and (k - p) % 2 else k for k, p in zip(keep, parity_of, strict=True)]
    window = tuple(slice(0, k * n, n) for k in keep)
    result: dict[str, Any] = {}
    for key, value in case.items():
        if key.startswith("centres_") or key.endswith("_affine"):
            continue
        if not isinstance(value, (np.ndarray, torch.Tensor)):
            result[key] = value
        elif np.shape(value)[1:] != shape:
            result[key] = torch.as_tensor(np.array(value))
        else:
            result[key] = _with_affine(as_numpy(value)[(slice(None), *window)], case.get(f"{key}_affine"), n)
    return result


def _with_affine(values: np.ndarray, affine: Any, step: int) -> torch.Tensor:
    plain = torch.from_numpy(np.array(values))
    if affine is None:
        return plain
    coarse = torch.as_tensor(affine, dtype=torch.float64).clone()
    coarse[:3, :3] *= step
    return MetaTensor(plain, affine=coarse)


def centred(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the middle ``shape`` voxels of an array (C, *spatial), zeros where it has none."""
    return as_numpy(ResizeWithPadOrCrop(list(shape), mode="constant")(torch.from_numpy(np.array(array))))


def channel_names(inspection: Inspection, count: int) -> list[str]:
    """Return the names of the network's inputs: modalities, or what a fusion makes of them."""
    modalities = [str(name) for name in inspection.contract.get("modalities", ())]
    windows = inspection.contract.get("windows") or ()
    if inspection.task == "fusion" and count >= 2 + len(windows) and not isinstance(windows, (str, Mapping)):
        names = ["mri", *(f"ct {level:g}/{width:g}" for level, width in windows), "first guess"]
        return [*names, *(f"channel {index}" for index in range(len(names), count))]
    return modalities if len(modalities) == count else [f"channel {index}" for index in range(count)]


def foreground_of(sample: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """Return the foreground (*spatial) on the middle ``shape`` voxels of a sample; every voxel where it has none."""
    mask = sample.get("foreground")
    if mask is None or np.ndim(mask) != len(shape) + 1:
        return np.ones(tuple(shape), bool)
    inside = centred(as_numpy(mask), shape)[0] > 0
    return inside if inside.any() else np.ones(tuple(shape), bool)
