"""Intensities as the network meets them: one scale for all inputs, one scale in training and validation.

A network cannot say that one of its inputs is a hundred times as large as another, or that validation shows it other
greys than training did; it only learns badly. Every case goes through the chain of the bundle (``chains.py``), and what
comes out is summed up per channel (``distributions.py``):

    R01  inputs on one scale      R02  training and validation alike, the random part switched off
    R03  statistics measured at the stage that they normalise (``stages.py``)
    R04  no window that saturates what a loss looks at
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.preflight import stages
from pipelines.preflight.chains import centred, channel_names, declared_z_score, foreground_of, seen_cases
from pipelines.preflight.distributions import Distribution, Region, distributions, fusion_regions, label_regions
from pipelines.preflight.finding import Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from transforms.fusion import REFERENCE_CHANNELS
from transforms.masks import as_numpy


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


def check_regions(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R04 over labels, and in a fusion over the regions in which its loss compares intensities."""
    regions: list[Region] = []
    channels_of: dict[str, Sequence[str]] = {}
    for sample in seen_cases(inspection, inspection.need("validation").transform):
        image, label = as_numpy(sample["image"]), as_numpy(sample["label"])
        names = channel_names(inspection, len(image))
        if inspection.task == "fusion" and len(label) == len(REFERENCE_CHANNELS):
            regions += fusion_regions(sample, image, label, names)
            channels_of = {"brain": names[:1], "lesion": names[:1], "bone": names[1:-1]}
        else:
            regions += label_regions(sample, image, label, names, _label_names(inspection))
    return region_findings(regions, limits, channels_of)


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


def _label_names(inspection: Inspection) -> dict[int, str]:
    return {int(each["id"]): str(each["name"]) for each in inspection.contract.get("labels", ()) if each["id"] > 0}


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
    *stages.RULES,
    Rule("R04", "regions of the loss are not saturated", check_regions, {"saturated": 0.2, "spread": 0.03}),
)
