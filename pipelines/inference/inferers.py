"""Inferers that wrap one another: windows over a volume, arithmetic of the run, averaging over flips.

Each is a MONAI ``Inferer`` and takes another one, so that a bundle composes them in its configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from monai.utils import convert_to_dst_type
from torch.nn.modules.instancenorm import _InstanceNorm

from pipelines.inference.memory import available_bytes, forward_bytes
from pipelines.names import nearest
from pipelines.networks import input_divisor
from transforms.errors import BundleError, ResourceError

logger = logging.getLogger(__name__)

WINDOWS = ("patch", "whole")
FORWARD_WORKSPACE = 1.2  # times what the tensors hold: convolutions keep reordered copies (measured: 1.21)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device | str) -> str:
    """Return the arithmetic of the network's forward pass: ``fp32``, ``bf16`` or ``fp16``.

    ``auto`` takes bf16 where the hardware multiplies it natively (CPU with AVX-512 BF16 or AMX; GPU of compute
    capability 8 or more), fp16 on an older GPU, else fp32: on a CPU that only emulates bf16 it costs time and gains
    nothing.

    Raises:
        BundleError: an unknown name, or fp16 on a CPU (no scaled gradients there).
    """
    kind = torch.device(device).type
    if name == "auto":
        if kind == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if kind == "cpu" and _cpu_multiplies_bf16() else "fp32"
    if name not in PRECISIONS:
        raise BundleError(f"precision {name!r}", f"expected auto, {', '.join(PRECISIONS)}", "correct precision")
    if name == "fp16" and kind == "cpu":
        raise BundleError("precision fp16 on a CPU", "half precision needs a GPU", "use bf16, fp32 or auto")
    return name


def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


class AutocastInferer(Inferer):
    """Run another inferer with the network in reduced precision; the result is float32.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16`` (see ``choose_precision``).
        inferer: the inferer to wrap; by default the network is called once on the whole input.
    """

    def __init__(self, precision: str, inferer: Inferer | None = None) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise BundleError(f"precision {precision!r}", f"expected {', '.join(PRECISIONS)}", "use choose_precision")
        self.dtype = PRECISIONS[precision]
        self.inferer = inferer or SimpleInferer()

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float32:
            return self.inferer(inputs, network, *args, **kwargs)

        def in_reduced_precision(window: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
            with torch.autocast(window.device.type, dtype=self.dtype):
                return network(window, *a, **k).float()

        return self.inferer(inputs, in_reduced_precision, *args, **kwargs)


class WholeImageInferer(Inferer):
    """Call the network once for a whole image, padded behind with zeros to a size that the network takes.

    Nothing is computed twice, as windows that overlap are; memory grows with the image. It is for networks whose answer
    does not hang on what else they see (batch normalisation): with instance normalisation it is another answer than
    that of the windows which the network learnt from.

    Args:
        divisor: what the size along each axis must be a multiple of, see ``pipelines.networks.input_divisor``.
        architecture: of the network, to count what it needs before it is called; None does not count.

    Returns:
        What the network returns, (B, K, *spatial), on the image's own grid.

    Raises:
        ResourceError: the image needs more memory than there is.
    """

    def __init__(self, divisor: Sequence[int], architecture: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.divisor = tuple(int(step) for step in divisor)
        self.architecture = architecture
        self._fit: set[torch.Size] = set()  # counting takes a tenth of a second, and mirrored copies have one size

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        size = inputs.shape[2:]
        missing = [-length % step for length, step in zip(size, self.divisor, strict=True)]
        behind = [amount for pad in reversed(missing) for amount in (0, pad)]
        padded = torch.nn.functional.pad(inputs, behind)
        if self.architecture is not None and padded.shape not in self._fit:
            _refuse_too_large(self.architecture, padded)
            self._fit.add(padded.shape)
        result = network(padded, *args, **kwargs)
        cropped = result[(..., *(slice(length) for length in size))]
        return convert_to_dst_type(cropped, inputs, dtype=cropped.dtype)[0]  # the grid of the image stays with it


def _refuse_too_large(architecture: torch.nn.Module, image: torch.Tensor) -> None:
    """Refuse what would not fit: on a CPU the system ends such a process without a word."""
    available = available_bytes(image.device)
    needed = FORWARD_WORKSPACE * forward_bytes(architecture, image.shape)
    if available is not None and needed > available:
        raise ResourceError(
            f"window whole: an image of {'x'.join(map(str, image.shape[2:]))} voxels does not fit",
            f"the network needs about {needed / 2**30:.1f} GiB at once, there are {available / 2**30:.1f}",
            "use --window patch, or a machine with more memory",
        )


def windows_or_whole(
    window: str, patch_size: Sequence[int], overlap: float, network: torch.nn.Module, windows_per_call: int = 2
) -> Inferer:
    """Return the inferer of a volume: ``patch``, MONAI's Gaussian-blended windows; ``whole``, one call for all.

    Args:
        window: ``patch`` or ``whole``; the second is warned of where the network has instance normalisation.
        patch_size: of the training, three axes.
        overlap: of neighbouring windows, as a share of one.
        network: that will be called, or of its architecture: tells which sizes it takes.
        windows_per_call: windows that the network gets at once.

    Raises:
        BundleError: another name. What is returned raises ResourceError for a whole image that does not fit.
    """
    if window not in WINDOWS:
        raise BundleError(f"window {window!r}", f"expected {' or '.join(WINDOWS)}", nearest(window, WINDOWS))
    if window == "patch":
        return SlidingWindowInferer(patch_size, windows_per_call, overlap, mode="gaussian")
    if any(isinstance(module, _InstanceNorm) for module in network.modules()):
        logger.warning(
            "window whole: this network normalises by what it sees, and has learnt from windows of %s voxels; "
            "its answer will be another one, so measure it first (`fiducial evaluate ... --window whole`)",
            "x".join(map(str, patch_size)),
        )
    return WholeImageInferer(input_divisor(network, len(patch_size)) or patch_size, network)


def class_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return probabilities (B, K, *spatial) float32 for logits: softmax over K, or sigmoid where K is 1."""
    return torch.sigmoid(logits.float()) if logits.shape[1] == 1 else torch.softmax(logits.float(), dim=1)


class FlipAveragingInferer(Inferer):
    """Class probabilities, averaged over mirrored copies of the image (test-time augmentation).

    Args:
        inferer: gives logits (B, K, *spatial) for an image (B, C, *spatial).
        axes: spatial axes that may be mirrored; every subset is used, so n axes cost 2^n passes. () = one pass.

    Returns:
        Probabilities (B, K, *spatial) float32, see ``class_probabilities``.

    Raises:
        BundleError: an axis named twice, or negative (it would count from the end and mirror channels).
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int] = ()) -> None:
        super().__init__()
        self.inferer = inferer
        self.axes = tuple(int(axis) for axis in axes)
        if len(set(self.axes)) != len(self.axes) or any(axis < 0 for axis in self.axes):
            raise BundleError(f"flip_axes {list(axes)}", "expected spatial axes from 0, each once", "correct flip_axes")

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        subsets = list(chain.from_iterable(combinations(self.axes, n) for n in range(len(self.axes) + 1)))
        total: torch.Tensor | None = None
        for subset in subsets:
            dims = [axis + 2 for axis in subset]
            logits = self.inferer(torch.flip(inputs, dims), network, *args, **kwargs)
            single = torch.flip(class_probabilities(logits), dims)
            total = single if total is None else total.add_(single)
        assert total is not None  # the empty subset is always there
        return total / len(subsets)
