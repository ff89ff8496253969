"""Does the figure that selects the weights mean what it says, and does no answer reach what it measures?

R28: a perfect prediction scores 1, a mask that is empty is treated as the policy says, no channel of the input is the
ground truth, and a prediction is neither the ground truth itself nor a copy of it. R44: instances of the ground truth
that are two cells in one show in their size and in their shape.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.networks import one_hot
from numpy.typing import ArrayLike, NDArray
from skimage.measure import regionprops

from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import draw_batch, input_shape, need_one_process, own_draws, predict, window_of
from transforms.diffusion import LABEL_CHANNELS
from transforms.fusion import REFERENCE_CHANNELS

Limits = Mapping[str, float]

SIZE = 16  # voxels along each axis of the made-up cases: wider than the window of SSIM
LOOKED_AT = 200_000  # voxels of a sample
MOST_SHAPES = 500  # instances whose convex hull is taken
_EMPTY_CAUSE = "an empty mask is 0, 1 or NaN without anybody having decided so"


# --- R28: what a metric says of cases whose figure is known


@dataclass(frozen=True)
class KnownFigure:
    """What a metric says, and what it has to say."""

    case: str
    measured: float
    expected: float


def judge_metric(name: str, figures: Sequence[KnownFigure], limits: Limits) -> list[Finding]:
    """R28: the metric ``name`` on cases whose figure is known."""
    return [
        Finding(
            rule="R28",
            severity="error",
            what=f"metric {name}: wrong for {figure.case}",
            measured=f"{figure.measured:.4g}",
            threshold=f"{figure.expected:g}",
            cause="labels, channels or classes are paired wrongly" if "perfect" in figure.case else _EMPTY_CAUSE,
            fix="correct the metric, or say which policy it has",
        )
        for figure in figures
        if not abs(figure.measured - figure.expected) <= limits["tolerance"]
    ][:1]


def expected_figures(policy: str) -> tuple[float, float]:
    """Return the mean of a perfect case with one that is empty on both sides, and with one that was missed."""
    return 1.0, 1.0 if policy == "exclude" else 0.5


def segmentation_figures(metric: Any, ids: Sequence[int], policy: str = "worst") -> list[KnownFigure]:
    """Return the figures of a metric over label maps, from cases with a box for each label."""
    truth = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int16)
    for number, label in enumerate(ids):
        start = number * SIZE // max(1, len(ids))
        truth[0, start : start + max(1, SIZE // (2 * len(ids))), 4:12, 4:12] = label
    empty = torch.zeros_like(truth)
    with_empty, with_missed = expected_figures(policy)
    right = (truth.clone(), truth)
    return [
        KnownFigure("a perfect prediction", _figure(metric, [right]), 1.0),
        KnownFigure(
            "a case without any label, beside a right one", _figure(metric, [right, (empty, empty)]), with_empty
        ),
        KnownFigure(
            "a case that was missed, beside a right one", _figure(metric, [right, (empty, truth)]), with_missed
        ),
    ]


def fusion_figures(metric: Any) -> list[KnownFigure]:
    """Return the figures of a metric over fused images: MRI in the brain and CT in the bone are perfect."""
    draw = np.random.default_rng(0)
    mri, ct = draw.random((2, SIZE, SIZE, SIZE))
    brain, bone = np.zeros((2, SIZE, SIZE, SIZE))
    brain[2:9], bone[11:14] = 1, 1
    perfect = np.where(bone > 0, ct, mri)
    channels = {"mri_display": mri, "ct_display": ct, "brain": brain, "bone": bone}

    def reference(**changed: NDArray[Any]) -> torch.Tensor:
        known = {**channels, **changed}
        stack = [
            known.get(name, 2 * perfect - 1 if name == REFERENCE_CHANNELS[0] else 0 * brain)
            for name in REFERENCE_CHANNELS
        ]
        return torch.as_tensor(np.stack(stack).astype(np.float32))

    fused = torch.as_tensor(perfect[None].astype(np.float32))
    right = (fused.clone(), reference())
    return [
        KnownFigure("a perfect fusion", _figure(metric, [right]), 1.0),
        KnownFigure(
            "a case without bone, beside a right one", _figure(metric, [right, (fused, reference(bone=0 * bone))]), 1.0
        ),
    ]


def _figure(metric: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    own = copy.deepcopy(metric)
    prediction, truth = own.output_keys
    own.reset()
    own.update([{prediction: one, truth: other, "case": f"made up {n}"} for n, (one, other) in enumerate(pairs)])
    return float(own.compute())


def check_metrics(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R28 for every metric of validation that says which keys it reads."""
    need_one_process()
    known = {name: each for name, each in inspection.need("metrics").items() if hasattr(each, "output_keys")}
    if not known:
        raise CannotRun("no metric of validation says which keys it reads")
    findings = []
    for name, metric in known.items():
        if inspection.task == "fusion":
            figures = fusion_figures(metric)
        else:
            policy = getattr(metric, "empty_policy", None) or inspection.config.get("empty_policy") or "worst"
            ids = list(getattr(metric, "names", None) or _label_ids(inspection))
            figures = segmentation_figures(metric, ids, str(policy))
        findings += judge_metric(name, figures, limits)
    return findings


# --- R28: no answer in the input, no prediction that is the answer


def judge_inputs(image: ArrayLike, truths: Mapping[str, ArrayLike], case: str, limits: Limits) -> list[Finding]:
    """R28: no channel of the input is the ground truth, scaled or not.

    Args:
        image: (C, *spatial).
        truths: name -> (*spatial), a mask or an image that is to be predicted.
        case: whose.
        limits: ``correlation``, from which a channel is a copy.
    """
    channels = np.asarray(image, dtype=np.float64)
    for name, truth in truths.items():
        wanted = _standardised(np.asarray(truth, dtype=np.float64))
        if wanted is None:
            continue
        for number, channel in enumerate(channels):
            given = _standardised(channel)
            alike = 0.0 if given is None else abs(float(np.mean(given * wanted)))
            if alike > limits["correlation"]:
                return [
                    Finding(
                        rule="R28",
                        severity="error",
                        what=f"input: channel {number} of the image is the ground truth {name}",
                        measured=f"correlation {alike:.6f}",
                        threshold=f"at most {limits['correlation']:g}",
                        cause="masks or the target are stacked with the modalities",
                        fix="give the network what a clinic has, and nothing else",
                        cases=(case,) if case else (),
                    )
                ]
    return []


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // LOOKED_AT)]
    spread = flat.std()
    return (flat - flat.mean()) / spread if spread > 0 else None


def judge_prediction(prediction: Any, truth: Any, case: str = "") -> list[Finding]:
    """R28: a prediction does not share the memory of the ground truth, and is not equal to it in every voxel.

    Args:
        prediction, truth: arrays or tensors of one case; a truth of one value alone says nothing.
        case: whose.
    """
    one, other = _as_array(prediction), _as_array(truth)
    shared = np.may_share_memory(one, other) and np.shares_memory(one, other)
    alike = one.shape == other.shape and bool((other != other.flat[0]).any()) and np.array_equal(one, other)
    if not shared and not alike:
        return []
    return [
        Finding(
            rule="R28",
            severity="error",
            what="prediction: it is the ground truth",
            measured="the same memory" if shared else f"equal in all {one.size} voxels",
            threshold="a prediction of its own",
            cause="the ground truth is handed on where the prediction belongs",
            fix="follow the prediction from the inferer to the metric",
            cases=(case,) if case else (),
        )
    ]


def check_inputs(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R28: training samples that have a foreground."""
    images, labels = draw_batch(inspection, 4)
    given = int(getattr(inspection.inferer, "condition_channels", images.shape[1]))
    for image, label in zip(images.cpu()[:, :given], labels.cpu(), strict=True):
        findings = judge_inputs(image, _truths(inspection, np.asarray(label)), "", limits)
        if findings:
            return findings
    return []


def check_prediction(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R28: what inferer and postprocessing of validation make of a case, and what its network is given, is its own."""
    validation = inspection.need("validation")
    if not len(validation):
        raise CannotRun("the cohort has no validation case")
    item = validation[0]
    window = window_of(item, input_shape(inspection)[2:])
    network = copy.deepcopy(inspection.need("network")).eval()
    with own_draws():
        prediction = predict(inspection, network, window)[0]
    case, truth = str(item.get("case", "")), window["label"][0]
    findings = judge_prediction(prediction, truth[:1], case)
    findings += judge_inputs(window["image"][0], _truths(inspection, np.asarray(truth)), case, limits)
    given = {**item, "image": window["image"][0], "label": truth, "pred": prediction}
    return findings or _after_postprocessing(inspection, given, case)


def _after_postprocessing(inspection: Inspection, given: Mapping[str, Any], case: str) -> list[Finding]:
    """Judge what the configuration's postprocessing of validation hands on as the prediction, where it has one."""
    if not isinstance((inspection.config.get("validate") or {}).get("postprocessing"), Mapping):
        return []
    classes = len(inspection.contract.get("labels", ()))
    logits = one_hot(given["pred"][None].long().cpu(), classes)[0] if classes and inspection.task != "fusion" else None
    before = {**given, "pred": given["pred"] if logits is None else logits}
    # a parser writes into what it is given: it would turn the # of a colour into ::
    parser = ConfigParser(copy.deepcopy({**inspection.config, "contract": dict(inspection.contract)}))
    try:
        after = parser.get_parsed_content("validate#postprocessing")(before)
    except Exception as problem:
        raise CannotRun(f"the postprocessing of validation cannot be tried: {problem}") from problem
    return judge_prediction(after["pred"], given["label"][:1], case)


def _truths(inspection: Inspection, label: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return what is to be predicted, or is known of it, by name: (*spatial) each."""
    if inspection.task == "fusion":
        names = LABEL_CHANNELS if len(label) == len(LABEL_CHANNELS) else REFERENCE_CHANNELS
        known = dict(zip(names, label, strict=False))
        return {name: known[name] for name in (names[0], "brain", "bone", "lesion") if name in known}
    return {f"label {number}": label[0] == number for number in _label_ids(inspection)}


def _label_ids(inspection: Inspection) -> list[int]:
    return list(range(1, len(inspection.need("contract").get("labels", ())) or 2))


# --- R44: instances of the ground truth


def judge_components(
    areas: ArrayLike,
    solidities: ArrayLike,
    limits: Limits,
    classes: ArrayLike | None = None,
    cases: Sequence[str] = (),
    images: ArrayLike | None = None,
) -> list[Finding]:
    """R44: instances that are larger than the convex ones of their image, and not convex, are cells grown together.

    Neither alone says so: cells of one kind differ twofold in size, magnifications differ from image to image, and a
    small cell is ragged on its grid.

    Args:
        areas: (n,) in voxels or pixels.
        solidities: (n,) area over that of the convex hull; NaN = not measured, such an instance does not count.
        limits: ``share`` of the instances, ``area`` in medians of the convex ones (1.5: between one cell and two),
            ``solidity`` (a disc of 8 pixels radius on its grid has .925, two that touch .84), ``least`` instances.
        classes: (n,) class of each; None = all of one.
        cases: where they are most frequent, worst first.
        images: (n,) image of each; None = all of one.
    """
    sizes, shapes = np.asarray(areas, float), np.asarray(solidities, float)
    kinds = np.zeros(len(sizes), int) if classes is None else np.asarray(classes)
    places = np.zeros(len(sizes), int) if images is None else np.asarray(images)
    findings = []
    for kind in np.unique(kinds):
        own = kinds == kind
        relative = np.empty(len(sizes))
        for place in np.unique(places[own]):
            here = own & (places == place)
            single = here & (shapes >= limits["solidity"])  # where most are joined, the median of all is a pair
            relative[here] = sizes[here] / np.median(sizes[single if single.any() else here])
        own &= np.isfinite(shapes)
        if own.sum() < limits["least"]:
            continue
        share = float(((relative[own] > limits["area"]) & (shapes[own] < limits["solidity"])).mean())
        if share > limits["share"]:
            findings.append(
                Finding(
                    rule="R44",
                    severity="warn",
                    what=f"instances{'' if classes is None else f' of class {kind}'}: many look like several in one",
                    measured=f"{100 * share:.1f} % of {int(own.sum())} are larger than {limits['area']:g} medians of "
                    f"their image's convex ones and less solid than {limits['solidity']:g}",
                    threshold=f"at most {100 * limits['share']:g} %",
                    cause="instances were made from a mask, where cells that touch are one",
                    fix="separate touching cells, for instance by a watershed of the distance",
                    source="data",
                    cases=tuple(cases),
                )
            )
    return findings


def measure_components(ids: ArrayLike, most: int = MOST_SHAPES) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return area and solidity of every instance of a map (X, Y) or (X, Y, Z); of at most ``most`` the solidity."""
    found = regionprops(np.asarray(ids))
    step = max(1, -(-len(found) // most))
    areas = np.array([each.area for each in found], float)
    shapes = np.array([_solidity(each) if n % step == 0 else np.nan for n, each in enumerate(found)], float)
    return areas, shapes


def _solidity(region: Any) -> float:
    """Return area over convex area; a line or a few points are convex."""
    if min(np.ptp(region.coords, axis=0)) == 0 or region.area < 4:
        return 1.0
    return float(region.solidity)


def check_components(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R44 on the instances of at most 16 training cases: key ``instances``, or ``extra["instance_key"]``."""
    key = inspection.extra.get("instance_key", "instances")
    areas, shapes, classes, images, suspects = [], [], [], [], {}
    for number, case in enumerate(inspection.training_cases):
        if key not in case:
            raise CannotRun(f"the cases have no {key}")
        ids = np.asarray(case[key])[0]
        area, shape = measure_components(ids)
        areas.append(area)
        shapes.append(shape)
        images.append(np.full(len(area), number))
        if "classes" in case:
            of_pixel = np.asarray(case["classes"])[0]
            classes.append(np.array([np.bincount(of_pixel[ids == n]).argmax() for n in np.unique(ids[ids > 0])]))
        suspects[str(case.get("case", ""))] = float(np.mean(shape < limits["solidity"])) if len(shape) else 0.0
    worst = sorted((name for name in suspects if suspects[name]), key=lambda name: -suspects[name])
    kinds = np.concatenate(classes) if len(classes) == len(areas) else None
    return judge_components(np.concatenate(areas), np.concatenate(shapes), limits, kinds, worst, np.concatenate(images))


def _as_array(value: Any) -> NDArray[Any]:
    plain = value.as_tensor() if hasattr(value, "as_tensor") else value
    return np.asarray(plain.detach().cpu() if isinstance(plain, torch.Tensor) else plain)


RULES: tuple[Rule, ...] = (
    Rule("R28", "metric on known cases", check_metrics, {"tolerance": 1e-4}, tasks=("segmentation", "fusion")),
    Rule("R28", "ground truth in the input", check_inputs, {"correlation": 0.9999}, tasks=("segmentation", "fusion")),
    Rule(
        "R28",
        "prediction is no ground truth",
        check_prediction,
        {"correlation": 0.9999},
        tasks=("segmentation", "fusion"),
    ),
    Rule(
        "R44",
        "merged instances",
        check_components,
        {"share": 0.05, "area": 1.5, "solidity": 0.9, "least": 20},
        tasks=("instances",),
        of_data=True,
    ),
)
