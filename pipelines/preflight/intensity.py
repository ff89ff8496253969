"""Intensities as the network meets them: one scale for all inputs, one scale in training and validation.

A network cannot say that one of its inputs is a hundred times as large as another, or that validation shows it other
greys than training did; it only learns badly. Every case goes through the chain of the bundle, thinned to about 200 000
voxels, and what comes out is summed up per channel in the foreground:

    R01  inputs on one scale      R02  training and validation alike, the random part switched off
    R03  statistics measured at the stage that they normalise      R04  no window that saturates what a loss looks at
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    NormalizeIntensityd,
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

from pipelines.manifests.cache import chain_digest
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from transforms.degradation import Severity
from transforms.degraded_pairs import DegradePaird, RandDegradePaird
from transforms.fusion import CONDITION_RANGE, REFERENCE_CHANNELS, FusionConditiond, FusionReferenced, MeasurePaird
from transforms.fusion_samples import RandFuseByRuled
from transforms.intensity import MeasureIntensityInMaskd, NormalizeIntensityInMask, NormalizeIntensityInMaskd
from transforms.masks import as_numpy

VOXELS = 200_000  # of a case: percentiles 1 and 99 are then known to a fraction of a percent
NOISE_SHARE = 0.25  # of the range: what is added to a case to see whether a transform changes intensities
CROWD = 0.01  # share of the other voxels at a limit from which on a region that is there too cannot be told from them
_RELATIVE = 1e-6

_Z_SCORES = (NormalizeIntensity, NormalizeIntensityd, NormalizeIntensityInMask, NormalizeIntensityInMaskd)
_SCALINGS = (
    ScaleIntensity,
    ScaleIntensityd,
    ScaleIntensityRange,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentiles,
    ScaleIntensityRangePercentilesd,
)


@dataclass(frozen=True)
class Distribution:
    """Intensities of one channel of one case over its foreground, as the network sees them.

    Attributes:
        case, channel: names.
        low, high: percentiles 1 and 99.
        mean, std: of all voxels of the foreground.
        largest: largest absolute value.
    """

    case: str
    channel: str
    low: float
    high: float
    mean: float
    std: float
    largest: float

    @property
    def width(self) -> float:
        """The distance of the percentiles 1 and 99."""
        return self.high - self.low

    @property
    def constant(self) -> bool:
        """Whether the channel shows nothing: a modality that the case lacks."""
        return self.std <= _RELATIVE * max(1.0, abs(self.mean))


@dataclass(frozen=True)
class Region:
    """What a region that a loss looks at has become in one channel of one case.

    Attributes:
        case, roi, channel: names.
        voxels: of the region.
        at_limit: share of them (0 to 1) at the lowest or highest value that the channel can have.
        spread: standard deviation within the region over the channel's range.
        compared: a loss compares intensities here, so that they must differ; else the region need only be told apart.
    """

    case: str
    roi: str
    channel: str
    voxels: int
    at_limit: float
    spread: float
    compared: bool = False


def distribution(values: np.ndarray, case: str, channel: str) -> Distribution:
    """Sum up the voxels (n,) of a channel in the foreground; n >= 1."""
    low, high = np.percentile(values, (1, 99))
    exact = values.astype(np.float64)
    return Distribution(
        case, channel, float(low), float(high), float(exact.mean()), float(exact.std()), float(np.abs(exact).max())
    )


def region(
    values: np.ndarray,
    limits: tuple[float, float],
    case: str,
    roi: str,
    channel: str,
    compared: bool = False,
    others: np.ndarray | None = None,
) -> Region:
    """Sum up the voxels (n,) of a region in a channel that runs between ``limits``; n >= 1.

    With ``others``, the voxels (m,) of the foreground around it, a limit counts only where more than ``CROWD`` of them
    stand at it too: a bright lesion alone at the upper limit is still told from all else.
    """
    span = max(limits[1] - limits[0], float(np.finfo(np.float32).tiny))
    at_limit = np.zeros(len(values), bool)
    for sign, limit in ((1.0, limits[0]), (-1.0, limits[1])):
        inner = limit + sign * _RELATIVE * span
        if others is None or (len(others) and float((sign * others <= sign * inner).mean()) > CROWD):
            at_limit |= sign * values <= sign * inner
    spread = float(values.astype(np.float64).std() / span)
    return Region(case, roi, channel, len(values), float(at_limit.mean()), spread, compared)


# --- judging --------------------------------------------------------------------------------------------------------


def scale_findings(
    seen: Sequence[Distribution],
    limits: Mapping[str, float],
    z_score: bool = False,
    modality_of: Mapping[str, str] | None = None,
) -> list[Finding]:
    """R01: judge the inputs of a network.

    Args:
        seen: every channel of some cases; a channel that shows nothing in a case is one that the case lacks.
        limits: ``ratio`` of the widest to the narrowest channel (medians over cases), ``mean``, ``std_low``,
            ``std_high`` of a z-score (medians), ``largest`` absolute value in any case.
        z_score: the chain declares that mean is 0 and standard deviation 1.
        modality_of: channels that are views of one modality (windows of a CT) stand together by their widest.
    """
    channels = _by_channel(seen)
    shown = {name: [d for d in some if not d.constant] for name, some in channels.items()}
    findings = [
        _scale(
            f"input {name} is constant in every case that was looked at",
            "standard deviation 0 in the foreground",
            "an input with contrast",
            "the chain saturates or blanks it, or its files are empty",
            f"Look at the files of {name} and at the window or clip it goes through.",
            [d.case for d in channels[name]],
        )
        for name, some in shown.items()
        if not some
    ]
    widths: dict[str, float] = {}
    for name, some in shown.items():
        if some:
            modality = (modality_of or {}).get(name, name)
            widths[modality] = max(widths.get(modality, 0.0), float(np.median([d.width for d in some])))
    if len(widths) > 1:
        narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
        ratio = widths[wide] / widths[narrow] if widths[narrow] > 0 else np.inf
        if ratio > limits["ratio"]:
            findings.append(
                _scale(
                    f"inputs {wide} and {narrow} are on different scales",
                    f"widths (percentiles 1 to 99) {widths[wide]:.3g} and {widths[narrow]:.3g}, ratio {ratio:.2f}",
                    f"ratio <= {limits['ratio']:g}",
                    "modalities normalised by different methods; the narrow one is drowned",
                    "Normalise all modalities by one method.",
                    widths=widths,
                )
            )
    for name, some in shown.items() if z_score else ():
        mean, std = (float(np.median([getattr(d, what) for d in some])) if some else 0.0 for what in ("mean", "std"))
        if some and (abs(mean) > limits["mean"] or not limits["std_low"] <= std <= limits["std_high"]):
            findings.append(
                _scale(
                    f"input {name} is declared a z-score and is none",
                    f"mean {mean:.2f}, standard deviation {std:.2f} in the foreground",
                    f"mean within +-{limits['mean']:g}, standard deviation "
                    f"{limits['std_low']:g} to {limits['std_high']:g}",
                    "statistics of other cases, of another mask or of another stage of the chain",
                    "Measure mean and standard deviation of each case where they are applied.",
                    [d.case for d in sorted(some, key=lambda d: -abs(d.mean))],
                )
            )
    far = sorted((d for d in seen if d.largest > limits["largest"]), key=lambda d: -d.largest)
    if far:
        findings.append(
            _scale(
                f"input {far[0].channel} has extreme values",
                f"{far[0].largest:.4g} in case {far[0].case}, {len(far)} channels of cases in all",
                f"absolute values <= {limits['largest']:g}",
                "no normalisation, or outliers that were not clipped before it",
                "Clip to percentiles, then normalise.",
                [d.case for d in far],
            )
        )
    return findings


def chain_findings(
    training: Sequence[Distribution], validation: Sequence[Distribution], limits: Mapping[str, float]
) -> list[Finding]:
    """R02: judge the same cases after the chain of training, its random part off, and after that of validation.

    Args:
        training, validation: the same channels of the same cases.
        limits: ``width_low`` and ``width_high`` of the ratio of widths, ``shift`` of the means in standard deviations
            of validation; medians over cases count.
    """
    theirs = {(d.case, d.channel): d for d in validation if not d.constant}
    findings = []
    for name, some in _by_channel(training).items():
        pairs = [(ours, theirs[ours.case, name]) for ours in some if (ours.case, name) in theirs]
        if not pairs:
            continue
        ratios = [ours.width / v.width if v.width > 0 else 1.0 for ours, v in pairs]
        shifts = [(ours.mean - v.mean) / v.std for ours, v in pairs]
        ratio, shift = float(np.median(ratios)), float(np.median(shifts))
        if limits["width_low"] <= ratio <= limits["width_high"] and abs(shift) <= limits["shift"]:
            continue
        order = np.argsort([-abs(s) - abs(np.log(max(r, 1e-9))) for s, r in zip(shifts, ratios, strict=True)])
        findings.append(
            Finding(
                "R02",
                "error",
                f"input {name} is not the same in training and validation, with all that is random off",
                f"width x {ratio:.3g}, mean moved by {shift:+.2f} standard deviations",
                f"width x {limits['width_low']:g} to {limits['width_high']:g}, mean within +-{limits['shift']:g}",
                "an intensity transform stands in one of the two chains only",
                "Give both chains the same deterministic transforms.",
                cases=tuple(pairs[index][0].case for index in order),
            )
        )
    return findings


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


def region_findings(
    regions: Sequence[Region], limits: Mapping[str, float], channels_of: Mapping[str, Sequence[str]] | None = None
) -> list[Finding]:
    """R04: judge whether a window leaves a region readable. Cases are pooled, each by its voxels.

    A region that is compared must be readable in that channel; any other in at least one of its channels.

    Args:
        regions: of some cases.
        limits: ``saturated`` share of a region at a limit, ``spread`` of a region that is compared.
        channels_of: channels in which a region has to be readable, by its name; all where it is not named.
    """
    pooled: dict[tuple[str, str, bool], list[Region]] = defaultdict(list)
    for each in regions:
        pooled[each.roi, each.channel, each.compared].append(each)
    findings = []
    inputs: dict[str, dict[str, float]] = defaultdict(dict)
    for (roi, channel, compared), some in pooled.items():
        weights = [each.voxels for each in some]
        saturated = float(np.average([each.at_limit for each in some], weights=weights))
        spread = float(np.average([each.spread for each in some], weights=weights))
        if not compared:
            if channels_of is None or channel in channels_of.get(roi, [channel]):
                inputs[roi][channel] = saturated
        elif saturated > limits["saturated"] or spread < limits["spread"]:
            findings.append(_saturated(roi, channel, saturated, spread, limits, _worst(some)))
    for roi, shares in inputs.items():
        best = min(shares, key=shares.__getitem__)
        if shares[best] > limits["saturated"]:
            some = [each for each in regions if each.roi == roi and each.channel == best and not each.compared]
            findings.append(_saturated(roi, best, shares[best], None, limits, _worst(some)))
    return findings


def _worst(some: Iterable[Region]) -> tuple[str, ...]:
    return tuple(each.case for each in sorted(some, key=lambda each: (-each.at_limit, each.spread)))


def _saturated(
    roi: str, channel: str, saturated: float, spread: float | None, limits: Mapping[str, float], cases: tuple[str, ...]
) -> Finding:
    contrast = "" if spread is None else f", standard deviation {spread:.3f} of the range"
    return Finding(
        "R04",
        "error",
        f"{roi} is saturated in {channel}" + ("" if spread is not None else ", and in no other input less"),
        f"{100 * saturated:.1f} % of its voxels at a limit{contrast}",
        f"<= {100 * limits['saturated']:g} % at a limit"
        + ("" if spread is None else f", standard deviation >= {limits['spread']:g} of the range"),
        "a window or a percentile clip that is too narrow for this tissue",
        f"Widen the window or the clip of {channel}, or add one that holds {roi}.",
        cases=cases,
    )


def _scale(
    what: str, measured: str, threshold: str, cause: str, fix: str, cases: Sequence[str] = (), **evidence: Any
) -> Finding:
    return Finding("R01", "error", what, measured, threshold, cause, fix, "configuration", tuple(cases), evidence)


def _by_channel(some: Iterable[Distribution]) -> dict[str, list[Distribution]]:
    channels: dict[str, list[Distribution]] = {}
    for each in some:
        channels.setdefault(each.channel, []).append(each)
    return channels


# --- the chain of a bundle ------------------------------------------------------------------------------------------


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


def distributions(sample: Mapping[str, Any], names: Sequence[str], inside: np.ndarray) -> list[Distribution]:
    """Sum up every channel of a sample's image (C, *spatial) over ``inside`` (*spatial)."""
    image = as_numpy(sample["image"])
    case = str(sample.get("case", ""))
    return [distribution(channel[inside], case, name) for channel, name in zip(image, names, strict=False)]


def seen_cases(inspection: Inspection, chain: Any) -> Iterator[dict[str, Any]]:
    """Yield training cases, thinned, after a chain with all that is random off."""
    off = without_randomness(chain)
    parity = getattr(inspection.need("train"), "crop_size", None)
    for case in inspection.training_cases:
        sample = thinned(case, parity)
        off.set_random_state(seed=0)
        yield {"foreground": sample.get("foreground"), **off(sample)}


def declared_z_score(chain: Any) -> str:
    """Return over what the last normalisation of a chain is a z-score: ``foreground``, ``all`` voxels, or nothing."""
    over = ""
    for step in steps_of(chain):
        if isinstance(step, (NormalizeIntensityInMask, NormalizeIntensityInMaskd)):
            over = "foreground"
        elif isinstance(step, _Z_SCORES):
            array_transform: Any = getattr(step, "normalizer", step)
            over = "foreground" if array_transform.nonzero else "all"
        elif isinstance(step, (*_SCALINGS, FusionConditiond)):
            over = ""
    return over


# --- checks ---------------------------------------------------------------------------------------------------------


def check_scale(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R01 over the chain that the network sees at validation and in the hospital."""
    chain = inspection.need("validation").transform
    z_score = declared_z_score([getattr(inspection.train, "preparation", None), chain])
    seen: list[Distribution] = []
    for sample in seen_cases(inspection, chain):
        image = as_numpy(sample["image"])
        inside = np.ones(image.shape[1:], bool) if z_score == "all" else foreground_of(sample, image.shape[1:])
        seen += distributions(sample, channel_names(inspection, len(image)), inside)
    windows = {each.channel: "ct" for each in seen if each.channel.startswith("ct ")}
    return scale_findings(seen, limits, bool(z_score), windows if inspection.task == "fusion" else None)


def check_chains(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R02: the same training cases through both chains, compared where the two still show the same voxels."""
    sides: tuple[list[Distribution], list[Distribution]] = ([], [])
    chains = inspection.need("train").transform, inspection.need("validation").transform
    for samples in zip(*(seen_cases(inspection, chain) for chain in chains), strict=True):
        images = [as_numpy(sample["image"]) for sample in samples]
        common = [min(a, b) for a, b in zip(images[0].shape[1:], images[1].shape[1:], strict=True)]
        inside = foreground_of(samples[1], common)
        names = channel_names(inspection, min(len(image) for image in images))
        for side, sample, image in zip(sides, samples, images, strict=True):
            side += distributions({**sample, "image": centred(image, common)}, names, inside)
    return chain_findings(*sides, limits)


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


def check_regions(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R04 over labels, and in a fusion over the regions in which its loss compares intensities."""
    regions: list[Region] = []
    channels_of: dict[str, Sequence[str]] = {}
    for sample in seen_cases(inspection, inspection.need("validation").transform):
        image, label = as_numpy(sample["image"]), as_numpy(sample["label"])
        names = channel_names(inspection, len(image))
        if inspection.task == "fusion" and len(label) == len(REFERENCE_CHANNELS):
            regions += _fusion_regions(sample, image, label, names)
            channels_of = {"brain": names[:1], "lesion": names[:1], "bone": names[1:-1]}
        else:
            regions += _label_regions(sample, image, label, names, _label_names(inspection))
    return region_findings(regions, limits, channels_of)


def preparation_of(inspection: Inspection) -> Any:
    """Return the chain from files to prepared cases.

    Raises:
        CannotRun: the data set does not hold it.
    """
    preparation = getattr(inspection.need("train"), "preparation", None)
    if preparation is None:
        raise CannotRun("the training data set does not hold its preparation")
    return preparation


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
        if after.shape != before.shape or float(np.abs(after - before).max()) > _RELATIVE * span:
            changing.append(step)
    return changing


def _same_kind(values: np.ndarray, image: torch.Tensor) -> torch.Tensor:
    plain = torch.from_numpy(values)
    return MetaTensor(plain, affine=image.affine) if isinstance(image, MetaTensor) else plain


def _moves(step: Any) -> bool:
    """Whether a transform of MONAI moves voxels or cuts them away, which leaves intensities what they are."""
    return type(step).__module__.startswith(("monai.transforms.spatial", "monai.transforms.croppad"))


def _label_names(inspection: Inspection) -> dict[int, str]:
    return {int(each["id"]): str(each["name"]) for each in inspection.contract.get("labels", ()) if each["id"] > 0}


def _label_regions(
    sample: Mapping[str, Any], image: np.ndarray, label: np.ndarray, names: Sequence[str], labels: Mapping[int, str]
) -> list[Region]:
    inside = foreground_of(sample, image.shape[1:])
    regions = []
    for channel, name in zip(image, names, strict=True):
        limits = float(channel[inside].min()), float(channel[inside].max())
        others = channel[inside & (label[0] == 0)]
        for index, roi in labels.items():
            there = channel[label[0] == index]
            if there.size and limits[1] > limits[0]:
                regions.append(region(there, limits, str(sample["case"]), roi, name, others=others))
    return regions


def _fusion_regions(
    sample: Mapping[str, Any], image: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> list[Region]:
    """Regions of the inputs (-2 .. 2), and of the references (0 .. 1) that the loss compares the fused image with."""
    truth = dict(zip(REFERENCE_CHANNELS, label, strict=True))
    case = str(sample["case"])
    around = foreground_of(sample, image.shape[1:]) & (truth["lesion"] < 0.5)
    regions = []
    for roi, compared_with in (("brain", "mri_display"), ("bone", "ct_display"), ("lesion", "")):
        there = truth[roi] > 0.5
        if not there.any():
            continue
        if compared_with:
            values = truth[compared_with][there]
            regions.append(region(values, (0.0, 1.0), case, roi, f"{compared_with}, the loss's reference", True))
        for channel, name in zip(image, names, strict=False):
            others = channel[around] if roi == "lesion" else None
            regions.append(region(channel[there], CONDITION_RANGE, case, roi, name, others=others))
    return regions


RULES: tuple[Rule, ...] = (
    Rule(
        "R01",
        "inputs on one scale",
        check_scale,
        {"ratio": 2.0, "mean": 0.5, "std_low": 0.5, "std_high": 2.0, "largest": 10.0},
    ),
    Rule(
        "R02",
        "training and validation chains alike",
        check_chains,
        {"width_low": 0.8, "width_high": 1.25, "shift": 0.25},
    ),
    Rule("R03", "statistics of the stage that they normalise", check_stages),
    Rule("R04", "regions of the loss are not saturated", check_regions, {"saturated": 0.2, "spread": 0.03}),
)
