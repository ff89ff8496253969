"""Make a cohort of the public averaged head templates (CT, T1, FLAIR on one grid), to measure a fusion on real images.

The CT stands on the stretched scale of its makers and is brought back to HU; the MRI are copied as they are. All pairs
are test cases: nothing is trained on them.

    .venv/bin/python benchmarks/fusion_templates.py DATA/ct_mr_head_templates templates/
    .venv/bin/fiducial evaluate head_mri_ct_fusion --manifest templates/manifest.json --registration_check warn ...
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from pipelines.manifests import write_manifest
from pipelines.manifests.folder import import_folder
from pipelines.manifests.splits import SplitPlan
from transforms.rois import cormack_to_hu

CONTRASTS = {"t1": "mr_t1_on_ct_grid", "flair": "mr_flair"}


def write_pairs(templates: Path, folder: Path) -> None:
    """Write ``<contrast>/{mri,ct}.nii.gz`` of every contrast."""
    image = nib.load(templates / "ct.nii.gz")
    hounsfield = cormack_to_hu(np.asarray(image.dataobj, np.float32))
    for contrast, name in CONTRASTS.items():
        (folder / contrast).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(hounsfield.astype(np.float32), image.affine), folder / contrast / "ct.nii.gz")
        shutil.copyfile(templates / f"{name}.nii.gz", folder / contrast / "mri.nii.gz")


def main() -> None:
    """Write the pairs and their manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_pairs(options.templates, options.folder)
    manifest = import_folder(
        options.folder,
        {modality: f"{{subject}}/{modality}.nii.gz" for modality in ("mri", "ct")},
        name="head_templates",
        licence="BSD-2-Clause",
        source="averaged head templates, Rorden et al., NeuroImage 2012",
        task="fusion",
        units={"ct": "HU"},
        split=SplitPlan(test=tuple(CONTRASTS)),
    )
    print(write_manifest(manifest, options.folder / "manifest.json").path)


if __name__ == "__main__":
    main()
