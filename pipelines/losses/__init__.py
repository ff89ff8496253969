"""Losses on logits: masked terms, weighted sums of them by name, and deep supervision."""

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
from pipelines.losses.terms import cross_entropy_loss, focal_loss, log_cosh, log_cosh_dice_loss, soft_dice_loss
from pipelines.losses.voxels import Voxels, prepare_voxels

__all__ = [
    "SEGMENTATION_LOSSES",
    "CompositeLoss",
    "DeepSupervisionLoss",
    "Voxels",
    "cross_entropy_loss",
    "dice_ce_loss",
    "dice_focal_loss",
    "focal_loss",
    "log_cosh",
    "log_cosh_dice_focal_loss",
    "log_cosh_dice_loss",
    "prepare_voxels",
    "segmentation_loss",
    "soft_dice_loss",
    "supervised_loss",
]
