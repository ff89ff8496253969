"""A weighted sum of named terms that remembers the value of each, and the ready-made sums chosen by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from pipelines.losses.terms import cross_entropy_loss, focal_loss, log_cosh_dice_loss, soft_dice_loss
from pipelines.losses.voxels import Voxels, prepare_voxels
from pipelines.names import nearest
from transforms.errors import BundleError

Term = Callable[[Voxels], torch.Tensor]


class CompositeLoss(nn.Module):
    """The sum of weighted terms on logits (B, C, *spatial) and class ids (B, 1, *spatial).

    Attributes:
        last_terms: unweighted value of each term in the last forward pass, detached, by name; for logging.

    Args:
        terms: name -> (weight, term); every weight is positive.
        activation: "softmax" (two channels or more) or "sigmoid" (one channel).
        ignore_index: class id of voxels that do not count.

    Raises:
        BundleError: no term, or a weight that is not positive and finite.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[float, Term]],
        *,
        activation: str = "softmax",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not terms:
            raise BundleError("loss: no terms", "expected at least one", "name a loss")
        for name, (weight, _) in terms.items():
            if not (math.isfinite(weight) and weight > 0):
                raise BundleError(
                    f"loss: term '{name}' has weight {weight}",
                    "expected a positive, finite number",
                    "correct the weight, or choose a loss without this term",
                )
        self.weighted_terms = dict(terms)
        self.activation = activation
        self.ignore_index = ignore_index
        self.last_terms: dict[str, torch.Tensor] = {}

    def terms(
        self, logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the unweighted value of each term, a float32 scalar with gradient, by name.

        Args:
            logits: (B, C, *spatial), any floating dtype.
            target: (B, 1, *spatial) class ids.
            mask: (B, 1, *spatial); voxels that are 0 do not count.

        Raises:
            BundleError: shapes or activation do not belong together.
            DataError: the target holds a value that is no class of the network.
        """
        voxels = prepare_voxels(logits, target, mask, activation=self.activation, ignore_index=self.ignore_index)
        with torch.autocast(logits.device.type, enabled=False):
            return {name: term(voxels) for name, (_, term) in self.weighted_terms.items()}

    def forward(self, logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sum of the terms, a float32 scalar; arguments and errors as in :meth:`terms`."""
        values = self.terms(logits, target, mask)
        self.last_terms = {name: value.detach() for name, value in values.items()}
        return torch.stack([weight * values[name] for name, (weight, _) in self.weighted_terms.items()]).sum()


def dice_ce_loss(
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    include_background: bool = False,
    batch: bool = True,
    smooth: float = 1e-5,
    activation: str = "softmax",
    ignore_index: int | None = None,
) -> CompositeLoss:
    """Soft Dice plus cross entropy, nnU-Net's loss."""
    dice = partial(soft_dice_loss, include_background=include_background, batch=batch, smooth=smooth)
    terms: dict[str, tuple[float, Term]] = {"dice": (dice_weight, dice), "ce": (ce_weight, cross_entropy_loss)}
    return CompositeLoss(terms, activation=activation, ignore_index=ignore_index)


def dice_focal_loss(
    *,
    dice_weight: float = 1.0,
    focal_weight: float = 1.0,
    alpha: float | None = None,
    gamma: float = 2.0,
    include_background: bool = False,
    batch: bool = True,
    smooth: float = 1e-5,
    activation: str = "softmax",
    ignore_index: int | None = None,
) -> CompositeLoss:
    """Soft Dice plus focal loss (AnatomyNet, Zhu et al., Medical Physics 2019)."""
    dice = partial(soft_dice_loss, include_background=include_background, batch=batch, smooth=smooth)
    focal = partial(focal_loss, alpha=alpha, gamma=gamma)
    terms: dict[str, tuple[float, Term]] = {"dice": (dice_weight, dice), "focal": (focal_weight, focal)}
    return CompositeLoss(terms, activation=activation, ignore_index=ignore_index)


def log_cosh_dice_focal_loss(
    *,
    log_cosh_dice_weight: float = 0.7,
    focal_weight: float = 0.3,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    include_background: bool = False,
    batch: bool = True,
    smooth: float = 1e-5,
    activation: str = "softmax",
    ignore_index: int | None = None,
) -> CompositeLoss:
    """0.7 log-cosh Dice plus 0.3 focal loss, for small lesions: a well segmented case pulls less than a missed one."""
    dice = partial(log_cosh_dice_loss, include_background=include_background, batch=batch, smooth=smooth)
    focal = partial(focal_loss, alpha=alpha, gamma=gamma)
    terms: dict[str, tuple[float, Term]] = {
        "log_cosh_dice": (log_cosh_dice_weight, dice),
        "focal": (focal_weight, focal),
    }
    return CompositeLoss(terms, activation=activation, ignore_index=ignore_index)


SEGMENTATION_LOSSES: dict[str, Callable[..., CompositeLoss]] = {
    "dice_ce": dice_ce_loss,
    "dice_focal": dice_focal_loss,
    "log_cosh_dice_focal": log_cosh_dice_focal_loss,
}


def segmentation_loss(name: str, **options: Any) -> CompositeLoss:
    """Build the loss called ``name``, one of ``SEGMENTATION_LOSSES``, with that function's keyword arguments.

    Raises:
        BundleError: no loss has this name, or the loss does not take one of the options.
    """
    if name not in SEGMENTATION_LOSSES:
        raise _unknown("loss", name, list(SEGMENTATION_LOSSES))
    build = SEGMENTATION_LOSSES[name]
    valid = list(inspect.signature(build).parameters)
    for option in options:
        if option not in valid:
            raise _unknown(f"option of the loss {name}", option, valid)
    return build(**options)


def _unknown(kind: str, name: str, valid: list[str]) -> BundleError:
    return BundleError(f"there is no {kind} called '{name}'", f"valid: {', '.join(valid)}", nearest(name, valid))
