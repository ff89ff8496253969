"""Can this network give what the run asks of it? Two rules that follow from shapes alone.

- R21: no step of the network loses resolution that a later one needs.
- R25: in eval mode one tensor comes out, also through the inferer, and the weights of auxiliary heads fall with their
  resolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipelines.inference.inferers import FlipAveragingInferer
from pipelines.preflight.finding import Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import Shape, input_shape
from pipelines.preflight.tracing import Trace, trace

Limits = Mapping[str, float]


def judge_resolution(found: Trace, limits: Limits) -> list[Finding]:
    """R21: crops before a concatenation, feature maps thinner than the kernel over them, an output that is coarser."""
    where = f"network on {_by(found.input[2:])} voxels"
    seen: list[tuple[str, str, str]] = []
    crops = [crop for crop in found.crops if crop.voxels > limits["crop_voxels"]]
    if crops:
        worst = max(crops, key=lambda crop: crop.voxels)
        seen.append(
            (
                f"{where}: features are cropped before they are joined, axis {worst.axis}",
                f"{worst.voxels} voxels lost before a join of {_by(worst.shape[2:])}, {len(crops)} in all",
                f"at most {limits['crop_voxels']:g}",
            )
        )
    if found.thin:
        axes = sorted({thin.axis for thin in found.thin})
        seen.append(
            (
                f"{where}: nothing is left to convolve along axis {', '.join(map(str, axes))}",
                f"{len(found.thin)} convolutions over a size of {min(thin.size for thin in found.thin)}",
                "2 voxels or more",
            )
        )
    for name, shape in found.outputs.items():
        if shape[2:] != found.input[2:]:
            seen.append(
                (
                    f"{where}: the output{' ' + name if name else ''} is not at the resolution of the input",
                    f"shape {shape}",
                    f"{_by(found.input[2:])} voxels",
                )
            )
    return [
        Finding(
            rule="R21",
            severity="error",
            what=what,
            measured=measured,
            threshold=threshold,
            cause="the network pools an axis more often than its size allows",
            fix="pool the axis less often, or take a patch that its strides divide",
        )
        for what, measured, threshold in seen
    ]


def judge_outputs(evaluated: Trace, channels: int | None = None) -> list[Finding]:
    """R25: in eval mode a network returns one tensor (B, channels, *spatial)."""
    shapes = list(evaluated.outputs.values())
    right = len(shapes) == 1 and len(shapes[0]) == len(evaluated.input) and shapes[0][1] == (channels or shapes[0][1])
    if right and "" in evaluated.outputs:
        return []
    return [
        Finding(
            rule="R25",
            severity="error",
            what="network: what eval() returns is not one output",
            measured=f"{len(shapes)} tensor(s) of shape {', '.join(map(str, shapes[:3])) or 'none'}",
            threshold=f"one tensor (B, {channels or 'channels'}, *spatial)",
            cause="auxiliary heads of training are returned in inference too",
            fix="let the network return its main head alone in eval mode",
        )
    ]


def judge_head_weights(sizes: Sequence[Shape], weights: Sequence[float]) -> list[Finding]:
    """R25: the weight of a head does not grow as its resolution falls.

    Args:
        sizes: spatial size at which each head was computed.
        weights: of the same heads.
    """
    heads = sorted(zip(sizes, weights, strict=True), key=lambda head: -math.prod(head[0]))
    for (fine, of_fine), (coarse, of_coarse) in itertools.pairwise(heads):
        if math.prod(coarse) < math.prod(fine) and of_coarse > of_fine * (1 + 1e-9):
            return [
                Finding(
                    rule="R25",
                    severity="error",
                    what=f"loss: the head of {_by(coarse)} voxels counts more than that of {_by(fine)}",
                    measured=f"weights {of_coarse:.3g} and {of_fine:.3g}",
                    threshold="weights that do not grow as the resolution falls",
                    cause="the weights stand in the reverse order of the heads",
                    fix="give the largest weight to the head of full resolution",
                )
            ]
    return []


def check_resolution(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R21 on a patch of the run."""
    return judge_resolution(trace(inspection.need("network"), input_shape(inspection)), limits)


def check_outputs(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R25: the network in both modes, and the inferer of validation around a network that keeps the contract."""
    network, shape = inspection.need("network"), input_shape(inspection)
    channels = _channels(inspection)
    evaluated = trace(network, shape)
    findings = judge_outputs(evaluated, channels)
    trained = trace(network, shape, training=True)
    for name in dict.fromkeys(phase.loss for phase in inspection.plan):
        weights = _head_weights(inspection.need("loss")(name), len(trained.heads))
        if weights is not None and len(weights) == len(trained.heads) > 1:
            findings += judge_head_weights(trained.heads, weights)
    if not findings and inspection.inferer is not None:
        findings = _check_inferer(inspection, next(iter(evaluated.outputs.values()))[1])
    return findings[:1]


def _check_inferer(inspection: Inspection, channels: int) -> list[Finding]:
    """The inferer alone, and averaged over flips, on a volume larger than a window, with nothing to compute."""
    inferer, shape = inspection.inferer, input_shape(inspection)
    given = int(getattr(inferer, "condition_channels", shape[1]))
    volume = torch.zeros(1, given, *(size + 2 for size in shape[2:]))

    def stand_in(window: torch.Tensor) -> torch.Tensor:
        return window.new_zeros(window.shape[0], channels, *window.shape[2:])

    ways: dict[str, Callable[..., Any]] = {"validation": inferer}
    if inspection.task == "segmentation":
        ways["test-time augmentation"] = FlipAveragingInferer(inferer, range(len(shape) - 2))
    allowed = {channels, channels + 1} if given != shape[1] else {channels}  # a sampler may add its uncertainty
    for name, way in ways.items():
        with torch.no_grad():
            result = way(volume, stand_in)
        right = isinstance(result, torch.Tensor) and result.shape[2:] == volume.shape[2:] and result.shape[1] in allowed
        if not right:
            measured = str(tuple(result.shape)) if isinstance(result, torch.Tensor) else type(result).__name__
            return [
                Finding(
                    rule="R25",
                    severity="error",
                    what=f"inferer of {name}: not one output on the grid of its input",
                    measured=f"{measured} for an input of {tuple(volume.shape)}",
                    threshold=f"one tensor (B, {channels}, *spatial)",
                    cause="windows or augmentation change the shape",
                    fix="correct the inferer",
                )
            ]
    return []


def _channels(inspection: Inspection) -> int | None:
    """Return how many channels the network has to return; None where the bundle does not say."""
    if inspection.task == "segmentation":
        return len(inspection.contract.get("labels", ())) or None
    return 1 if inspection.task == "fusion" else inspection.extra.get("out_channels")


def _head_weights(loss: Any, heads: int) -> Sequence[float] | None:
    if hasattr(loss, "head_weights"):
        return loss.head_weights(heads)
    weights = getattr(loss, "weights", None)
    return weights if isinstance(weights, (list, tuple)) else None


def _by(size: Sequence[int]) -> str:
    return " x ".join(str(each) for each in size)


RULES: tuple[Rule, ...] = (
    Rule("R21", "resolution", check_resolution, {"crop_voxels": 1}),
    Rule(
        "R25",
        "output contract",
        check_outputs,
        tasks=("segmentation", "fusion", "organelles", "spectral"),
    ),
)
