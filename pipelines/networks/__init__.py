"""Networks: a plan from spacing and patch size, and the segmentation networks and denoisers built from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.networks.nets.dynunet import DynUNet
from torch import nn

from pipelines.networks.denoiser import ConditionalDenoiser, conditional_denoiser
from pipelines.networks.dynunet import PlannedDynUNet, dynunet
from pipelines.networks.plan import UNetPlan, plan_unet
from pipelines.networks.slice_stack import SliceStackNetwork
from transforms.errors import BundleError

__all__ = [
    "ConditionalDenoiser",
    "PlannedDynUNet",
    "SliceStackNetwork",
    "UNetPlan",
    "conditional_denoiser",
    "dynunet",
    "input_divisor",
    "plan_unet",
    "segmentation_network",
]


def segmentation_network(
    dimensions: float,
    in_channels: int,
    out_channels: int,
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    filters: Sequence[int] | None = None,
    stack_slices: int = 5,
    deep_supervision_heads: int | None = None,
    residual: bool = False,
    norm: str = "instance",
) -> nn.Module:
    """Build the network of a volume segmentation: volumes (B, C, H, W, D) in, logits (B, K, H, W, D) out in eval mode.

    Args:
        dimensions: 3 for a 3D DynUNet; 2.5 for a 2D DynUNet on stacks of slices along the last axis.
        in_channels: channels of the volume (modalities), not of the stack.
        out_channels: channels of the logits.
        spacing_mm: spacing of the three axes in mm.
        patch_size: size of the three axes in voxels. In 2.5D the plan looks at the first two axes only.
        filters, deep_supervision_heads, residual, norm: see :func:`pipelines.networks.dynunet.dynunet`.
        stack_slices: slices per stack in 2.5D, odd.

    Raises:
        BundleError: ``dimensions`` is neither 3 nor 2.5, the geometry is not that of a volume, or no plan fits.
    """
    if dimensions not in (3, 2.5):
        raise BundleError(
            f"network: dimensions = {dimensions}", "valid: 3 (volumes), 2.5 (stacks of slices)", "use 3 or 2.5"
        )
    if len(spacing_mm) != 3 or len(patch_size) != 3:
        raise BundleError(
            f"network: spacing {list(spacing_mm)} and patch_size {list(patch_size)} are not those of a volume",
            "expected three axes in 3D and in 2.5D",
            "give three spacings in mm and three sizes in voxels",
        )
    if dimensions == 3:
        return dynunet(
            in_channels, out_channels, spacing_mm, patch_size, filters, deep_supervision_heads, residual, norm
        )
    network2d = dynunet(
        in_channels * stack_slices,
        out_channels,
        spacing_mm[:2],
        patch_size[:2],
        filters,
        deep_supervision_heads,
        residual,
        norm,
    )
    return SliceStackNetwork(network2d, stack_slices)


def input_divisor(network: nn.Module, axes: int) -> tuple[int, ...] | None:
    """Return what each spatial axis must be a multiple of, 1 where slices are taken one by one; None = it is not said.

    Args:
        network: MONAI's ``DynUNet``, or any in which a module has the attribute ``divisor``.
        axes: spatial axes of its input.
    """
    for module in network.modules():
        divisor = getattr(module, "divisor", None)
        if isinstance(module, DynUNet):
            per_stage = [[s] * axes if isinstance(s, int) else list(s) for s in module.strides]
            divisor = [math.prod(along) for along in zip(*per_stage, strict=True)]
        if divisor is not None:
            return (*(int(step) for step in divisor), *[1] * (axes - len(divisor)))
    return None
