"""2.5D: a 2D network that sees a few neighbouring slices and is used like a 3D network.

Volumes go in and volumes come out, so loss, inferer and post-processing do not know the difference. A neighbour beyond
the first or last slice is that slice again: after z-scoring, zeros would be a slab of average tissue.
"""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type
from torch import nn

from transforms.errors import BundleError


class SliceStackNetwork(nn.Module):
    """Run a 2D network on every slice of a volume together with its neighbours along the last axis.

    The 2D network gets ``C * slices`` channels, one modality after the other: channel ``c * slices + s`` is modality
    ``c`` of the slice at offset ``s - slices // 2``. A sliding window ends like a volume does: let windows overlap
    along the last axis, or cover it.

    Args:
        network2d: maps (N, C * slices, H, W) to (N, K, H, W) in eval mode, (N, heads, K, H, W) in train mode.
        slices: slices per stack, odd.
        images_per_pass: most stacks in one pass of the 2D network (at least one slice of each volume of the batch);
            bounds the memory of inference and, where the network has no batch statistics, changes nothing else.

    Raises:
        BundleError: ``slices`` is even or not positive, or ``images_per_pass`` is not positive.
    """

    def __init__(self, network2d: nn.Module, slices: int = 5, images_per_pass: int = 64) -> None:
        super().__init__()
        if slices < 1 or slices % 2 == 0:
            raise BundleError(
                f"2.5D network: a stack of {slices} slices has no middle slice",
                "expected an odd number, 1 or more",
                f"use {max(1, slices - 1)} or {max(1, slices + 1)}",
            )
        if images_per_pass < 1:
            raise BundleError(
                f"2.5D network: images_per_pass = {images_per_pass}", "expected 1 or more", "leave it out for 64"
            )
        self.network2d = network2d
        self.slices = slices
        self.images_per_pass = images_per_pass

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W, D) to logits (B, K, H, W, D), in train mode (B, heads, K, H, W, D).

        Raises:
            BundleError: the input is not a batch of volumes.
        """
        if volume.ndim != 5:
            raise BundleError(
                f"2.5D network: input of shape {tuple(volume.shape)}",
                "expected five axes: batch, channel, height, width, slice",
                "feed volumes, not single slices",
            )
        plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
        depth = plain.shape[-1]
        step = max(1, self.images_per_pass // plain.shape[0])
        logits = torch.cat(
            [self.segment(plain, start, min(start + step, depth)) for start in range(0, depth, step)], -1
        )
        return convert_to_dst_type(logits, volume, dtype=logits.dtype)[0] if isinstance(volume, MetaTensor) else logits

    def segment(self, volume: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits (B, K, H, W, slices) of some slices of a plain tensor (B, C, H, W, D), in one pass."""
        batch, channels, height, width, depth = volume.shape
        middle = torch.arange(start, stop, device=volume.device)
        offset = torch.arange(self.slices, device=volume.device) - self.slices // 2
        neighbours = (middle[:, None] + offset).clamp(0, depth - 1)
        stacks = volume[..., neighbours].permute(0, 4, 1, 5, 2, 3)  # (B, slice, C, offset, H, W)
        logits = self.network2d(stacks.reshape(-1, channels * self.slices, height, width))
        return logits.unflatten(0, (batch, stop - start)).movedim(1, -1)
