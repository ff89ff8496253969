"""What every voxel-wise loss starts from: log-probabilities, truth, and which voxels count.

A voxel that does not count (``ignore_index`` or outside the mask) is removed before anything is computed: its logits
are replaced by a constant, so neither their value (not even NaN) nor their gradient reaches the loss, and every sum
and count runs over the kept voxels only. Everything is single precision, whatever autocast says: in half precision 1
- 1e-6 is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from monai.utils import convert_to_tensor
from torch.nn import functional as F

from pipelines.losses.processes import summed_over_processes
from transforms.errors import BundleError, DataError

ACTIVATIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Voxels:
    """The common ground of the loss terms; a sigmoid output stands here as the two classes it describes.

    Attributes:
        log_probabilities: (B, C, *spatial) float32, C >= 2.
        truth: (B, C, *spatial) float32, one-hot; all zero where the voxel is not kept.
        kept: (B, 1, *spatial) float32, 1 where the voxel counts, else 0.
    """

    log_probabilities: torch.Tensor
    truth: torch.Tensor
    kept: torch.Tensor

    def mean_over_kept(self, values: torch.Tensor) -> torch.Tensor:
        """Average ``values`` (B, *spatial) over the kept voxels of all processes; 0, with zero gradient, if none."""
        kept = self.kept[:, 0]
        total, count = summed_over_processes(torch.stack([(values * kept).sum(), kept.sum()])).unbind()
        return total / count.clamp(min=1)


def prepare_voxels(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    activation: str = "softmax",
    ignore_index: int | None = None,
) -> Voxels:
    """Turn logits and class ids into :class:`Voxels`.

    Args:
        logits: (B, C, *spatial), any floating dtype; C >= 2 for softmax, C = 1 for sigmoid.
        target: (B, 1, *spatial) class ids (integers, or floats with whole values).
        mask: (B, 1, *spatial), voxels that are 0 are removed.
        activation: "softmax" or "sigmoid".
        ignore_index: class id of voxels to remove.

    Raises:
        BundleError: shapes and activation do not belong together.
        DataError: a kept voxel of the target is not a class id of this network.
    """
    logits, target = convert_to_tensor(logits), convert_to_tensor(target)
    # A uint8 label map compared with an ignore_index of -100 would wrap around.
    target = target if target.is_floating_point() else target.int()
    mask = None if mask is None else convert_to_tensor(mask)
    _check_shapes(logits, target, mask, activation)
    kept = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        kept &= target != ignore_index
    if mask is not None:
        kept &= mask > 0
    classes = max(2, logits.shape[1])
    _check_class_ids(target, kept, classes)
    with torch.autocast(logits.device.type, enabled=False):
        logits = torch.where(kept, logits.float(), 0.0)
        if activation == "sigmoid":
            log_probabilities = torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
        else:
            log_probabilities = logits.log_softmax(1)
    ids = torch.arange(classes, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    return Voxels(log_probabilities, ((target == ids) & kept).float(), kept.float())


def _check_shapes(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise BundleError(
            f"loss: activation '{activation}' does not exist", f"valid: {', '.join(ACTIVATIONS)}", "choose one of them"
        )
    if (logits.shape[1] == 1) != (activation == "sigmoid"):
        raise BundleError(
            f"loss: {activation} on {logits.shape[1]} channel(s)",
            "softmax needs one channel per class, two or more; sigmoid needs exactly one",
            "set activation, or out_channels of the network, to match",
        )
    expected = (logits.shape[0], 1, *logits.shape[2:])
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor is not None and tensor.shape != expected:
            raise BundleError(
                f"loss: {name} of shape {tuple(tensor.shape)} for logits of shape {tuple(logits.shape)}",
                f"expected {expected}",
                "give one class id per voxel, with a channel axis of size 1",
            )


def _check_class_ids(target: torch.Tensor, kept: torch.Tensor, classes: int) -> None:
    # Written so that NaN, for which every comparison is false, is refused as well.
    wrong = kept & ~((target >= 0) & (target < classes) & (target == target.floor()))
    if wrong.any():
        found = target[wrong].unique()[:5].tolist()
        raise DataError(
            f"loss: the target holds {found} in {int(wrong.sum())} voxel(s)",
            f"the network has the classes 0 to {classes - 1}",
            "set ignore_index, mask these voxels, or correct the label table",
        )
