"""A U-Net that takes noise out of an image under a condition that it sees voxel by voxel.

The condition, x_t and the time t arrive as channels of one image, so that windows, crops and batches cut all of them
alike; nothing of the condition is pooled to a vector. What the network predicts (x0 or v) is turned into x0 here, so
that losses and samplers know x0 only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import nn

from pipelines.networks.plan import MINIMUM_STAGES, UNetPlan, plan_unet
from pipelines.networks.slice_stack import SliceStackNetwork
from transforms.diffusion import NoiseSchedule
from transforms.errors import BundleError

TIME_SCALE = 1000  # the embedding's frequencies are made for time steps from 0 to 1000
MOST_GROUPS = 8
GUESS_SCALE = 2.0  # of the condition (-2 .. 2) against the diffusion (-1 .. 1)


class TimedUNet(nn.Module):
    """MONAI's diffusion U-Net, pooling as planned, with its time taken from the last channels of its input.

    Maps (B, channels + time_channels, *spatial) to (B, 1, *spatial).

    Args:
        plan: strides per stage.
        in_channels: without those of the time.
        time_channels: how often the time is repeated at the end of the input.
        channels: per stage.
        attention: per stage; the last one also holds for the block in the middle.
        residual_blocks: per stage.
    """

    def __init__(
        self,
        plan: UNetPlan,
        in_channels: int,
        time_channels: int,
        channels: Sequence[int],
        attention: Sequence[bool],
        residual_blocks: int,
    ) -> None:
        super().__init__()
        self.divisor = plan.divisor
        self.time_channels = time_channels
        self.unet = DiffusionModelUNet(
            spatial_dims=len(plan.divisor),
            in_channels=in_channels,
            out_channels=1,
            num_res_blocks=residual_blocks,
            channels=channels,
            attention_levels=attention,
            norm_num_groups=math.gcd(MOST_GROUPS, *channels),
            num_head_channels=[_head_channels(c) for c in channels],
            use_flash_attention=True,
        )
        _set_strides(self.unet, plan)
        if not attention[-1]:
            self.unet.middle_block.attention = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the U-Net.

        Raises:
            BundleError: a size cannot be halved as often as the network pools.
        """
        for axis, (size, divisor) in enumerate(zip(x.shape[2:], self.divisor, strict=True)):
            if size % divisor:
                below = size - size % divisor
                valid = " or ".join(str(each) for each in (below, below + divisor) if each)
                raise BundleError(
                    f"denoiser: axis {axis} of an input of shape {tuple(x.shape)} has {size} voxels",
                    f"the network pools it by {divisor}",
                    f"cut or pad the axis to {valid}",
                )
        image, time = x[:, : -self.time_channels], time_of(x[:, -self.time_channels :])
        return self.unet(image, time * TIME_SCALE)


class ConditionalDenoiser(nn.Module):
    """Condition, x_t and t in, the clean image out.

    The last channel of the condition is a first guess of the clean image at twice the diffusion scale. A network that
    predicts x0 predicts what the guess lacks: untrained, it returns the guess.

    Args:
        backbone: maps (B, C + 2, *spatial) to (B, 1, *spatial), what ``prediction`` names.
        schedule, prediction: see :class:`transforms.diffusion.NoiseSchedule`.

    Raises:
        BundleError: the schedule or prediction does not exist, or they do not belong together.
    """

    def __init__(self, backbone: nn.Module, schedule: str, prediction: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = NoiseSchedule(schedule)
        self.schedule.require_prediction(prediction)
        self.prediction = prediction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x0_hat (B, 1, *spatial), float32 on the diffusion scale.

        Args:
            x: (B, C + 2, *spatial): the condition (first guess last), x_t, and t in [0, 1], constant per sample.

        Raises:
            BundleError: sizes that the network cannot pool.
        """
        plain = x.as_tensor() if isinstance(x, MetaTensor) else x
        output = self.backbone(plain).float()
        if self.prediction == "x0":
            output = output + plain[:, -3:-2].float() / GUESS_SCALE
        time = time_of(plain[:, -1:]).reshape(-1, *[1] * (plain.ndim - 1)).float()
        return self.schedule.clean_from(output, plain[:, -2:-1].float(), time, self.prediction)


def conditional_denoiser(
    dimensions: float,
    condition_channels: int,
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    channels: Sequence[int] = (32, 64, 128),
    attention: Sequence[bool] | None = None,
    prediction: str = "x0",
    schedule: str = "cosine",
    stack_slices: int = 3,
    residual_blocks: int = 1,
) -> ConditionalDenoiser:
    """Build the denoiser of volumes: (B, C + 2, X, Y, Z) in, x0_hat (B, 1, X, Y, Z) out, at the same resolution.

    An axis is pooled only while its spacing is like that of the finest, and never below 4 voxels (``plan_unet``): 26
    thick slices are halved once, late. In 2D and 2.5D slices are not pooled at all.

    Args:
        dimensions: 3; 2.5, a 2D network on stacks of slices along the last axis; or 2, on single slices.
        condition_channels: C, with the first guess.
        spacing_mm: spacing of the three axes in mm.
        patch_size: size of the three axes in voxels. In 2D and 2.5D the plan looks at the first two axes only.
        channels: per stage, from full resolution to the bottleneck; three stages or more.
        attention: self-attention per stage; None = nowhere, which is a network of convolutions only. It compares every
            voxel of a stage with every other: leave it to the coarse stages.
        prediction: what the network's last layer stands for, ``x0`` or ``v``. That layer starts at zero.
        schedule: of the noise.
        stack_slices: slices per stack in 2.5D, odd.
        residual_blocks: per stage.

    Raises:
        BundleError: the geometry is not that of a volume, no plan fits (the message names sizes that do), or an option
            is not valid.
    """
    if dimensions not in (3, 2.5, 2):
        raise BundleError(f"denoiser: dimensions = {dimensions}", "valid: 3, 2.5, 2", "use one of them")
    if len(spacing_mm) != 3 or len(patch_size) != 3:
        raise BundleError(
            f"denoiser: spacing {list(spacing_mm)} and patch_size {list(patch_size)} are not those of a volume",
            "expected three axes, whatever the network's dimensions",
            "give three spacings in mm and three sizes in voxels",
        )
    flags = [False] * len(channels) if attention is None else list(attention)
    _check_stages(channels, flags, residual_blocks)
    slices = stack_slices if dimensions == 2.5 else 1
    axes = 3 if dimensions == 3 else 2
    plan = _plan(spacing_mm[:axes], patch_size[:axes], channels)
    unet = TimedUNet(plan, (condition_channels + 1) * slices, slices, channels, flags, residual_blocks)
    backbone = unet if dimensions == 3 else SliceStackNetwork(unet, slices)
    return ConditionalDenoiser(backbone, schedule, prediction)


def time_of(channels: torch.Tensor) -> torch.Tensor:
    """Return the time (B,) of channels (B, n, *spatial) that hold nothing else.

    It is the largest value: a sliding window pads an image that is smaller than the window with zeros, the channel of
    the time included.
    """
    return channels.flatten(1).amax(1)


def _plan(spacing_mm: Sequence[float], patch_size: Sequence[int], channels: Sequence[int]) -> UNetPlan:
    plan = plan_unet(spacing_mm, patch_size, maximum_stages=len(channels))
    if plan.stages < len(channels):
        raise BundleError(
            f"denoiser: {len(channels)} channels were given, but the patch allows {plan.stages} stages",
            f"channels {list(channels)}, patch_size {list(patch_size)}, spacing {list(spacing_mm)} mm",
            f"give {plan.stages} channels, or a larger patch",
        )
    return plan


def _check_stages(channels: Sequence[int], attention: Sequence[bool], residual_blocks: int) -> None:
    if len(channels) < MINIMUM_STAGES or min(channels) < 1 or len(attention) != len(channels) or residual_blocks < 1:
        raise BundleError(
            f"denoiser: channels {list(channels)}, attention {list(attention)}, residual_blocks {residual_blocks}",
            f"expected {MINIMUM_STAGES} positive channels or more, as many attention flags, and one block or more",
            "for example channels: [32, 64, 128], attention: [false, false, true]",
        )


def _head_channels(channels: int) -> int:
    """Return the channels of an attention head: 32, or the largest divisor of it that divides ``channels``."""
    return math.gcd(32, channels)


def _set_strides(unet: DiffusionModelUNet, plan: UNetPlan) -> None:
    """Pool and unpool by the plan's strides: MONAI's network halves every axis at every stage."""
    for block, stride in zip(unet.down_blocks[:-1], plan.strides[1:], strict=True):
        block.downsampler.op.conv.stride = stride
    for block, stride in zip(unet.up_blocks[:-1], reversed(plan.strides[1:]), strict=True):
        block.upsampler.upsample_non_trainable.scale_factor = tuple(float(step) for step in stride)
