"""The loss of a fused image: the diffusion's own error, guided by what each region of interest has to keep.

    L = diffusion + roi_weight (alpha brain + beta bone + gamma lesion)

The network sees no mask: masks stand in the label, and only this loss reads them. Each term is also there by name, and
on request the norm of its gradient, because a term that dominates, or that is dead, does not show in its value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_tensor
from scipy import ndimage
from torch import nn

from pipelines.losses.image_similarity import masked_mean, ssim_map
from pipelines.losses.processes import summed_over_processes
from pipelines.losses.terms import soft_dice_loss
from pipelines.losses.voxels import prepare_voxels
from pipelines.names import nearest
from transforms.diffusion import LABEL_CHANNELS
from transforms.errors import BundleError

DISPLAY_RANGE = 1.0
BAND_MM = 10.0

# alpha (brain like MRI), beta (bone like CT), gamma (lesion readable)
FUSION_PRESETS: dict[str, tuple[float, float, float]] = {
    "default": (1.0, 1.0, 2.0),
    "brain_tumor": (1.5, 0.5, 2.0),
    "bone_tumor": (0.5, 2.0, 2.0),
    "metastasis": (1.0, 1.0, 3.0),
    "stroke": (1.0, 1.2, 3.0),
}


class FusionLoss(nn.Module):
    """Weighted error of x0 plus terms of the regions, on x0_hat (B, 1, *spatial) and a label (B, 7, *spatial).

    The label's channels are ``transforms.diffusion.LABEL_CHANNELS``. All means run over the whole batch, of all
    processes; a region that is empty in the whole batch has the value 0 and no gradient.

    - diffusion: mean of weight (x0_hat - x0)^2, on the diffusion scale.
    - brain: mean of 1 - SSIM with the MRI in the brain, in display units, the MRI standing in for the fused image
      around it: else a window across the border would ask for the MRI in the bone. bone: the same with the CT there.
    - lesion: what a segmentation network, trained beforehand and frozen, makes of the fused image: 1 - soft Dice, plus
      ``delta_boundary`` times :func:`boundary_loss`. Only samples with a lesion count.

    Attributes:
        last_terms: unweighted value of each term in the last forward pass, detached, by name; with ``watch_every`` also
            ``gradient/<name>``, the norm of the gradient of the term, times its weight in L, with respect to x0_hat, as
            last measured.

    Args:
        alpha, beta, gamma: weights of brain, bone and lesion, 0 or more; a term with weight 0 is not computed.
        delta_boundary: weight of the boundary within the lesion term, 0 or more.
        roi_weight: common weight of the three. At 0.1, the gradients of brain and bone were of the size of that of the
            diffusion term from the start of a small training to its end (``watch_every`` shows it).
        lesion_head: display image (B, 1, *spatial) to logits (B, K, *spatial): K = 1 (sigmoid), or 2 (softmax, lesion
            last). It is put in eval mode and its weights are frozen; the gradient goes through it to x0_hat.
        spacing_mm: of the samples, for the boundary.
        watch_every: measure gradients in the first and every so many forward passes that learn; 0 = never. Each costs
            one backward pass of the loss, without the network.

    Raises:
        BundleError: a weight is negative or not finite, or gamma and lesion head do not come together.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        gamma: float,
        delta_boundary: float = 0.5,
        roi_weight: float = 0.1,
        lesion_head: nn.Module | None = None,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        watch_every: int = 0,
    ) -> None:
        super().__init__()
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta_boundary": delta_boundary}
        for name, weight in {**weights, "roi_weight": roi_weight}.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise BundleError(f"fusion loss: {name} {weight}", "expected a finite number from 0", f"correct {name}")
        if (gamma > 0) != (lesion_head is not None):
            raise BundleError(
                f"fusion loss: gamma {gamma} {'with' if lesion_head else 'without'} a lesion head",
                "the lesion term is what the head makes of the fused image",
                "give a lesion head, or set gamma to 0" if gamma > 0 else "set gamma above 0, or leave the head out",
            )
        if len(spacing_mm) not in (2, 3) or not all(math.isfinite(mm) and mm > 0 for mm in spacing_mm):
            raise BundleError(f"fusion loss: spacing {list(spacing_mm)} mm", "expected positive lengths", "correct it")
        all_terms = {"brain": roi_weight * alpha, "bone": roi_weight * beta, "lesion": roi_weight * gamma}
        self.weights = {"diffusion": 1.0, **{name: weight for name, weight in all_terms.items() if weight > 0}}
        self.delta_boundary = delta_boundary
        self.spacing_mm = tuple(spacing_mm)
        self.lesion_head = None if lesion_head is None else lesion_head.eval().requires_grad_(False)
        self.watch_every = watch_every
        self.last_terms: dict[str, torch.Tensor] = {}
        self._passes = 0
        self._gradients: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> FusionLoss:
        """Switch the mode; the lesion head stays in eval mode."""
        super().train(mode)
        if self.lesion_head is not None:
            self.lesion_head.eval()
        return self

    def forward(self, x0_hat: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the loss, a float32 scalar.

        Args:
            x0_hat: (B, 1, *spatial), diffusion scale, any floating dtype.
            label: (B, 7, *spatial).

        Raises:
            BundleError: the shapes do not belong together.
            DataError: the lesion mask holds other values than 0 and 1.
        """
        x0_hat, label = convert_to_tensor(x0_hat), convert_to_tensor(label)
        expected = (x0_hat.shape[0], len(LABEL_CHANNELS), *x0_hat.shape[2:])
        if x0_hat.shape[1] != 1 or label.shape != expected:
            raise BundleError(
                f"fusion loss: x0_hat of shape {tuple(x0_hat.shape)} with a label of shape {tuple(label.shape)}",
                f"expected (B, 1, *spatial) and (B, {len(LABEL_CHANNELS)}, *spatial)",
                f"give the label the channels {', '.join(LABEL_CHANNELS)}",
            )
        with torch.autocast(x0_hat.device.type, enabled=False):
            values = self._terms(x0_hat.float(), label.float())
            weighted = {name: self.weights[name] * value for name, value in values.items()}
        self.last_terms = {name: value.detach() for name, value in values.items()}
        if self.watch_every and x0_hat.requires_grad:
            if self._passes % self.watch_every == 0:
                self._gradients = _gradient_norms(weighted, x0_hat)
            self._passes += 1
            self.last_terms |= self._gradients
        return torch.stack(list(weighted.values())).sum()

    def _terms(self, x0_hat: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        channel = dict(zip(LABEL_CHANNELS, label.split(1, dim=1), strict=True))
        display = (x0_hat + 1) / 2
        error = channel["weight"] * (x0_hat - channel["x0"]) ** 2
        values = {"diffusion": masked_mean(error, torch.ones_like(error))}
        for name, reference in (("brain", "mri_display"), ("bone", "ct_display")):
            if name in self.weights:
                inside = torch.where(channel[name] > 0.5, display, channel[reference])
                values[name] = masked_mean(1 - ssim_map(inside, channel[reference], DISPLAY_RANGE), channel[name])
        if "lesion" in self.weights:
            values["lesion"] = self._lesion(display, channel["lesion"])
        return values

    def _lesion(self, display: torch.Tensor, lesion: torch.Tensor) -> torch.Tensor:
        assert self.lesion_head is not None
        logits = self.lesion_head.to(display.device)(display).float()
        present = (lesion != 0).flatten(1).any(1).reshape(-1, *[1] * (lesion.ndim - 1)).expand_as(lesion)
        activation = "sigmoid" if logits.shape[1] == 1 else "softmax"
        voxels = prepare_voxels(logits, lesion, present.float(), activation=activation)
        dice = soft_dice_loss(voxels)
        if not self.delta_boundary:
            return dice
        probability = voxels.log_probabilities[:, -1:].exp()
        return dice + self.delta_boundary * boundary_loss(probability, lesion, self.spacing_mm)


def boundary_loss(probability: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float]) -> torch.Tensor:
    """Return the mean of min(d, 10 mm) / 10 mm |p - y| over the lesions and 10 mm around them: 0 (perfect) to 1.

    d is the distance of a voxel to the boundary of ``truth``. Kervadec et al. (Boundary loss for highly unbalanced
    segmentation, MIDL 2019, eq. 5) integrate the signed distance phi times p; subtracting the value of the perfect
    prediction, a constant, turns this into the integral of |phi| |p - y|, which is what stands here: the same gradient,
    but never negative. It is cut at 10 mm, so that a far false alarm (which Dice sees) cannot outweigh a boundary.

    Args:
        probability: (B, 1, *spatial), with gradient.
        truth: (B, 1, *spatial), 0 or 1.
        spacing_mm: voxel size per axis.
    """
    distance = torch.from_numpy(_boundary_distance(truth, spacing_mm)).to(probability.device)
    share = distance.clamp(max=BAND_MM) / BAND_MM
    near = (truth > 0.5) | (distance <= BAND_MM)
    return masked_mean(share * (probability - truth).abs(), near)


def _boundary_distance(truth: torch.Tensor, spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the distance of each voxel (B, 1, *spatial) to the boundary of its sample's mask in mm; inf without one.

    The boundary runs between the voxels: it is the distance to the nearest voxel of the other kind less half of the
    finest spacing, which is exact along that axis.
    """
    masks = truth.detach().cpu().numpy() > 0.5
    distance = np.full(masks.shape, np.inf, np.float32)
    for index, mask in enumerate(masks[:, 0]):
        if mask.any():
            inside = ndimage.distance_transform_edt(mask, spacing_mm) if not mask.all() else np.inf
            outside = ndimage.distance_transform_edt(~mask, spacing_mm)
            distance[index, 0] = np.where(mask, inside, outside) - min(spacing_mm) / 2
    return distance


def _gradient_norms(weighted: dict[str, torch.Tensor], x0_hat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the norm of each term's gradient over the whole batch, of all processes."""
    squares = []
    for value in weighted.values():
        (gradient,) = torch.autograd.grad(value, x0_hat, retain_graph=True)
        squares.append(gradient.float().square().sum())
    # Each process differentiates the sum of what all of them call the loss.
    own = torch.stack(squares)
    total, processes = summed_over_processes(torch.stack([own, torch.ones_like(own)])).unbind()
    return {f"gradient/{name}": norm for name, norm in zip(weighted, total.sqrt() / processes, strict=True)}


def fusion_loss(name: str, lesion_head: nn.Module | None = None, **options: Any) -> FusionLoss:
    """Build the fusion loss with the weights of the preset ``name``, one of ``FUSION_PRESETS``.

    Args:
        name: of the preset.
        lesion_head: see :class:`FusionLoss`; without one, there is no lesion term (gamma is 0).
        options: further arguments of :class:`FusionLoss`; alpha, beta and gamma override the preset's.

    Raises:
        BundleError: no such preset or option, or what :class:`FusionLoss` raises.
    """
    if name not in FUSION_PRESETS:
        raise BundleError(
            f"there is no fusion loss called {name!r}",
            f"valid: {', '.join(FUSION_PRESETS)}",
            nearest(name, FUSION_PRESETS),
        )
    valid = list(inspect.signature(FusionLoss).parameters)
    for option in options:
        if option not in valid:
            raise BundleError(
                f"there is no option of the fusion loss called {option!r}",
                f"valid: {', '.join(valid)}",
                nearest(option, valid),
            )
    alpha, beta, gamma = FUSION_PRESETS[name]
    weights = {"alpha": alpha, "beta": beta, "gamma": gamma if lesion_head is not None else 0.0}
    return FusionLoss(lesion_head=lesion_head, **(weights | options))
