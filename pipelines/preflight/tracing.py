"""What a forward pass does to shapes, watched without arithmetic: on tensors that have a shape and no values.

A ``Trace`` says which tensors come out, at which resolution each head was computed, where features lose voxels before
they are joined, and where a kernel is wider than what it runs over. Nothing here judges; ``network.py`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.inference.memory import without_values
from pipelines.preflight.samples import Shape, own_draws

SMALLEST_CROP = 16  # voxels along an axis of what is learnt by heart
_SAME_PLACE = ("clone", "_to_copy", "alias", "detach")


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
    named = dict(tensors_in(outputs))
    heads: tuple[Shape, ...] = tuple(recorder.native(each) for each in named.values())
    if len(named) == 1:
        heads = recorder.heads(next(iter(named.values()))) or heads
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return Trace(tuple(shape), shapes, heads, tuple(recorder.crops), tuple(recorder.thin))


def smallest_size(
    network: nn.Module, shape: Shape, least: int = SMALLEST_CROP, reader: nn.Module | None = None
) -> Shape:
    """Return the smallest spatial size, halved again and again along all axes, that the network can learn on.

    Args:
        network: takes (B, C, *spatial).
        shape: (B, C, *spatial) of the run.
        least: voxels per axis.
        reader: of a loss that looks at the output, one channel, with a network of its own.
    """
    size = tuple(shape[2:])
    while True:
        half = tuple(each // 2 if each % 2 == 0 and each // 2 >= least else each for each in size)
        read = reader is None or _takes(reader, (shape[0], 1, *half))
        if half == size or not read or not _takes(network, (*shape[:2], *half)):
            return size
        size = half


def _takes(network: nn.Module, shape: Shape) -> bool:
    try:
        with torch.no_grad(), (recorder := _Recorder(shape)):
            outputs = without_values(network).train()(torch.empty(shape, device="meta"))
    except Exception:  # whatever it is, the size is not taken
        return False
    return not recorder.thin and all(tensor.ndim >= len(shape) for _, tensor in tensors_in(outputs))


def tensors_in(outputs: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in what a network returns, by name."""
    if isinstance(outputs, torch.Tensor):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from tensors_in(value, f"{name}{key}/")
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from tensors_in(value, f"{name}{number}/")


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
