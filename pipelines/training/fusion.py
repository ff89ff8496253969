"""What a training of a fusion needs beside the engine: the figure that selects its weights, and pictures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import nn

from pipelines.metrics import image_quality
from pipelines.networks import segmentation_network
from pipelines.reports.overlay import to_grey, upright
from pipelines.training.checkpoints import load_weights, read_contract
from transforms.errors import BundleError, DataError
from transforms.fusion import REFERENCE_CHANNELS

DISPLAY_RANGE = 1.0  # width of the display units: SSIM and PSNR take it from here
LESION_HEAD = "lesion head"  # in the contract of such weights
FIGURES = ("brain_ssim", "bone_ssim", "bone_psnr_db")


class ValidationFusion(Metric):
    """Mean of SSIM against the MRI in the brain and against the CT in the bone, in 3D, over cases.

    ``engine.state.metrics`` also gets ``brain_ssim``, ``bone_ssim`` and ``bone_psnr_db``. Where a case has no brain or
    no bone, the other figures of it count. Every case has to be given to one process only.

    Args:
        output_keys: of every decollated output: the fused image in display units (1 or 2 channels, the first counts)
            and the reference of ``FusionReferenced``.
    """

    def __init__(self, output_keys: tuple[str, str] = ("pred", "label")) -> None:
        self.output_keys = output_keys
        super().__init__(skip_unrolling=True)

    def reset(self) -> None:
        """Forget all cases."""
        self._totals = torch.zeros(2, len(FIGURES), dtype=torch.float64)  # sums, counts

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch: a list of decollated cases."""
        for item in output:
            fused, reference = (np.asarray(torch.as_tensor(item[key]).cpu()) for key in self.output_keys)
            figures = roi_figures(fused[0], reference)
            for column, name in enumerate(FIGURES):
                value = figures[name]
                if value is not None:
                    self._totals[:, column] += torch.tensor([value, 1.0], dtype=torch.float64)

    def compute(self) -> float:
        """Return the mean of brain and bone SSIM.

        Raises:
            DataError: no case has a brain, or none has bone.
        """
        sums, counts = self._reduced()
        if not bool((counts > 0).all()):
            raise DataError(
                "validation: no case contributes to the figures of a fusion",
                f"{dict(zip(FIGURES, counts.tolist(), strict=True))} cases",
                "check the masks of brain and bone of the validation split",
            )
        means = dict(zip(FIGURES, (sums / counts).tolist(), strict=True))
        return (means["brain_ssim"] + means["bone_ssim"]) / 2

    def completed(self, engine: Engine, name: str) -> None:
        """Write the mean under ``name``, and every figure beside it."""
        sums, counts = self._reduced()
        for figure, total, count in zip(FIGURES, sums.tolist(), counts.tolist(), strict=True):
            engine.state.metrics.pop(figure, None)
            if count:
                engine.state.metrics[figure] = total / count
        super().completed(engine, name)

    def _reduced(self) -> torch.Tensor:
        return idist.all_reduce(self._totals.clone())


def load_lesion_head(path: str | Path, device: torch.device | str = "cpu") -> nn.Module | None:
    """Return the trained network that reads lesions from fused images, in eval mode; None for an empty path.

    It maps (B, 1, *spatial) in display units to logits (B, 2, *spatial).

    Raises:
        BundleError: there are no such weights, or they are of another kind of network.
    """
    if not path:
        return None
    contract = read_contract(path)
    if contract.get("network") != LESION_HEAD:
        raise BundleError(
            f"lesion_head {path}: no lesion head",
            f"its contract says network {contract.get('network')!r}",
            "train one with configs/train_lesion_head.yaml",
        )
    network = segmentation_network(
        2.5, 1, 2, contract["spacing"], contract["patch_size"], contract["filters"], stack_slices=1
    )
    return load_weights(network, path).to(device).eval()


def roi_figures(fused: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Return SSIM in the brain against the MRI, SSIM and PSNR (dB) in the bone against the CT; None without the ROI.

    Outside of its ROI the reference stands in for the fused image: a window of 11 voxels is wider than the skull, and
    would measure the tissue beside it.

    Args:
        fused: (X, Y, Z) display units.
        reference: channels of ``FusionReferenced``.
    """
    channel = dict(zip(REFERENCE_CHANNELS, reference, strict=True))
    figures: dict[str, float | None] = {}
    for roi, source, wanted in (("brain", "mri_display", ("ssim",)), ("bone", "ct_display", ("ssim", "psnr_db"))):
        inside, truth = channel[roi] > 0.5, channel[source]
        row = image_quality(
            np.where(inside, fused, truth), truth, DISPLAY_RANGE, inside, metrics=wanted, border="reflect"
        )
        figures |= {f"{roi}_{name}": row[name] for name in wanted}
    return figures


def fusion_pictures(item: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the middle slice in the three planes as RGB rows: target, fused and their difference side by side.

    Args:
        item: a decollated output of the validation: ``pred``, and the reference at ``label``.
    """
    fused = np.asarray(torch.as_tensor(item["pred"]).cpu())[0]
    target = (np.asarray(torch.as_tensor(item["label"]).cpu())[0] + 1) / 2
    pictures = {}
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        index = fused.shape[axis] // 2
        one, two = (upright(np.take(volume, index, axis)) for volume in (target, fused))
        panels = [to_grey(one, (0, 1)), to_grey(two, (0, 1)), to_grey(np.abs(two - one), (0, 0.25))]
        pictures[name] = np.concatenate(panels, axis=1).astype(np.float32)
    return pictures
