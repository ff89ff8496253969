"""What augmentation does to a sample: it may vary intensities but not shift them, and must move all maps together.

Every figure compares a sample with the very same crop, drawn again with the random part switched off; both come from
the data set of the training itself. Whether labels move with their image is asked of a painted pattern: image and maps
hold the same one before the chain, so they must hold the same one behind it.

    R02  augmentation lifts or flattens intensities, pads with another value than the background, or bends signed values
    R08  a label, a mask or a map of distances that is not moved with its image
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import AdjustContrastd, Compose, Lambda, Lambdad, RandLambdad, Randomizable
from scipy import ndimage

from pipelines.preflight.chains import channel_names, steps_of, without_randomness
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from transforms.errors import BundleError
from transforms.gamma import refuse_gamma_after_normalisation
from transforms.masks import as_numpy

DRAWS = 24
FEWEST_DRAWS = 8
VOXELS = 60_000_000  # of all draws together, channels counted: a few seconds
MOVES = 8  # draws of the transforms that move voxels, each of them switched on
BORDER = 2  # voxels beside a border of the pattern, where nearest and linear interpolation may differ
# In a small patch the margin is one voxel, and a rotation with a zoom leaves a few voxels that rounded to the other
# side (seen: 2 of 2471). A map that was not moved differs in several per cent.
ROUNDED_SHARE = 0.005
_CONSTANT = 1e-6
_BENDING = ("sqrt", "log", "log2", "log10", "log1p", "power", "pow")


@dataclass(frozen=True)
class Draw:
    """One channel of a sample, with its augmentation and without.

    Attributes:
        case, channel: names.
        minimum, mean, mode_share: (plain, augmented) each; the last is the share (0 to 1) of voxels at one value.
        std: of the plain one.
    """

    case: str
    channel: str
    minimum: tuple[float, float]
    mean: tuple[float, float]
    mode_share: tuple[float, float]
    std: float


def draw_of(plain: np.ndarray, augmented: np.ndarray, case: str, channel: str) -> Draw:
    """Sum up one channel (*spatial) without and with augmentation."""
    return Draw(
        case,
        channel,
        (float(plain.min()), float(augmented.min())),
        (float(plain.mean(dtype=np.float64)), float(augmented.mean(dtype=np.float64))),
        (mode_share(plain), mode_share(augmented)),
        float(plain.std(dtype=np.float64)),
    )


def mode_share(values: np.ndarray) -> float:
    """Return the share of voxels that have the most frequent value."""
    ordered = np.sort(values, axis=None)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    return float(np.diff(starts).max() / ordered.size)


# --- judging --------------------------------------------------------------------------------------------------------


def augmentation_findings(draws: Sequence[Draw], limits: Mapping[str, float]) -> list[Finding]:
    """R02: judge what augmentation does to the intensities of each channel.

    Args:
        draws: of every channel. A channel that augmentation blanks (a modality dropped on purpose) does not count.
        limits: ``floor_from`` and ``floor_to``: the minimum rises from below the one to the other or above, in more
            than ``floor_share`` of the draws that began below; ``mode``: points by which the share of voxels at one
            value grows; ``shift``: of the mean in standard deviations. The last two are means over draws.
    """
    channels: dict[str, list[Draw]] = {}
    for draw in draws:
        if draw.mode_share[1] < 1 and draw.std > _CONSTANT * max(1.0, abs(draw.mean[0])):
            channels.setdefault(draw.channel, []).append(draw)
    findings = []
    for name, some in channels.items():
        deep = [d for d in some if d.minimum[0] < limits["floor_from"]]
        lifted = [d for d in deep if d.minimum[1] >= limits["floor_to"]]
        if len(lifted) > limits["floor_share"] * len(deep):
            findings.append(
                _shift(
                    f"augmentation lifts the minimum of input {name}",
                    f"from {lifted[0].minimum[0]:.2f} to {lifted[0].minimum[1]:.2f}, "
                    f"in {len(lifted)} of {len(deep)} draws",
                    f"in at most {100 * limits['floor_share']:g} % of the draws to {limits['floor_to']:g} or more",
                    lifted,
                )
            )
        mode = 100 * float(np.mean([d.mode_share[1] - d.mode_share[0] for d in some]))
        if mode > limits["mode"]:
            findings.append(
                _shift(
                    f"augmentation sets voxels of input {name} to one value",
                    f"{mode:+.1f} points of the voxels, mean over {len(some)} draws",
                    f"at most +{limits['mode']:g} points",
                    sorted(some, key=lambda d: d.mode_share[0] - d.mode_share[1]),
                )
            )
        std = float(np.sqrt(np.mean([d.std**2 for d in some])))
        shift = float(np.mean([d.mean[1] - d.mean[0] for d in some])) / std
        if abs(shift) > limits["shift"]:
            findings.append(
                _shift(
                    f"augmentation moves the mean of input {name}",
                    f"by {shift:+.2f} standard deviations, mean over {len(some)} draws",
                    f"within +-{limits['shift']:g}",
                    sorted(some, key=lambda d: -abs(d.mean[1] - d.mean[0])),
                )
            )
    return findings


def padding_findings(
    background: Mapping[str, float], padding: Mapping[str, float], share: Mapping[str, float], tolerance: float
) -> list[Finding]:
    """R02: judge what stands in the corners that a moved sample leaves empty.

    Args:
        background: value of each channel around the object.
        padding: value that appears where a sample that is background everywhere was moved.
        share: of voxels (0 to 1) that do not have the background value then.
        tolerance: accepted difference.
    """
    return [
        _shift(
            f"augmentation pads input {name} with another value than the background",
            f"{padding[name]:.3g} in {100 * share[name]:.2f} % of the voxels, the background is {value:.3g}",
            f"the background value, within {tolerance:g}",
            [],
            cause="padding_mode zeros, or a constant, where air is not 0",
            fix="Move before the normalisation, cut the crop larger, or pad with the background value.",
        )
        for name, value in background.items()
        if share[name] > 0 and abs(padding[name] - value) > tolerance
    ]


def bending_findings(chain: Any) -> list[Finding]:
    """R02: judge whether a gamma, logarithm or root stands behind a signed normalisation of the same key."""
    try:
        refuse_gamma_after_normalisation([_as_gamma(step) for step in steps_of(chain)])
    except BundleError as refusal:
        measured, expected = "it bends signed values", "a gamma, logarithm or root before it"
        return [_shift(refusal.what, measured, expected, [], refusal.why, refusal.fix)]
    return []


def moved_findings(
    pattern: np.ndarray, delivered: np.ndarray, key: str, reader: str, cases: Sequence[str] = ()
) -> list[Finding]:
    """R08: compare a map with the image that held the same pattern before both were moved.

    Where the image was interpolated, voxels within ``BORDER`` of a border of either are left out, and of the others
    ``ROUNDED_SHARE`` may differ; where every voxel is still 0 or 1 (mirrored, turned, cropped), all count.

    Args:
        pattern: channels of the image (C, *spatial) that hold the pattern.
        delivered: the map (C, *spatial), as it came out.
        key: of the map.
        reader: who takes it next.
    """
    if pattern.shape != delivered.shape:
        measured = f"shape {delivered.shape[1:]}, the image has {pattern.shape[1:]}"
        return [_unmoved(key, reader, measured, "one grid", cases)]
    painted, found = pattern > 0.5, delivered > 0.5
    inner, allowed = np.ones(found.shape, bool), 0.0
    if not np.isin(pattern, (0, 1)).all():
        inner, allowed = _away_from_borders(painted) & _away_from_borders(found), ROUNDED_SHARE
    wrong = int(np.count_nonzero(inner & (painted != found)))
    if wrong <= allowed * inner.sum():
        return []
    expected = f"at most {100 * allowed:g} %" if allowed else "none"
    return [_unmoved(key, reader, f"{wrong} of {int(inner.sum())} voxels differ", expected, cases)]


def distance_map_findings(
    instances: np.ndarray, delivered: np.ndarray, limits: Mapping[str, float], cases: Sequence[str] = ()
) -> list[Finding]:
    """R08: compare horizontal and vertical maps with those of the instances as they came out.

    A map of distances turns its sign when it is mirrored, and trades its channels when it is turned; a transform that
    only moves its voxels leaves it wrong.

    Args:
        instances: ids (H, W), 0 = background.
        delivered: horizontal (along the second axis) and vertical map (2, H, W), -1 .. 1.
        limits: ``distance_map``: largest difference.
    """
    difference = np.abs(horizontal_vertical(instances) - delivered)
    largest = float(difference.max(initial=0.0))
    if largest <= limits["distance_map"]:
        return []
    return [
        Finding(
            "R08",
            "error",
            "the horizontal and vertical maps are not those of the instances they come with",
            f"largest difference {largest:.3g}, {int((difference > limits['distance_map']).sum())} values",
            f"<= {limits['distance_map']:g}",
            "the maps were made before the augmentation, and mirrored or turned like an image",
            "Make the maps from the instances behind the last transform that moves voxels.",
            cases=tuple(cases),
        )
    ]


def horizontal_vertical(instances: np.ndarray) -> np.ndarray:
    """Return for each instance the offset of its pixels from its centre of mass, scaled to -1 .. 1: (2, H, W) float32.

    Per instance and axis, negative offsets are divided by the largest negative one and positive by the largest positive
    (Graham et al. 2019, HoVer-Net, doi:10.1016/j.media.2019.101563). Channel 0 runs along the second axis.
    """
    maps = np.zeros((2, *instances.shape), np.float32)
    for number in np.unique(instances[instances > 0]):
        pixels = np.nonzero(instances == number)
        for channel, axis in enumerate((1, 0)):
            offset = pixels[axis] - pixels[axis].mean()
            for sign in (-1, 1):
                side = sign * offset > 0
                if side.any():
                    offset[side] /= np.abs(offset[side]).max()
            maps[channel][pixels] = offset
    return maps


def _away_from_borders(mask: np.ndarray) -> np.ndarray:
    """Return where all voxels within ``BORDER`` are alike; along a thin axis within one, or none."""
    reach = [BORDER if n >= 12 * BORDER else int(n >= 6) for n in mask.shape[1:]]
    size = (1, *(2 * r + 1 for r in reach))
    values = mask.astype(np.uint8)
    return np.asarray(ndimage.maximum_filter(values, size) == ndimage.minimum_filter(values, size))


def _shift(
    what: str,
    measured: str,
    threshold: str,
    draws: Sequence[Draw],
    cause: str = "an intensity transform that does not keep the scale, or stands behind the normalisation",
    fix: str = "Move it in front of the normalisation, or choose one that keeps mean and background.",
) -> Finding:
    cases = tuple(dict.fromkeys(draw.case for draw in draws))
    return Finding("R02", "error", what, measured, threshold, cause, fix, cases=cases)


def _unmoved(key: str, reader: str, measured: str, threshold: str, cases: Sequence[str]) -> Finding:
    return Finding(
        "R08",
        "error",
        f"{key} is not where the image is when {reader} takes it",
        measured,
        threshold,
        f"a transform moves the image and not {key}, or the other way round",
        f"Give every transform that moves voxels the key {key} too.",
        cases=tuple(cases),
    )


def _as_gamma(step: Any) -> Any:
    """Return a gamma in place of a function that takes a logarithm, a root or a power; any other step as it is."""
    function = getattr(step, "func", None)
    functions = function if isinstance(function, (list, tuple)) else [function]
    names = [name for each in functions for name in _names_in(each)]
    if not any(name.lstrip("_") in _BENDING for name in names):
        return step
    if isinstance(step, (Lambdad, RandLambdad)):
        return _named_gamma(step)(step.keys, gamma=0.5)
    return _named_gamma(step)(("image",), gamma=0.5) if isinstance(step, Lambda) else step


def _named_gamma(step: Any) -> type[AdjustContrastd]:
    return type(type(step).__name__, (AdjustContrastd,), {})


def _names_in(function: Any) -> Iterator[str]:
    if function is not None:
        yield str(getattr(function, "__name__", ""))
        yield from getattr(getattr(function, "__code__", None), "co_names", ())


# --- samples of a bundle --------------------------------------------------------------------------------------------


class _AsItComes:
    """Stands in for the random chain of a data set: the sample as it is cut."""

    def set_random_state(self, seed: int | None = None) -> None:
        """Nothing is drawn."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return sample


def with_chain(dataset: Any, chain: Any) -> Callable[[int], dict[str, Any]]:
    """Return how a data set gives its samples with another random chain; crops and seeds stay the same."""
    other = copy.copy(dataset)
    other.transform = chain
    return other.__getitem__


def check_augmentation(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R02 over samples as the training draws them."""
    dataset = inspection.need("train")
    augmented = with_chain(dataset, copy.deepcopy(dataset.transform))
    plain = with_chain(dataset, without_randomness(dataset.transform))
    draws: list[Draw] = []
    count, index = DRAWS, 0
    while index < count:
        sample = plain(index)
        before, after = as_numpy(sample["image"]), as_numpy(augmented(index)["image"])
        count = int(np.clip(VOXELS // max(1, before.size), FEWEST_DRAWS, DRAWS))
        channels = zip(before, after, _inputs(inspection, len(before)), strict=False)
        draws += [draw_of(p, a, str(sample.get("case", "")), name) for p, a, name in channels]
        index += 1
    return augmentation_findings(draws, limits)


def check_padding(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R02: move a sample that holds background alone, and see whether it still does."""
    dataset = inspection.need("train")
    if not any(hasattr(step, "padding_mode") for step in steps_of(dataset.transform)):
        return []
    sample = with_chain(dataset, _AsItComes())(0)
    image = as_numpy(sample["image"])
    air = np.broadcast_to(image.min(axis=tuple(range(1, image.ndim)), keepdims=True), image.shape)
    sample["image"] = _like(np.array(air), sample["image"])
    if "foreground" in sample:
        sample["foreground"] = _like(np.zeros_like(as_numpy(sample["foreground"])), sample["foreground"])
    try:
        still = as_numpy(without_randomness(dataset.transform)(dict(sample))["image"])
        moving = _only_moving(dataset.transform)
        moved = []
        for seed in range(MOVES):
            moving.set_random_state(seed=seed)
            moved.append(as_numpy(moving(dict(sample))["image"]))
    except Exception as problem:
        raise CannotRun(f"the chain takes no sample that is background alone: {problem}") from problem
    names = _inputs(inspection, len(still))
    background = {name: float(np.median(channel)) for name, channel in zip(names, still, strict=False)}
    padding, share = {}, {}
    for index, (name, value) in enumerate(background.items()):
        channel = np.stack([each[index] for each in moved])
        other = channel[np.abs(channel - value) > limits["padding"]]
        padding[name] = float(np.median(other)) if other.size else value
        share[name] = other.size / channel.size
    return padding_findings(background, padding, share, limits["padding"])


def check_bending(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R02 over the transforms of both chains as they stand."""
    train = inspection.need("train")
    preparation = getattr(train, "preparation", None)
    return bending_findings([preparation, train.transform])


def check_moved(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R08: a painted pattern through every transform of the training that moves voxels, each of them switched on."""
    dataset = inspection.need("train")
    cut = with_chain(dataset, _AsItComes())
    found: dict[tuple[str, str], Finding] = {}
    for index in range(MOVES):
        raw = cut(index)
        sample, channels = painted(raw)
        for step in [*steps_of(copy.deepcopy(dataset.transform)), None]:
            if step is not None and moves_voxels(step, sample):
                sample = _moved(step, sample, seed=index)
                continue
            # what the network is given at the end is the label; masks count as long as a transform still reads them
            keys = {"label"} if step is None else _keys_read(step)
            reader = "the network" if step is None else type(step).__name__
            for key in sorted(keys & set(channels)):
                pattern = as_numpy(sample["image"])[channels[key]]
                for finding in moved_findings(pattern, as_numpy(sample[key]), key, reader):
                    found.setdefault((key, reader), finding)
    return list(found.values())


def check_distance_maps(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R08 over samples with ``instances`` (1, H, W) and ``hv`` (2, H, W).

    Raises:
        CannotRun: the samples hold neither.
    """
    dataset = inspection.need("train")
    for index in range(MOVES):
        sample = dataset[index]
        if "instances" not in sample or "hv" not in sample:
            raise CannotRun("the samples hold no instances and hv")
        instances, delivered = as_numpy(sample["instances"])[0], as_numpy(sample["hv"])
        findings = distance_map_findings(instances, delivered, limits, [str(sample.get("case", ""))])
        if findings:
            return findings
    return []


def painted(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, slice]]:
    """Return a sample whose image holds the pattern of every map beside it, and which channels are whose."""
    shape = tuple(raw["image"].shape[1:])
    sample, channels = dict(raw), dict[str, slice]()
    stack: list[np.ndarray] = []
    for key, value in raw.items():
        if key != "image" and isinstance(value, (np.ndarray, torch.Tensor)) and tuple(value.shape[1:]) == shape:
            start = len(stack)
            stack += [pattern_of(shape, start + index) for index in range(len(value))]
            channels[key] = slice(start, len(stack))
            sample[key] = _like(np.stack(stack[start:]).astype(as_numpy(value).dtype), value)
    if not stack:
        raise CannotRun("a training sample holds no map beside its image")
    sample["image"] = _like(np.stack(stack).astype(np.float32), raw["image"])
    return sample, channels


def pattern_of(shape: Sequence[int], number: int = 0) -> np.ndarray:
    """Return a pattern (*shape), bool, that no mirroring, quarter turn or exchange of channels maps onto itself."""
    along = [np.arange(n) / max(1, n - 1) if n > 1 else np.full(1, 0.4) for n in shape]
    along = along if number % 2 == 0 else [1 - along[0], *along[1:]]
    grid = list(np.meshgrid(*along, indexing="ij"))
    grid = grid[number // 2 % len(grid) :] + grid[: number // 2 % len(grid)]
    ball = sum(((u - c) / 0.28) ** 2 for u, c in zip(grid, (0.3, 0.36, 0.4), strict=False)) < 1
    box = np.logical_and.reduce(
        [(u > low) & (u < high) for u, (low, high) in zip(grid, ((0.6, 0.99), (0.01, 0.55), (0.1, 0.8)), strict=False)]
    )
    return np.asarray(ball | box)


def moves_voxels(step: Any, sample: Mapping[str, Any]) -> bool:
    """Whether a transform moves voxels: MONAI's by their kind, any other when it treats 2 x + 1 as it treats x."""
    module = type(step).__module__
    if module.startswith(("monai.transforms.spatial", "monai.transforms.croppad")):
        return True
    if module.startswith("monai.") and not isinstance(step, (Lambda, Lambdad, RandLambdad)):
        return False
    image = as_numpy(sample["image"])
    try:
        plain = as_numpy(_moved(copy.deepcopy(step), sample, seed=0)["image"])
        changed = {**sample, "image": _like(2 * image + 1, sample["image"])}
        twice = as_numpy(_moved(copy.deepcopy(step), changed, seed=0)["image"])
    except Exception:  # it needs an image of another kind: no transform of places alone
        return False
    return plain.shape == twice.shape and bool(np.mean(np.abs(twice - (2 * plain + 1)) < 1e-3) > 0.5)


def _moved(step: Any, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
    if isinstance(step, Randomizable):
        step.set_random_state(seed=seed)
        if getattr(step, "prob", 0) > 0:
            step.prob = 1.0
    return dict(step(dict(sample)))


def _only_moving(chain: Any) -> Compose:
    """Return a copy of a chain in which nothing is random but what moves voxels, and that always does."""
    still = without_randomness(chain)
    for step, original in zip(steps_of(still), steps_of(chain), strict=True):
        if type(step).__module__.startswith("monai.transforms.spatial") and getattr(original, "prob", 0) > 0:
            step.prob = 1.0
    return still


def _keys_read(step: Any) -> set[str]:
    """Return the keys that a transform names in its arguments."""
    names: set[str] = set()
    for value in vars(step).values():
        names |= {each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, str)}
    return names


def _inputs(inspection: Inspection, count: int) -> list[str]:
    """Return the names of the inputs that are images: noise that a diffusion adds behind them is none."""
    names = channel_names(inspection, count)
    return names[: 2 + len(inspection.contract["windows"])] if inspection.task == "fusion" and count > 1 else names


def _like(values: np.ndarray, image: Any) -> torch.Tensor:
    plain = torch.from_numpy(values)
    return MetaTensor(plain, affine=image.affine) if isinstance(image, MetaTensor) else plain


RULES: tuple[Rule, ...] = (
    Rule(
        "R02",
        "augmentation keeps the scale",
        check_augmentation,
        {"floor_from": -0.5, "floor_to": -0.05, "floor_share": 0.1, "mode": 10.0, "shift": 0.25},
    ),
    Rule("R02", "padding is background", check_padding, {"padding": 1e-3}),
    Rule("R02", "no gamma, logarithm or root of signed values", check_bending),
    Rule("R08", "labels and masks move with the image", check_moved),
    Rule(
        "R08",
        "distance maps are made after the moves",
        check_distance_maps,
        {"distance_map": 1e-3},
        tasks=("instances",),
    ),
)
