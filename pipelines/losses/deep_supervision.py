"""One loss for a network with auxiliary heads, however the heads arrive, and for the same network in eval mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from monai.utils import convert_to_tensor
from torch import nn
from torch.nn import functional as F

from pipelines.losses.composite import CompositeLoss, segmentation_loss
from transforms.errors import BundleError


class DeepSupervisionLoss(nn.Module):
    """Weighted mean of a loss over the heads of a network, the main head first and the coarsest last.

    Accepts one tensor (B, C, *spatial), the stacked heads (B, heads, C, *spatial) of a DynUNet in train mode, or a
    list of tensors of falling resolution; to the latter, target and mask are brought by nearest neighbour.

    Attributes:
        last_terms: detached values of the last forward pass, for logging: each term of ``loss`` under its own name as
            the weighted mean over the heads, and as ``main_head/<name>`` for the main head alone.

    Args:
        loss: the loss of one head.
        weights: one weight per head, positive and non-increasing; they are normalised to sum 1. Default: each half of
            the one before.

    Raises:
        BundleError: the weights are empty, not positive, not finite, or grow towards the coarse heads.
    """

    def __init__(self, loss: CompositeLoss, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if weights is not None:
            _check_weights(weights)
        self.loss = loss
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.last_terms: dict[str, torch.Tensor] = {}

    def forward(
        self,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weighted mean over the heads, a float32 scalar.

        Args:
            outputs: logits of one head, stacked heads, or a list of heads.
            target: (B, 1, *spatial) class ids.
            mask: (B, 1, *spatial); voxels that are 0 do not count.

        Raises:
            BundleError: the number of heads is not the number of weights (a single output takes the whole weight), or
                what ``loss`` raises.
            DataError: what ``loss`` raises.
        """
        heads = self._unpack(outputs, target)
        weights = self.head_weights(len(heads))
        total = torch.zeros((), device=heads[0].device)
        mean: dict[str, torch.Tensor] = {}
        main: dict[str, torch.Tensor] = {}
        for index, (weight, head) in enumerate(zip(weights, heads, strict=True)):
            shape = head.shape[2:]
            total = total + weight * self.loss(
                head, _resize(target, shape), None if mask is None else _resize(mask, shape)
            )
            for name, value in self.loss.last_terms.items():
                mean[name] = mean.get(name, 0) + weight * value
                if index == 0:
                    main[f"main_head/{name}"] = value
        self.last_terms = mean | main
        return total

    def head_weights(self, heads: int) -> list[float]:
        """Return the normalised weights for this number of heads, main head first.

        Raises:
            BundleError: there are several heads, and another number of weights.
        """
        if heads == 1:
            return [1.0]
        weights = self.weights or [0.5**level for level in range(heads)]
        if len(weights) != heads:
            raise BundleError(
                f"deep supervision: {len(weights)} weights for {heads} heads",
                f"weights {weights}; the network returns its main head and {heads - 1} auxiliary ones",
                f"give {heads} weights, or leave them out (each half of the one before)",
            )
        return [weight / sum(weights) for weight in weights]

    @staticmethod
    def _unpack(outputs: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> list[torch.Tensor]:
        if not isinstance(outputs, torch.Tensor):
            if len(outputs) == 0:
                raise BundleError("deep supervision: no heads", "expected one output or more", "check the network")
            return list(outputs)
        logits: torch.Tensor = convert_to_tensor(outputs)
        return list(logits.unbind(1)) if logits.ndim == target.ndim + 1 else [logits]


def supervised_loss(name: str) -> DeepSupervisionLoss:
    """Return the segmentation loss called ``name`` over every head of a network."""
    return DeepSupervisionLoss(segmentation_loss(name))


def _resize(labels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if labels.shape[2:] == torch.Size(shape):
        return labels
    return F.interpolate(convert_to_tensor(labels).float(), list(shape), mode="nearest-exact")


def _check_weights(weights: Sequence[float]) -> None:
    positive = len(weights) > 0 and all(math.isfinite(weight) and weight > 0 for weight in weights)
    if not positive or any(later > earlier for earlier, later in itertools.pairwise(weights)):
        raise BundleError(
            f"deep supervision: weights {list(weights)}",
            "expected positive numbers that never grow: the first belongs to the main head, the last to the coarsest",
            f"for example {sorted((abs(weight) for weight in weights if weight), reverse=True) or [1.0, 0.5, 0.25]}",
        )
