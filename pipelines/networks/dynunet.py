"""MONAI's DynUNet built from a plan, with its traps closed.

Deep supervision is always on, so that training, inference and export share one ``network_def`` and one set of weights:
in train mode the network returns (B, outputs, C, *spatial), in eval mode (B, C, *spatial).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.dynunet import DynUNet, DynUNetSkipLayer

from pipelines.names import nearest
from pipelines.networks.plan import MINIMUM_STAGES, UNetPlan, plan_unet
from transforms.errors import BundleError

_NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "instance": ("INSTANCE", {"affine": True}),
    "batch": ("BATCH", {"momentum": 0.03}),  # batches of few patches: the statistics need many of them
}
_LEAKY_RELU = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})


class PlannedDynUNet(DynUNet):
    """A ``DynUNet`` that can be copied at any time and that computes its auxiliary heads only in train mode.

    MONAI keeps the heads of the last forward pass in a list: non-leaf tensors that make ``copy.deepcopy`` (and with
    it an exponential moving average) fail after a training step and hold the graph in memory; and ``torch.export`` in
    eval mode leaves tracing leftovers in it, so that the network cannot be trained any further.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, *spatial) to logits: (B, outputs, K, *spatial) in train mode, (B, K, *spatial) in eval mode.

        Output 0 is the main head; the auxiliary ones follow from fine to coarse, resized to the input.
        """
        out = super().forward(x)
        if self.training:
            # In place: the skip layers share this list.
            self.heads[:] = [torch.empty(0)] * len(self.heads)
        return out

    def train(self, mode: bool = True) -> PlannedDynUNet:
        """Switch between train and eval mode; in eval mode the skip layers have no list to write heads into."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, DynUNetSkipLayer) and module.super_head is not None:
                module.heads = self.heads if mode else None
        return self


def dynunet(
    in_channels: int,
    out_channels: int,
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    filters: Sequence[int] | None = None,
    deep_supervision_heads: int | None = None,
    residual: bool = False,
    norm: str = "instance",
) -> PlannedDynUNet:
    """Build a 2D or 3D DynUNet for a spacing and a patch, as nnU-Net would (leaky ReLU 0.01, affine instance norm).

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        spacing_mm: voxel spacing per axis in mm; its length decides between 2D and 3D.
        patch_size: patch in voxels; every input must be divisible by the plan's divisor.
        filters: filters per stage; their number is the number of stages. Default: the plan's, 32 doubling to 320.
        deep_supervision_heads: auxiliary heads beside the main one, at most stages - 2. Default: 2, or 1 with three
            stages.
        residual: residual convolution blocks.
        norm: "instance" or "batch".

    Raises:
        BundleError: the patch does not suit the spacing or the filters, or an option is not valid.
    """
    if norm not in _NORMS:
        raise BundleError(
            f"network: norm '{norm}' does not exist", f"valid: {', '.join(_NORMS)}", nearest(norm, _NORMS)
        )
    plan = plan_unet(spacing_mm, patch_size) if filters is None else _plan_for_filters(spacing_mm, patch_size, filters)
    return PlannedDynUNet(
        spatial_dims=len(patch_size),
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=plan.kernels,
        strides=plan.strides,
        upsample_kernel_size=plan.strides[1:],
        filters=plan.filters,
        norm_name=_NORMS[norm],
        act_name=_LEAKY_RELU,
        deep_supervision=True,
        deep_supr_num=_count_heads(plan.stages, deep_supervision_heads),
        res_block=residual,
    )


def _plan_for_filters(spacing_mm: Sequence[float], patch_size: Sequence[int], filters: Sequence[int]) -> UNetPlan:
    if len(filters) < MINIMUM_STAGES or min(filters) < 1:
        raise BundleError(
            f"network: filters {list(filters)} do not make a U-Net",
            f"expected at least {MINIMUM_STAGES} positive numbers, one per stage",
            "for example filters: [16, 32, 64, 128]",
        )
    plan = plan_unet(spacing_mm, patch_size, maximum_stages=len(filters))
    if plan.stages < len(filters):
        raise BundleError(
            f"network: {len(filters)} filters were given, but the patch allows {plan.stages} stages",
            f"filters {list(filters)}, patch_size {list(patch_size)}, spacing {list(spacing_mm)} mm",
            f"give {plan.stages} filters, or a larger patch",
        )
    return UNetPlan(plan.kernels, plan.strides, tuple(filters))


def _count_heads(stages: int, asked: int | None) -> int:
    most = stages - 2
    if asked is None:
        return min(2, most)
    if not 1 <= asked <= most:
        raise BundleError(
            f"network: deep_supervision_heads = {asked}",
            f"a network of {stages} stages has 1 to {most} auxiliary heads",
            "choose a number in that range, or leave it out",
        )
    return asked
