"""Planted failures of losses: dead, deafening, not finite, weighted by nobody."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from planted import Proof
from proof_network import SPACING, found, fusion, lesion
from torch import nn

from pipelines.losses import (
    CompositeLoss,
    DeepSupervisionLoss,
    FusionLoss,
    Voxels,
    cross_entropy_loss,
    fusion_loss,
    soft_dice_loss,
)
from pipelines.losses.composite import Term
from pipelines.networks import segmentation_network
from pipelines.preflight import Finding, Inspection
from pipelines.preflight.loss import RULES


def with_terms(**terms: tuple[float, Term]) -> Inspection:
    """Return the lesion bundle's run with a loss of other terms."""
    return replace(lesion(), loss=lambda name: DeepSupervisionLoss(CompositeLoss(terms)))


def dead_dice(voxels: Voxels) -> torch.Tensor:
    with torch.no_grad():
        return soft_dice_loss(voxels)


class ClampedBCE(nn.Module):
    """Cross entropy of a probability, clamped to 1 - 1e-6: in half precision that is 1, and log(1 - 1) is infinite."""

    def forward(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = outputs[:, 0] if outputs.ndim == target.ndim + 1 else outputs
        p = logits.softmax(1)[:, 1:].clamp(1e-6, 1 - 1e-6)
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


class DividesByImage(nn.Module):
    """A denoiser that predicts the noise, and divides what is left by a(t): 0 at t = 1."""

    def __init__(self, condition_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(condition_channels + 2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = x[:, -1:] * torch.pi / 2
        alpha = torch.sin(torch.pi / 2 - angle)
        return (x[:, -2:-1] - torch.sin(angle) * self.convolution(x)) / alpha


class DividesByWeight(FusionLoss):
    """A fusion loss that takes the mean over a region by dividing by its size."""

    def forward(self, x0_hat: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        error = (x0_hat - label[:, :1]).square()
        return sum((error * label[:, c : c + 1]).sum() / label[:, c : c + 1].sum() for c in (3, 4))


@cache
def lesion_head(patch_size: tuple[int, ...] = (48, 56, 1), filters: tuple[int, ...] = (8, 16, 24)) -> nn.Module:
    """A network that reads lesions from fused images, of slices of this size."""
    torch.manual_seed(0)
    return segmentation_network(2.5, 1, 2, SPACING, list(patch_size), list(filters), stack_slices=1).eval()


def with_lesion_head(head: nn.Module) -> Inspection:
    """Return the fusion bundle's run with the lesion term of a preset."""
    return replace(fusion(), loss=lambda name: fusion_loss("stroke", head, roi_weight=0.1, spacing_mm=SPACING))


def many_fold(inspection: Inspection) -> list[Finding]:
    return [finding for finding in found(RULES, "R18", inspection) if finding.severity == "warn"]


PROOFS = [
    Proof(
        rule="R18",
        check="every term of the loss has a gradient",
        origin="lesion terms computed without gradient; SSIM clamped to 0..1",
        planted=lambda: found(RULES, "R18", with_terms(ce=(1.0, cross_entropy_loss), dice=(1.0, dead_dice))),
        healthy=lambda: found(RULES, "R18", lesion()) + found(RULES, "R18", fusion()),
    ),
    Proof(
        rule="R18",
        check="no term has a hundred times the gradient of another",
        origin="terms of different scale were added",
        planted=lambda: many_fold(with_terms(ce=(1.0, cross_entropy_loss), dice=(1e-3, soft_dice_loss))),
        healthy=lambda: found(RULES, "R18", lesion()),
        severity="warn",
    ),
    Proof(
        rule="R19",
        check="value and gradient are finite at the edges, in the run's arithmetic",
        origin="1 - 1e-6 is 1 in half precision",
        planted=lambda: found(RULES, "R19", replace(lesion(), loss=lambda name: ClampedBCE(), precision="bf16")),
        healthy=lambda: found(RULES, "R19", replace(lesion(), precision="bf16")) + found(RULES, "R19", lesion()),
    ),
    Proof(
        rule="R19",
        check="the same of a diffusion at its first and last time",
        origin="x0 divided by the root of alpha bar",
        planted=lambda: found(RULES, "R19", replace(fusion(), network=DividesByImage(5))),
        healthy=lambda: found(RULES, "R19", fusion()) + found(RULES, "R19", replace(fusion(), precision="bf16")),
    ),
    Proof(
        rule="R19",
        check="the same with a lesion head, on whole patches",
        origin="a lesion head that the patches of the run do not fit",
        planted=lambda: found(RULES, "R19", with_lesion_head(lesion_head((64, 64, 1), (4, 8, 8, 8, 8)))),
        healthy=lambda: found(RULES, "R19", with_lesion_head(lesion_head())),
    ),
    Proof(
        rule="R27",
        check="weights of classes that were asked for are there",
        origin="class weights accepted by a configuration and read by nobody",
        planted=lambda: found(
            RULES, "R27", replace(lesion(), config={**lesion().config, "class_weighting": "inverse frequency"})
        ),
        healthy=lambda: found(RULES, "R27", lesion()) + found(RULES, "R27", fusion()),
    ),
    Proof(
        rule="R27",
        check="one mechanism balances the classes",
        origin="focal alpha and class weights at once",
        planted=lambda: found(
            RULES,
            "R27",
            with_terms(
                focal=(1.0, partial(weighted, alpha=0.25)), ce=(1.0, partial(weighted, class_weights=(1.0, 5.0)))
            ),
        ),
        healthy=lambda: found(RULES, "R27", with_terms(focal=(1.0, partial(weighted, alpha=0.25)))),
        severity="warn",
    ),
]


def weighted(voxels: Voxels, **options: object) -> torch.Tensor:
    return cross_entropy_loss(voxels)
