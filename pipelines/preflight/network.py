"""Can this network do what the run asks of it? Shapes are traced without arithmetic, what learns is tried on a copy.

- R21: no step of the network loses resolution that a later one needs. R25: in eval mode one tensor comes out, and the
  weights of its auxiliary heads fall with their resolution. Both follow from one pass over tensors without values.
- R20: a step of each kind runs, and one batch can be learnt by heart. R22: the condition, its place and the noise
  change the result. Both need arithmetic, on the smallest crop that the network takes.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.inference.inferers import AutocastInferer, FlipAveragingInferer
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.training.datasets import collate_batch
from pipelines.training.distributed import world_size
from pipelines.training.phases import parameter_groups
from transforms.diffusion import LABEL_CHANNELS, NoiseSchedule, min_snr_weight

Shape = tuple[int, ...]
Limits = Mapping[str, float]

SMALLEST_CROP = 16  # voxels along an axis of what is learnt by heart
STEP_SIZE = 3e-3  # of Adam on one batch: whether it can be learnt at all, not how fast the run learns
DENOISER_STEP_SIZE = 1e-3  # its first guess is near the answer
SHIFT_VOXELS = 8
MOST_DRAWS = 16  # samples until one has what is looked for
_POOL = {2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}
_SAME_PLACE = ("clone", "_to_copy", "alias", "detach")


# --- shapes, without arithmetic


@dataclass(frozen=True)
class Crop:
    """Voxels that one side of a concatenation has lost along a spatial axis and the other has not."""

    axis: int
    voxels: int
    shape: Shape


@dataclass(frozen=True)
class Thin:
    """A convolution whose kernel is wider than the feature map along a spatial axis."""

    axis: int
    size: int
    kernel: int


@dataclass(frozen=True)
class Trace:
    """What one forward pass does to shapes.

    Attributes:
        input: (B, C, *spatial).
        outputs: name -> shape of every tensor that comes out; a single one is called "".
        heads: spatial size at which each head was computed, before it was resized; main head first.
        crops, thin: see there.
    """

    input: Shape
    outputs: Mapping[str, Shape]
    heads: tuple[Shape, ...] = ()
    crops: tuple[Crop, ...] = ()
    thin: tuple[Thin, ...] = ()


def trace(network: nn.Module, shape: Sequence[int], training: bool = False) -> Trace:
    """Return what a forward pass on (B, C, *spatial) does to shapes, from a copy without values.

    A network that cannot run without values (its control flow depends on them) is run on zeros.
    """
    recorder = _Recorder(tuple(shape))
    try:
        with torch.no_grad(), recorder:
            outputs = without_values(network).train(training)(torch.empty(tuple(shape), device="meta"))
    except (NotImplementedError, RuntimeError):
        recorder = _Recorder(tuple(shape))
        with own_draws(), torch.no_grad(), recorder:
            outputs = copy.deepcopy(network).cpu().train(training)(torch.zeros(tuple(shape)))
    named = dict(_tensors(outputs))
    heads: tuple[Shape, ...] = tuple(recorder.native(each) for each in named.values())
    if len(named) == 1:
        heads = recorder.heads(next(iter(named.values()))) or heads
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return Trace(tuple(shape), shapes, heads, tuple(recorder.crops), tuple(recorder.thin))


def without_values(network: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers have shapes only: nothing of the network's size is copied."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


@dataclass(frozen=True)
class _Origin:
    """Where the voxels of a tensor come from."""

    cropped: Mapping[int, int] = field(default_factory=dict)  # axis -> voxels
    native: Shape | None = None  # spatial size before it was resized
    heads: tuple[Shape, ...] = ()


class _Recorder(TorchDispatchMode):
    """Watch every operation of a forward pass."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.flat = {axis for axis, size in enumerate(shape) if axis >= 2 and size < 2}
        self.dimensions = len(shape)
        self.crops: list[Crop] = []
        self.thin: list[Thin] = []
        self._origins: dict[int, tuple[torch.Tensor, _Origin]] = {}  # the tensor is kept: else its id would be reused

    def native(self, tensor: torch.Tensor) -> Shape:
        return self._origin(tensor).native or tuple(tensor.shape[2:])

    def heads(self, tensor: torch.Tensor) -> tuple[Shape, ...]:
        return self._origin(tensor).heads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and args:
            self._look(func, args, result)
        return result

    def _look(self, func: Any, args: Sequence[Any], result: torch.Tensor) -> None:
        name = func._schema.name.removeprefix("aten::")
        first = args[0]
        if name in ("cat", "stack"):
            self._join(list(first), result, args[1] if len(args) > 1 else 0)
        elif not isinstance(first, torch.Tensor):
            return
        elif name == "convolution":
            self._convolve(first, args[1], result)
        elif name.startswith(("upsample_", "_upsample_")):
            self._note(result, _Origin(native=self.native(first)))
        elif name in ("slice", "constant_pad_nd") and first.ndim == result.ndim >= 4:
            lost = {a: first.shape[a] - result.shape[a] for a in range(2, first.ndim) if result.shape[a]}
            before = self._origin(first)
            cropped = {a: before.cropped.get(a, 0) + n for a, n in lost.items() if n > 0}
            self._note(result, replace(before, cropped={**before.cropped, **cropped}))
        elif name in _SAME_PLACE or name == "unsqueeze" or torch.Tag.pointwise in func.tags:
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            known = [self._origin(each) for each in tensors if each.shape[2:] == result.shape[2:]]
            known = known or [self._origin(first)] * (name == "unsqueeze")
            if known:
                self._note(result, max(known, key=lambda origin: sum(origin.cropped.values())))

    def _join(self, tensors: Sequence[torch.Tensor], result: torch.Tensor, axis: int) -> None:
        origins = [self._origin(tensor) for tensor in tensors]
        if len(tensors) > 1 and axis == 1 and tensors[0].ndim >= 4:
            for each in range(2, tensors[0].ndim):
                lost = [origin.cropped.get(each, 0) for origin in origins]
                if max(lost) - min(lost) > 0:
                    self.crops.append(Crop(each - 2, max(lost) - min(lost), tuple(result.shape)))
        natives = [origin.native or tuple(t.shape[2:]) for t, origin in zip(tensors, origins, strict=True)]
        self._note(result, _Origin(heads=tuple(natives)))

    def _convolve(self, image: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None:
        same_axes = image.ndim == self.dimensions
        for axis in range(2, image.ndim):
            kernel, size = int(weight.shape[axis]), min(image.shape[axis], result.shape[axis])
            if kernel > 1 and size < 2 and not (same_axes and axis in self.flat):
                self.thin.append(Thin(axis - 2, int(size), kernel))

    def _origin(self, tensor: torch.Tensor) -> _Origin:
        return self._origins[id(tensor)][1] if id(tensor) in self._origins else _Origin()

    def _note(self, tensor: torch.Tensor, origin: _Origin) -> None:
        self._origins[id(tensor)] = (tensor, origin)


def _tensors(outputs: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in what a network returns, by name."""
    if isinstance(outputs, torch.Tensor):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _tensors(value, f"{name}{key}/")
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from _tensors(value, f"{name}{number}/")


# --- what the shapes say


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


# --- real samples, on a copy


def need_one_process() -> None:
    """Raise ``CannotRun`` in a run of several processes: the battery is in one of them, a loss waits for all."""
    if world_size() > 1:
        raise CannotRun("losses and metrics add up over all processes of a run; check it in a single one")


def input_shape(inspection: Inspection) -> Shape:
    """Return the shape (1, C, *spatial) of a training sample's image."""
    return (1, *np.shape(next(draw_samples(inspection))["image"]))


def draw_samples(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Yield training samples; the data set, its epoch and its transforms stay as they are."""
    dataset = copy.copy(inspection.need("train"))
    if hasattr(dataset, "transform"):
        dataset.transform = copy.deepcopy(dataset.transform)
    for index in itertools.count():
        yield dataset[index]


def draw_batch(inspection: Inspection, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and label of ``size`` samples on the run's device: of up to 16 draws those with foreground first.

    In a fusion that is a lesion; then come those with most brain and bone.
    """
    chosen: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for sample in itertools.islice(draw_samples(inspection), max(size, MOST_DRAWS)):
        label = torch.as_tensor(np.asarray(sample["label"]))
        wanted = label[LABEL_CHANNELS.index("lesion")] if inspection.task == "fusion" else label
        (chosen if bool((wanted != 0).any()) else others).append(sample)
        if len(chosen) == size:
            break
    others.sort(key=lambda sample: -int(content(inspection.task, torch.as_tensor(np.asarray(sample["label"]))).sum()))
    batch = collate_batch([*chosen, *others][:size])
    device = inspection.device or torch.device("cpu")
    return batch["image"].to(device), batch["label"].to(device)


def content(task: str, label: torch.Tensor) -> torch.Tensor:
    """Return where a label (C, *spatial) has something to learn, (*spatial): a foreground, or brain and bone."""
    if task == "fusion":
        return (label[LABEL_CHANNELS.index("brain")] + label[LABEL_CHANNELS.index("bone")]) > 0
    return label[0] != 0


def at_time(
    image: torch.Tensor, label: torch.Tensor, schedule: NoiseSchedule, t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of a diffusion at time ``t``, with the same noise whenever it is asked for.

    Args:
        image: (B, C + 2, *spatial), x_t and t last.
        label: (B, 7, *spatial), x0 first and the weight last.
    """
    with own_draws():
        noise = torch.randn(label[:, :1].shape).to(label)
    image, label = image.clone(), label.clone()
    image[:, -2:-1] = schedule.add_noise(label[:, :1], noise, t)
    image[:, -1] = t
    label[:, -1] = 1.0 if schedule.name == "none" else min_snr_weight(schedule, t)
    return image, label


def smallest_size(network: nn.Module, shape: Shape, least: int = SMALLEST_CROP) -> Shape:
    """Return the smallest spatial size, halved again and again along all axes, that the network can learn on."""
    size = tuple(shape[2:])
    while True:
        half = tuple(each // 2 if each % 2 == 0 and each // 2 >= least else each for each in size)
        if half == size or not _takes(network, (*shape[:2], *half)):
            return size
        size = half


def _takes(network: nn.Module, shape: Shape) -> bool:
    try:
        with torch.no_grad(), (recorder := _Recorder(shape)):
            outputs = without_values(network).train()(torch.empty(shape, device="meta"))
    except Exception:  # whatever it is, the size is not taken
        return False
    return not recorder.thin and all(tensor.ndim >= len(shape) for _, tensor in _tensors(outputs))


def crop_to(
    image: torch.Tensor, label: torch.Tensor, size: Sequence[int], weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch cropped to ``size``: where ``weight`` (B, 1, *spatial) sums up to most, or in the middle."""
    pairs = []
    for number, (one, truth) in enumerate(zip(image, label, strict=True)):
        starts = [(length - voxels) // 2 for voxels, length in zip(size, one.shape[1:], strict=True)]
        if weight is not None and bool(weight[number].any()):
            strides = [max(1, voxels // 2) for voxels in size]
            pooled = _POOL[len(size)](weight[number : number + 1].float(), list(size), strides)[0, 0]
            best = np.unravel_index(int(pooled.argmax()), tuple(pooled.shape))
            starts = [int(index) * stride for index, stride in zip(best, strides, strict=True)]
        window = [slice(start, start + voxels) for start, voxels in zip(starts, size, strict=True)]
        pairs.append((one[(slice(None), *window)], truth[(slice(None), *window)]))
    return torch.stack([one for one, _ in pairs]), torch.stack([truth for _, truth in pairs])


@contextmanager
def own_draws(seed: int = 0) -> Iterator[None]:
    """Draw from a state of torch's generators of one's own; put theirs back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# --- R20: every step runs, and one batch is learnt by heart


@dataclass(frozen=True)
class Learnt:
    """How far one batch was learnt by heart.

    Attributes:
        first, last: loss, finite or not.
        steps: taken.
        dice: of the foreground in the end; None where it is no segmentation.
        mse_ratio: of a fusion: error of x0 in the end over that of the beginning.
        mse: of a fusion: error of x0 in the end.
    """

    first: float
    last: float
    steps: int
    dice: float | None = None
    mse_ratio: float | None = None
    mse: float | None = None

    def enough(self, limits: Limits) -> bool:
        """Return whether this is by heart."""
        fell = self.first - self.last >= (limits["loss_fall"] - 1e-9) * abs(self.first)
        close = self.mse_ratio is not None and self.mse_ratio < limits["mse_ratio"]
        close |= self.mse is not None and self.mse < limits["mse"]
        return fell or close or (self.dice is not None and self.dice >= limits["dice"])


def judge_learnt(found: Learnt, limits: Limits) -> list[Finding]:
    """R20: a batch that cannot be learnt by heart means a path that is broken somewhere."""
    if found.enough(limits):
        return []
    fall = 1 - found.last / found.first if math.isfinite(found.last) and found.first else math.nan
    figure = f", Dice {found.dice:.2f}" if found.dice is not None else ""
    figure += f", error of x0 at {found.mse_ratio:.2f} of its start" if found.mse_ratio is not None else ""
    return [
        Finding(
            rule="R20",
            severity="error",
            what="network: one batch cannot be learnt by heart",
            measured=f"the loss fell by {100 * fall:.0f} % in {found.steps} steps{figure}",
            threshold=f"by {100 * limits['loss_fall']:.0f} %, or Dice {limits['dice']:g}, in {limits['steps']:g} steps",
            cause="image and label do not belong together, no gradient reaches the weights, or the loss is another's",
            fix="look at a training sample and at which parameters learn",
            evidence={"first_loss": _json(found.first), "last_loss": _json(found.last)},
        )
    ]


def judge_steps(errors: Mapping[str, str]) -> list[Finding]:
    """R20: kind of step -> what went wrong, empty where it ran."""
    return [
        Finding(
            rule="R20",
            severity="error",
            what=f"one step of {name} does not run",
            measured=error,
            threshold="it runs",
            cause="network, loss, inferer and metric do not fit together",
            fix=f"correct what {name} is put together from",
        )
        for name, error in errors.items()
        if error
    ]


def worth_learning(inspection: Inspection, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a small batch, cropped to where there is most to learn: borders of the label, errors of the first guess.

    One sample, of slices two; a fusion at t = 1, because early times, and clean inputs, leave nothing to learn.
    """
    shape = input_shape(inspection)
    number = 1 if sum(each > 1 for each in shape[2:]) > 2 else 2
    size = smallest_size(network, shape)
    schedule = getattr(inspection.inferer, "schedule", None)
    if inspection.task != "fusion" or not isinstance(schedule, NoiseSchedule):
        image, label = draw_batch(inspection, number)
        return crop_to(image, label, size, _borders((label[:, :1] != 0).float()))
    image, label = at_time(*draw_batch(inspection, 4 * number), schedule, 1.0)
    with torch.no_grad():
        guess = torch.cat([AutocastInferer(inspection.precision)(each[None], network.eval()) for each in image])
    error = (guess - label[:, :1]).square()
    most = error.flatten(1).mean(1).argsort(descending=True)[:number]
    return crop_to(image[most], label[most], size, error[most])


def _borders(mask: torch.Tensor) -> torch.Tensor:
    """Return how much a mask (B, 1, *spatial) differs from its neighbourhood of three voxels."""
    axes = mask.ndim - 2
    return (mask - _POOL[axes](mask, [3] * axes, [1] * axes, [1] * axes, count_include_pad=False)).abs()


def check_path(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R20 on a copy of the network."""
    need_one_process()
    network = copy.deepcopy(inspection.need("network"))
    image, label = worth_learning(inspection, network)
    loss = inspection.need("loss")(inspection.need("plan")[0].loss)
    learnt: list[Learnt] = []

    def training() -> None:
        learnt.append(overfit(inspection, network, loss, image, label, limits))

    steps: dict[str, Callable[[], object]] = {"training": training}
    if inspection.inferer is not None and inspection.validation is not None and len(inspection.validation):
        item = window_of(inspection.validation[0], input_shape(inspection)[2:])
        steps["validation"] = lambda: _validate(inspection, network.eval(), item)
        if inspection.task == "segmentation":
            average = FlipAveragingInferer(inspection.inferer, (0,))
            steps["inference"] = lambda: predict(inspection, network.eval(), item, average)
    with own_draws():
        errors = {name: _error_of(step) for name, step in steps.items()}
    return judge_steps(errors) + [finding for each in learnt for finding in judge_learnt(each, limits)]


def overfit(
    inspection: Inspection,
    network: nn.Module,
    loss: Callable[..., torch.Tensor],
    image: torch.Tensor,
    label: torch.Tensor,
    limits: Limits,
) -> Learnt:
    """Train ``network`` (a copy) on one batch until it knows it by heart, in ``limits["steps"]`` steps at most."""
    groups = parameter_groups(network, inspection.plan[0])
    step_size = DENOISER_STEP_SIZE if inspection.task == "fusion" else STEP_SIZE
    optimizer = torch.optim.Adam([{"params": group["params"]} for group in groups], lr=step_size)
    forward = AutocastInferer("fp32" if inspection.precision == "fp16" else inspection.precision)
    network.train()
    found: Learnt | None = None
    first_error = math.nan
    for step in range(int(limits["steps"]) + 1):
        optimizer.zero_grad()
        outputs = forward(image, network)
        value = loss(outputs, label)
        dice, error = _figures(inspection.task, outputs, label)
        first_error = error if step == 0 else first_error
        figures = (error / max(first_error, 1e-12), error) if inspection.task == "fusion" else ()
        first = float(value.detach()) if found is None else found.first
        found = Learnt(first, float(value.detach()), step, dice, *figures)
        if not math.isfinite(found.last) or (step and found.enough(limits)):
            break
        value.backward()
        optimizer.step()
    assert found is not None
    return found


@torch.no_grad()
def _figures(task: str, outputs: Any, label: torch.Tensor) -> tuple[float | None, float]:
    """Return the Dice of the foreground, and the mean squared error of a fused image."""
    main = outputs if isinstance(outputs, torch.Tensor) else next(tensor for _, tensor in _tensors(outputs))
    if task == "fusion":
        return None, float((main[:, :1].float() - label[:, :1]).square().mean())
    if task != "segmentation":
        return None, math.nan
    logits = main[:, 0] if main.ndim == label.ndim + 1 else main
    predicted = logits.argmax(1, keepdim=True) if logits.shape[1] > 1 else (logits > 0).to(label.dtype)
    both, sizes = ((predicted == label) & (label > 0)).sum(), (predicted > 0).sum() + (label > 0).sum()
    return (float(2 * both / sizes) if sizes else None), math.nan


def window_of(item: Mapping[str, Any], size: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return image and label of a case, (1, C, *spatial), about its middle: one window, a few slices if it is one."""
    window = []
    for voxels, length in zip(size, np.shape(item["image"])[1:], strict=True):
        wanted = min(voxels if voxels > 1 else 4, length)
        window.append(slice((length - wanted) // 2, (length - wanted) // 2 + wanted))
    return {
        key: torch.as_tensor(np.asarray(item[key])[(slice(None), *window)].copy())[None] for key in ("image", "label")
    }


@torch.no_grad()
def predict(
    inspection: Inspection, network: nn.Module, item: Mapping[str, torch.Tensor], inferer: Any = None
) -> torch.Tensor:
    """Return what validation makes of a case (1, C, *spatial): a label map, or a fused image (1, 1, *spatial)."""
    output = (inferer or inspection.need("inferer"))(item["image"].to(inspection.device or "cpu"), network)
    if inspection.task == "segmentation":
        return output.argmax(1, keepdim=True) if output.shape[1] > 1 else (output > 0).int()
    return output


def _validate(inspection: Inspection, network: nn.Module, item: Mapping[str, torch.Tensor]) -> None:
    """Run a case through inferer and metric as validation does."""
    output = predict(inspection, network, item)
    if inspection.task not in ("segmentation", "fusion"):
        return
    for metric in inspection.metrics.values():
        own = copy.deepcopy(metric)
        own.reset()
        own.update([{"pred": output[0].cpu(), "label": item["label"][0]}])


def _error_of(step: Callable[[], object]) -> str:
    try:
        step()
    except CannotRun:
        raise
    except Exception as problem:  # a step that breaks is the finding
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    return ""


# --- R22: the condition and the noise matter


@dataclass(frozen=True)
class Responses:
    """By how much a result changes, relative to its own size, when something else is given.

    Attributes:
        swapped: the condition of another case.
        shifted: the same condition, moved.
        noise: another noise; None where there is none.
    """

    swapped: float
    shifted: float
    noise: float | None = None


def judge_responses(found: Responses, limits: Limits) -> list[Finding]:
    """R22: a condition that another, or the same elsewhere, does not change; samples that are all alike."""
    checks = (
        (found.swapped, limits["change"], "the condition of another case", "the condition does not reach the output"),
        (
            found.shifted,
            limits["change"],
            f"the condition moved by {SHIFT_VOXELS} voxels",
            "the condition is pooled to a vector, and has lost where things are",
        ),
        (found.noise, 0.0, "another noise", "the noise does not reach the output: all samples are one"),
    )
    return [
        Finding(
            rule="R22",
            severity="error",
            what=f"network: {given} does not change the output",
            measured=f"{100 * value:.3g} % of the output's spread",
            threshold=f"{'more than' if limit == 0 else 'at least'} {100 * limit:g} %",
            cause=cause,
            fix="lead the condition into the network voxel by voxel, beside x_t",
        )
        for value, limit, given, cause in checks
        if value is not None and (value < limit or value <= 0)
    ]


def check_condition(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R22 at t = 1, where the condition is all that the network has.

    A layer that starts at zero is woken on a copy: what it will carry is what the network carries without it, and is
    measured alone, so that a first guess that is added to the output does not stand in for it.
    """
    network, inferer = inspection.need("network"), inspection.need("inferer")
    channels = getattr(inferer, "condition_channels", None)
    if channels is None:
        raise CannotRun("the inferer does not say how many channels the condition has")
    images, _ = draw_batch(inspection, MOST_DRAWS // 4)
    condition = images[:, :channels]
    other = _least_alike(condition)
    return judge_responses(responses(network, condition[:1], condition[other : other + 1], inferer.schedule), limits)


def _least_alike(condition: torch.Tensor) -> int:
    distance = (condition - condition[:1]).flatten(1).square().mean(1)
    if not float(distance.max()) > 0:
        raise CannotRun("all samples drawn have the same condition")
    return int(distance.argmax())


@torch.no_grad()
def responses(network: nn.Module, condition: torch.Tensor, other: torch.Tensor, schedule: Any) -> Responses:
    """Return how the learnt part of a denoiser responds.

    Args:
        network: maps (1, C + 2, *spatial), condition, x_t and t, to (1, 1, *spatial).
        condition, other: (1, C, *spatial) of two cases.
        schedule: with the ``name`` of the noise; ``none`` has none.
    """
    awake, asleep = wake(network), copy.deepcopy(network).eval()
    without_noise = getattr(schedule, "name", "") == "none"

    def learnt(given: torch.Tensor, seed: int) -> torch.Tensor:
        with own_draws(seed):
            x_t = torch.zeros_like(given[:, :1]) if without_noise else torch.randn(given[:, :1].shape).to(given)
        whole = torch.cat([given, x_t, torch.ones_like(x_t)], 1)
        return awake(whole) if awake.untouched else awake(whole) - asleep(whole)

    result = learnt(condition, 0)
    axis = 2 + int(np.argmax(condition.shape[2:]))
    shift = min(SHIFT_VOXELS, condition.shape[axis] // 4)
    spread = float(result.std()) or float(result.abs().mean()) or 1.0

    def change(changed: torch.Tensor) -> float:
        return float((changed - result).square().mean().sqrt()) / spread

    return Responses(
        change(learnt(other, 0)),
        change(learnt(torch.roll(condition, shift, axis), 0)),
        None if without_noise else change(learnt(condition, 1)),
    )


class _Awake(nn.Module):
    """A copy of a network in which no layer is all zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        zero = [
            parameter
            for parameter in self.network.parameters()
            if parameter.ndim >= 2 and parameter.numel() and not bool(parameter.any())
        ]
        self.untouched = not zero
        with own_draws(), torch.no_grad():
            for parameter in zero:
                parameter.copy_(torch.randn(parameter.shape) / math.sqrt(math.prod(parameter.shape[1:])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the copy."""
        return self.network(x)


def wake(network: nn.Module) -> _Awake:
    """Return a copy in eval mode whose all-zero kernels are random; ``untouched`` where there were none."""
    return _Awake(network)


def _by(size: Sequence[int]) -> str:
    return " x ".join(str(each) for each in size)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


RULES: tuple[Rule, ...] = (
    Rule("R21", "resolution", check_resolution, {"crop_voxels": 1}),
    Rule(
        "R25",
        "output contract",
        check_outputs,
        tasks=("segmentation", "fusion", "organelles", "spectral"),
    ),
    Rule(
        "R20",
        "every step runs and one batch is learnt",
        check_path,
        {"loss_fall": 0.8, "dice": 0.9, "mse_ratio": 0.2, "mse": 1e-4, "steps": 200},
        when="smoke",
    ),
    Rule("R22", "condition and noise", check_condition, {"change": 0.01}, when="smoke", tasks=("fusion",)),
)
