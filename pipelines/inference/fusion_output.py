"""Fused images on disk: NIfTI on the grid of the MRI that came in, a map of uncertainty, and a picture to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events

from pipelines.files import write_atomically, write_json
from pipelines.inference.output import image_nifti
from pipelines.manifests.digest import file_digest
from pipelines.reports.planes import three_planes
from transforms.fusion import CT, MRI, ct_display

SHOWN = {"fused": (0.0, 1.0), "CT": (0.0, 1.0), "uncertainty": (0.0, 0.1)}  # black and white, display units


class SaveFusion:
    """Write ``<case>_fused.nii.gz``, ``<case>_uncertainty.nii.gz``, ``<case>.png`` and ``<case>.json`` for every case.

    The fused image is float32 in display units (0 to about 1), the uncertainty the standard deviation of several
    samples in the same unit, where there are several. Outside of the box around the head both are 0.

    Args:
        folder: where they go.
        weights: the network's files; their digests go into the JSON.
        pair_key: the pair in the batch, on the image's own grid, for the picture.
    """

    def __init__(self, folder: str | Path, weights: Sequence[str | Path], pair_key: str = "pair") -> None:
        self.folder = Path(folder)
        self.weights = [{"file": str(file), "sha256": file_digest(Path(file))} for file in weights]
        self.pair_key = pair_key

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing brings the output back to the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            case, source = batch["case"], item["image"].meta["filename_or_obj"]
            maps = dict(zip(("fused", "uncertainty"), np.asarray(item["pred"].cpu()), strict=False))
            pair = np.asarray(torch.as_tensor(batch[self.pair_key]).cpu())
            panels = {"MRI": pair[MRI], "CT": ct_display(pair[CT]), **maps}
            files = {f"{case}_{name}.nii.gz": image_nifti(voxels, source, name) for name, voxels in maps.items()}
            files[f"{case}.png"] = three_planes(panels, nib.load(source).affine, case, SHOWN)
            for name, content in files.items():
                write_atomically(self.folder / name, content)
            figures = {name: {"mean": float(v.mean()), "max": float(v.max())} for name, v in maps.items()}
            write_json(self.folder / f"{case}.json", {"case": case, "maps": figures, "weights": self.weights[0]})
