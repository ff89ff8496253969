"""Does every term of a loss pull, none pull alone, and none break where a prediction or a label is extreme?

A term that is dead, or a hundred times another, does not show in its value: R18 measures the gradient of each term with
respect to the network's output on a real batch. R19 asks for finite values and gradients at the edges, in the run's
own arithmetic. R27 reads the weights of classes: too far apart, asked for and not there, or given twice.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pipelines.inference.inferers import PRECISIONS, AutocastInferer
from pipelines.preflight.condition import wake
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import at_time, draw_batch, input_shape, need_one_process, own_draws
from pipelines.preflight.tracing import trace
from transforms.diffusion import LABEL_CHANNELS, NoiseSchedule

Limits = Mapping[str, float]
Outcome = Literal["finite", "not finite", "refused"]

BATCH = 4
EDGE = 1e4  # a logit whose probability is 0 or 1 in every arithmetic, and that half precision still holds
PROBABILITIES = (0.0, 1e-8, 0.5, 1 - 1e-8, 1.0)
HIDDEN = "NaN target"
_WEIGHT_NAMES = ("class_weights", "class_weight", "pos_weight", "weight", "alpha")
_SCHEME_KEYS = ("class_weighting", "class_weights", "balancing", "weighting_scheme")


# --- R18: the gradient of every term


def judge_gradients(norms: Mapping[str, float], limits: Limits) -> list[Finding]:
    """R18: a term whose gradient is nil, or many times that of another.

    Args:
        norms: name of a term -> norm of the gradient of the term times its weight, with respect to the output.
        limits: ``dead``, ``ratio``.
    """
    findings = [
        Finding(
            rule="R18",
            severity="error",
            what=f"loss: the term {name} has no gradient",
            measured=f"norm {norm:.2g} with respect to the output",
            threshold=f"{limits['dead']:g} or more",
            cause="the term is computed without gradient, clamped, or reads something else than the output",
            fix=f"repair the term {name}, or take it out of the loss",
            evidence={"norms": _finite(norms)},
        )
        for name, norm in norms.items()
        if not norm >= limits["dead"]
    ]
    alive = {name: norm for name, norm in norms.items() if norm >= limits["dead"]}
    if len(alive) > 1:
        strong, weak = max(alive, key=alive.__getitem__), min(alive, key=alive.__getitem__)
        if alive[strong] > limits["ratio"] * alive[weak]:
            findings.append(
                Finding(
                    rule="R18",
                    severity="warn",
                    what=f"loss: the term {strong} outweighs the term {weak}",
                    measured=f"gradient {alive[strong] / alive[weak]:.0f} times as large",
                    threshold=f"at most {limits['ratio']:g} times",
                    cause="terms of different scale are added",
                    fix=f"lower the weight of {strong}, or raise that of {weak}",
                    evidence={"norms": _finite(norms)},
                )
            )
    return findings


def judge_ignored(without: float, with_ignored: float, limits: Limits) -> list[Finding]:
    """R18: the loss of a batch, and of the same batch with voxels beside it that do not count."""
    change = abs(with_ignored - without) / max(abs(without), 1e-12)
    if change <= limits["ignored"]:
        return []
    return [
        Finding(
            rule="R18",
            severity="error",
            what="loss: voxels that do not count change it",
            measured=f"{without:.4g} becomes {with_ignored:.4g}",
            threshold=f"a relative change of at most {limits['ignored']:g}",
            cause="the loss is divided by all voxels, or a term does not know which voxels count",
            fix="take every sum and count over the voxels that count",
        )
    ]


def term_gradients(loss: Any, outputs: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """Return the norm of every term's gradient, times its weight, with respect to ``outputs``.

    A loss tells its terms by ``watch_every`` (``gradient/<name>`` in ``last_terms``) or by ``terms`` and
    ``weighted_terms``; in one of several heads, the main head stands for all.

    Raises:
        CannotRun: the loss does not tell its terms.
    """
    given = outputs.detach().float().requires_grad_()
    if hasattr(loss, "watch_every"):
        watching = copy.copy(loss)
        watching.watch_every, watching._passes = 1, 0
        watching(given, label)
        prefix = "gradient/"
        found = {k.removeprefix(prefix): v for k, v in watching.last_terms.items() if k.startswith(prefix)}
        return {name: float(norm) for name, norm in found.items()}
    single = getattr(loss, "loss", loss)
    if not (hasattr(single, "terms") and hasattr(single, "weighted_terms")):
        raise CannotRun(f"the loss {type(loss).__name__} does not tell its terms")
    if given.ndim == label.ndim + 1:
        given = given.detach()[:, 0].requires_grad_()
    norms = {}
    for name, value in single.terms(given, label).items():
        if not value.requires_grad:
            norms[name] = 0.0
            continue
        (gradient,) = torch.autograd.grad(value, given, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if gradient is None else float(single.weighted_terms[name][0] * gradient.float().norm())
    return norms


def check_terms(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R18 on a batch of training samples, those with foreground first, for the loss of every phase."""
    need_one_process()
    image, label = draw_batch(inspection, BATCH)
    network = copy.deepcopy(inspection.need("network")).train()
    with own_draws(), torch.no_grad():
        outputs = AutocastInferer(inspection.precision)(image, network)
    findings: list[Finding] = []
    for name in _loss_names(inspection):
        loss = inspection.need("loss")(name)
        norms = term_gradients(loss, outputs, label)
        absent = _absent_regions(inspection, label)
        findings += judge_gradients({term: norm for term, norm in norms.items() if term not in absent}, limits)
        values = _with_and_without_ignored(loss, outputs, label)
        findings += judge_ignored(*values, limits) if values is not None else []
    return findings


def _loss_names(inspection: Inspection) -> list[str]:
    return list(dict.fromkeys(phase.loss for phase in inspection.need("plan")))


def _absent_regions(inspection: Inspection, label: torch.Tensor) -> set[str]:
    """Return the terms of a fusion whose region is not in the batch: they have no gradient, rightly."""
    if inspection.task != "fusion":
        return set()
    channels = dict(zip(LABEL_CHANNELS, label.unbind(1), strict=True))
    return {name for name in ("brain", "bone", "lesion") if not bool(channels[name].any())}


def _with_and_without_ignored(loss: Any, outputs: torch.Tensor, label: torch.Tensor) -> tuple[float, float] | None:
    """Return the loss of a batch, and with as many voxels again that do not count; None where all voxels count."""
    single = getattr(loss, "loss", loss)
    ignore = getattr(single, "ignore_index", None)
    masked = "mask" in inspect.signature(loss.forward).parameters if isinstance(loss, nn.Module) else False
    if ignore is None and not masked:
        return None
    main = outputs[:, 0] if outputs.ndim == label.ndim + 1 else outputs
    twice = torch.cat([main, main.flip(2) + 1], 2)
    with torch.no_grad():
        if ignore is not None:
            return float(loss(main, label)), float(loss(twice, torch.cat([label, torch.full_like(label, ignore)], 2)))
        counted = torch.ones_like(label, dtype=torch.float32)
        mask = torch.cat([counted, torch.zeros_like(counted)], 2)
        return float(loss(main, label, counted)), float(loss(twice, torch.cat([label, label], 2), mask))


# --- R19: finite at the edges


@dataclass(frozen=True)
class Edge:
    """What a loss made of an extreme case: value and gradient finite, not finite, or the case was refused."""

    name: str
    outcome: Outcome
    detail: str = ""


def judge_edges(edges: Sequence[Edge], arithmetic: str) -> list[Finding]:
    """R19: value and gradient are finite at every edge; a NaN in a target that counts must not pass for a number."""
    wrong = [edge for edge in edges if edge.outcome != "finite" and not edge.name.startswith(HIDDEN)]
    hidden = [edge for edge in edges if edge.outcome == "finite" and edge.name.startswith(HIDDEN)]
    findings = []
    if wrong:
        findings.append(
            Finding(
                rule="R19",
                severity="error",
                what=f"loss: no finite value and gradient at {wrong[0].name}",
                measured=f"{len(wrong)} of {len(edges)} edges in {arithmetic}"
                + (f"; {wrong[0].detail}" if wrong[0].detail else ""),
                threshold="all finite",
                cause="a logarithm, a root or a division whose argument rounds to 0",
                fix="compute the loss from logits, in float32",
                evidence={"edges": [edge.name for edge in wrong]},
            )
        )
    if hidden:
        findings.append(
            Finding(
                rule="R19",
                severity="error",
                what="loss: a NaN in the target disappears",
                measured="a finite loss",
                threshold="a refusal, or a loss that is not finite and stops the run",
                cause="NaN is replaced by a constant, or compared and found to be no class",
                fix="refuse the target, or mask these voxels",
            )
        )
    return findings


def try_edge(name: str, loss: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> Edge:
    """Return what ``loss()`` and its gradient with respect to ``leaves`` come to."""
    try:
        value = loss()
        gradients = (
            torch.autograd.grad(value, list(leaves), allow_unused=True) if value.requires_grad else [None] * len(leaves)
        )
    except Exception as refusal:  # what a loss raises is its refusal
        return Edge(name, "refused", f"{type(refusal).__name__}: {refusal}"[:200])
    finite = all(bool(torch.isfinite(each).all()) for each in (value, *gradients) if each is not None)
    return Edge(name, "finite" if finite else "not finite", f"loss {float(value.detach()):g}")


def segmentation_edges(loss: Any, classes: int, dimensions: int, precision: str, kind: str = "cpu") -> list[Edge]:
    """Return what a loss on logits (B, classes, *spatial) and class ids makes of every edge, in the run's arithmetic.

    Args:
        loss: the loss.
        classes: channels of the logits.
        dimensions: spatial axes.
        precision: fp32, bf16, fp16.
        kind: of device.
    """
    size = (4,) * dimensions
    half = torch.zeros(2, 1, *size)
    half[:, :, 0] = 1
    labels = {"an empty label": 0 * half, "a full label": 0 * half + 1, "a label of both": half}
    single = getattr(loss, "loss", loss)
    ignore = getattr(single, "ignore_index", None)
    masked = isinstance(loss, nn.Module) and "mask" in inspect.signature(loss.forward).parameters
    cases: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    for p in PROBABILITIES:
        logits = _logits(p, classes, size)
        cases += [(f"p = {p:.10g} with {name}", logits, label, None) for name, label in labels.items()]
    middle = _logits(0.5, classes, size)
    if ignore is not None:
        cases.append(("all voxels ignored", middle, torch.full_like(half, ignore), None))
    if masked:
        cases.append(("all voxels masked", middle, half, 0 * half))
        unknown = half.clone()
        unknown[:, :, 1] = torch.nan
        cases.append(("NaN in a target that is masked", middle, unknown, (~unknown.isnan()).float()))
    nan = half.clone()
    nan[:, :, 1] = torch.nan
    cases.append((HIDDEN, middle, nan, None))
    edges = []
    for name, logits, label, mask in cases:
        given = logits.to(kind, PRECISIONS[precision]).requires_grad_()
        arguments = [each.to(kind) for each in (label, mask) if each is not None]
        with torch.autocast(kind, PRECISIONS[precision], enabled=precision != "fp32"):
            edges.append(try_edge(name, partial(loss, given, *arguments), [given]))
    return edges


def _logits(p: float, classes: int, size: Sequence[int]) -> torch.Tensor:
    """Return logits (2, classes, *size) with probability ``p`` for the last class, and the rest for the first."""
    odds = EDGE if p == 1 else -EDGE if p == 0 else math.log(p) - math.log1p(-p)
    logits = torch.zeros(2, classes, *size)
    logits[:, -1] = odds
    return logits


def fusion_edges(
    network: nn.Module, loss: Any, image: torch.Tensor, label: torch.Tensor, schedule: NoiseSchedule, precision: str
) -> list[Edge]:
    """Return what network and loss of a diffusion make of the first and the last time, and of empty and full regions.

    Args:
        network: a copy, awake.
        loss: on x0_hat and a label with ``LABEL_CHANNELS``.
        image: (B, C + 2, *spatial): condition, x_t, t.
        label: (B, 7, *spatial).
        schedule: of the noise.
        precision: of the network's arithmetic.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    forward = AutocastInferer(precision)
    channel = {name: number for number, name in enumerate(LABEL_CHANNELS)}
    edges = []
    for t in (1.0,) if schedule.name == "none" else (0.0, 1.0):
        for regions in ("empty", "full"):
            given, truth = at_time(image, label, schedule, t)
            for name in ("brain", "bone", "lesion"):
                truth[:, channel[name]] = float(regions == "full")

            def value(given: torch.Tensor = given, truth: torch.Tensor = truth) -> torch.Tensor:
                return loss(forward(given, network), truth)

            edges.append(try_edge(f"t = {t:g} with {regions} regions", value, parameters))
    nan = label.clone()
    nan[:, 0, ..., :1] = torch.nan
    edges.append(try_edge(HIDDEN, lambda: loss(forward(image, network), nan), parameters))
    return edges


def check_edges(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R19 for the loss of every phase."""
    need_one_process()
    kind = (inspection.device or torch.device("cpu")).type
    findings: list[Finding] = []
    for name in _loss_names(inspection):
        loss = inspection.need("loss")(name)
        if inspection.task == "fusion":
            edges = _edges_of_fusion(inspection, loss)
        else:
            shape = input_shape(inspection)
            outputs = trace(inspection.need("network"), shape).outputs
            classes = next(iter(outputs.values()))[1]
            edges = segmentation_edges(loss, classes, len(shape) - 2, inspection.precision, kind)
        findings += judge_edges(edges, inspection.precision)
    return findings[:2]


def _edges_of_fusion(inspection: Inspection, loss: Any) -> list[Edge]:
    schedule = getattr(inspection.need("inferer"), "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise CannotRun("the inferer does not say which schedule the noise has")
    network = wake(inspection.need("network")).train()
    image, label = draw_batch(inspection, 1)
    return fusion_edges(network, loss, image, label, schedule, inspection.precision)


# --- R27: the weights of classes


def judge_class_weights(
    weights: Sequence[float], limits: Limits, scheme: str = "", mechanisms: Sequence[str] = ()
) -> list[Finding]:
    """R27: weights too far apart, all alike although a scheme was asked for, or two mechanisms for one imbalance.

    Args:
        weights: one per class, positive; empty = none are given.
        limits: ``most``, ``least`` (ratio of the largest to the smallest).
        scheme: what was asked for; empty = nothing.
        mechanisms: all that balance classes, by name.
    """
    findings = []
    positive = [float(weight) for weight in weights if weight > 0]
    ratio = max(positive) / min(positive) if positive else 1.0
    if len(positive) < len(weights) or ratio > limits["most"]:
        zero = len(positive) < len(weights)
        findings.append(
            Finding(
                rule="R27",
                severity="warn",
                what="loss: the weights of the classes are far apart",
                measured="a weight is 0" if zero else f"largest over smallest {ratio:.3g}",
                threshold=f"at most {limits['most']:g}",
                cause="a rare class got the inverse of its share",
                fix="take the root of the shares, or limit the weights",
                evidence={"weights": [float(weight) for weight in weights]},
            )
        )
    if scheme and ratio < limits["least"]:
        findings.append(
            Finding(
                rule="R27",
                severity="error",
                what=f"loss: {scheme} was asked for and the classes weigh alike",
                measured=f"largest over smallest {ratio:.3g}" if positive else "no weights",
                threshold=f"{limits['least']:g} or more",
                cause="the option is read by nobody, or the weights were normalised away",
                fix="hand the weights to the loss, or take the option out",
            )
        )
    if len(mechanisms) > 1:
        findings.append(
            Finding(
                rule="R27",
                severity="warn",
                what=f"loss: {' and '.join(mechanisms)} balance the classes at once",
                measured=f"{len(mechanisms)} mechanisms",
                threshold="one",
                cause="each alone would do, and together they reverse the imbalance",
                fix="keep one of them",
            )
        )
    return findings


def check_class_weights(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R27: what the losses, and the configuration, say of the weights of classes."""
    asked = [str(inspection.config[key]) for key in _SCHEME_KEYS if _is_asked(inspection.config.get(key))]
    findings: list[Finding] = []
    for name in _loss_names(inspection):
        found = dict(_class_weights(inspection.need("loss")(name)))
        ratios = {what: max(each) / max(min(each), 1e-12) for what, each in found.items()}
        balancing = [what for what, ratio in ratios.items() if ratio >= limits["least"]]
        widest = max(found, key=ratios.__getitem__) if found else None
        weights = found[widest] if widest else []
        findings += judge_class_weights(weights, limits, asked[0] if asked else "", balancing)
    return findings


def _is_asked(value: Any) -> bool:
    return isinstance(value, str) and value.lower() not in ("", "none", "uniform", "equal")


def _class_weights(loss: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, list[float]]]:
    """Yield what looks like weights of classes in a loss, its terms and their options, by name."""
    if depth > 3:
        return
    options: dict[str, Any] = dict(loss.keywords) if isinstance(loss, partial) else dict(getattr(loss, "__dict__", {}))
    if isinstance(loss, nn.Module):
        options |= dict(loss.named_buffers(recurse=False)) | dict(loss.named_children())
    for key, value in options.items():
        if key in _WEIGHT_NAMES:
            weights = _as_weights(key, value)
            if weights:
                yield f"{name}{key}", weights
        elif key == "weighted_terms":
            for term, (_, function) in value.items():
                yield from _class_weights(function, f"{term} {key and ''}", depth + 1)
        elif isinstance(value, (nn.Module, partial)):
            yield from _class_weights(value, f"{name}{key} ", depth + 1)


def _as_weights(key: str, value: Any) -> list[float]:
    """Return one weight per class; a single alpha stands for the foreground, with 1 - alpha for the background."""
    if value is None or isinstance(value, (str, bool)):
        return []
    weights = np.asarray(torch.as_tensor(value).detach().cpu(), dtype=float).reshape(-1)
    if weights.size == 1:
        single = float(weights[0])
        if key == "alpha" and 0 < single < 1:
            return [1 - single, single]
        return [1.0, single] if key == "pos_weight" else []
    return [float(weight) for weight in weights]


def _finite(norms: Mapping[str, float]) -> dict[str, float | None]:
    return {name: norm if math.isfinite(norm) else None for name, norm in norms.items()}


RULES: tuple[Rule, ...] = (
    Rule("R18", "terms of the loss", check_terms, {"dead": 1e-8, "ratio": 100, "ignored": 1e-4}),
    Rule("R19", "loss at the edges", check_edges),
    Rule("R27", "weights of the classes", check_class_weights, {"most": 50, "least": 1.01}),
)
