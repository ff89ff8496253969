"""The terms a segmentation loss is made of, as functions of :class:`~pipelines.losses.voxels.Voxels`.

Every term stays in log-probabilities until the very end and holds no clamp on a prediction, so no gradient is cut and
no logarithm of zero can occur. A term over no kept voxel is 0 with zero gradient.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from pipelines.losses.processes import summed_over_processes
from pipelines.losses.voxels import Voxels
from transforms.errors import BundleError


def soft_dice_loss(
    voxels: Voxels, *, include_background: bool = False, batch: bool = True, smooth: float = 1e-5
) -> torch.Tensor:
    """Return 1 - soft Dice, averaged over classes: Dice = (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth).

    Milletari et al., V-Net, 3DV 2016, without squares in the denominator (as in MONAI and nnU-Net).

    Args:
        voxels: see :func:`~pipelines.losses.voxels.prepare_voxels`.
        include_background: count class 0 as a class.
        batch: sum over the whole batch (of all processes) before dividing. Otherwise one Dice per sample, averaged
            over the samples that keep at least one voxel; a patch without lesion then has a loss near 1 with next to
            no gradient.
        smooth: added to numerator and denominator, positive; decides that an absent and unpredicted class has loss 0.

    Raises:
        BundleError: smooth is not positive.
    """
    if not smooth > 0:
        raise BundleError(
            f"loss: Dice with smooth {smooth}",
            "expected a positive number: without it, a class neither present nor predicted is 0 / 0",
            "leave it out for 1e-5",
        )
    first = 0 if include_background else 1
    probability = (voxels.log_probabilities.exp() * voxels.kept)[:, first:].flatten(2)
    truth = voxels.truth[:, first:].flatten(2)
    counts = voxels.kept.flatten(1).any(1, keepdim=True).float()
    overlap, size = (probability * truth).sum(2), (probability + truth).sum(2)
    if batch:
        sums = torch.stack([overlap.sum(0), size.sum(0), counts.sum(0).expand_as(overlap[0])])
        overlap, size, counts = summed_over_processes(sums).unsqueeze(1).unbind()
        dice = (2 * overlap + smooth) / (size + smooth)
        return ((1 - dice) * (counts > 0)).sum() / dice.shape[1]
    dice = (2 * overlap + smooth) / (size + smooth)
    total, samples = summed_over_processes(torch.stack([((1 - dice) * counts).sum(), counts.sum()])).unbind()
    return total / (samples.clamp(min=1) * dice.shape[1])


def cross_entropy_loss(voxels: Voxels) -> torch.Tensor:
    """Return the mean of -log p(true class) over the kept voxels."""
    return voxels.mean_over_kept(-_log_true_probability(voxels))


def focal_loss(voxels: Voxels, *, alpha: float | None = None, gamma: float = 2.0) -> torch.Tensor:
    """Return the mean of -alpha_t (1 - p_t)^gamma log p_t over the kept voxels.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5. The mean is over voxels, so that a sigmoid
    and the two-class softmax with the same probabilities have the same loss (MONAI's softmax form is this divided by
    the number of classes, unless ``ignore_index`` is set).

    Args:
        voxels: see :func:`~pipelines.losses.voxels.prepare_voxels`.
        alpha: weight of every foreground class, with 1 - alpha for the background; None for no weights.
        gamma: focusing exponent, 0 or more; 0 is cross entropy.

    Raises:
        BundleError: alpha or gamma is out of range.
    """
    if not (gamma >= 0 and (alpha is None or 0 <= alpha <= 1)):
        raise BundleError(
            f"loss: focal with alpha {alpha}, gamma {gamma}",
            "expected alpha between 0 and 1 (or none), gamma 0 or more",
            "correct alpha or gamma",
        )
    # log(1 - p_t) from the other classes: 1 - exp(log p_t) would be 0 for a confident voxel, where a power below 1
    # has an infinite slope.
    log_others = voxels.log_probabilities.masked_fill(voxels.truth > 0, -torch.inf).logsumexp(1)
    loss = -(gamma * log_others).exp() * _log_true_probability(voxels)
    if alpha is not None:
        background = voxels.truth[:, 0]
        loss = loss * (alpha + (1 - 2 * alpha) * background)
    return voxels.mean_over_kept(loss)


def log_cosh(x: torch.Tensor) -> torch.Tensor:
    """Return log(cosh(x)) as x + softplus(-2x) - log 2, which overflows nowhere."""
    return x + F.softplus(-2 * x) - math.log(2)


def log_cosh_dice_loss(
    voxels: Voxels, *, include_background: bool = False, batch: bool = True, smooth: float = 1e-5
) -> torch.Tensor:
    """Return log(cosh(Dice loss)) (Jadon, A survey of loss functions for semantic segmentation, CIBCB 2020)."""
    return log_cosh(soft_dice_loss(voxels, include_background=include_background, batch=batch, smooth=smooth))


def _log_true_probability(voxels: Voxels) -> torch.Tensor:
    return (voxels.log_probabilities * voxels.truth).sum(1)
