"""Losses: of logits, weighted sums of masked terms by name, with deep supervision; and of fused images."""

from __future__ import annotations

from pipelines.losses.composite import (
    SEGMENTATION_LOSSES,
    CompositeLoss,
    dice_ce_loss,
    dice_focal_loss,
    log_cosh_dice_focal_loss,
    segmentation_loss,
)
from pipelines.losses.deep_supervision import DeepSupervisionLoss, supervised_loss
from pipelines.losses.fusion import FUSION_PRESETS, FusionLoss, boundary_loss, fusion_loss
from pipelines.losses.image_similarity import masked_mean, ssim_map
from pipelines.losses.terms import cross_entropy_loss, focal_loss, log_cosh, log_cosh_dice_loss, soft_dice_loss
from pipelines.losses.voxels import Voxels, prepare_voxels

__all__ = [
    "FUSION_PRESETS",
    "SEGMENTATION_LOSSES",
    "CompositeLoss",
    "DeepSupervisionLoss",
    "FusionLoss",
    "Voxels",
    "boundary_loss",
    "cross_entropy_loss",
    "dice_ce_loss",
    "dice_focal_loss",
    "focal_loss",
    "fusion_loss",
    "log_cosh",
    "log_cosh_dice_focal_loss",
    "log_cosh_dice_loss",
    "masked_mean",
    "prepare_voxels",
    "segmentation_loss",
    "soft_dice_loss",
    "ssim_map",
    "supervised_loss",
]
