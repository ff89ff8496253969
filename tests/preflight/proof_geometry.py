"""Planted failures of geometry: in the headers of generated heads, in prepared cases, and in a pair moved apart."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from planted import Proof
from proof_intensity import changed, findings, fusion_run, lesion_run, rule_named, scratch

from pipelines.manifests import Manifest
from pipelines.preflight import Inspection
from pipelines.preflight.geometry import RULES
from pipelines.preflight.inspection import as_dictionary

HEADERS = rule_named(RULES, "files of a case on one grid, as declared")
VIEW = rule_named(RULES, "field of view of a head")
WINDOW = rule_named(RULES, "volumes fill the window")
SLICES = rule_named(RULES, "no slice is missing")
REGISTRATION = rule_named(RULES, "MRI and CT lie on each other")

Change = Callable[[nib.Nifti1Image], nib.Nifti1Image]


def with_files_changed(name: str, change: Change, key: str = "label", cases: int = 1) -> Inspection:
    """The lesion bundle's cohort, a copy whose first cases have one file written anew."""
    run = lesion_run()
    cohort = run.need("cohort")
    root = scratch(f"changed_{name}")
    if not root.exists():
        shutil.copytree(cohort.root, root)
        for case in cohort.cases[:cases]:
            path = root / case.files()[key].path
            image = change(nib.load(path))
            path.unlink()
            nib.save(image, path)
    return replace(run, cohort=replace(cohort, root=root))


def shifted(image: nib.Nifti1Image) -> nib.Nifti1Image:
    affine = np.array(image.affine)
    affine[0, 3] += 1
    return nib.Nifti1Image(np.asarray(image.dataobj), affine)


def identity(image: nib.Nifti1Image) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4))


def two_forms(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The sform as it was, the qform with left and right exchanged."""
    changed_image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    changed_image.set_sform(image.affine, 1)
    changed_image.set_qform(np.diag([-1.0, 1, 1, 1]) @ image.affine, 1)
    return changed_image


def tenth(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Spacing in cm: a head of 18 mm."""
    return nib.Nifti1Image(np.asarray(image.dataobj), np.diag([0.1, 0.1, 0.1, 1]) @ image.affine)


@functools.cache
def without_spacing() -> Inspection:
    """A label whose header says 0 mm along the third axis; such a header has to be written by hand."""
    inspection = with_files_changed("zero", lambda image: nib.Nifti1Image(np.asarray(image.dataobj), image.affine))
    cohort: Manifest = inspection.need("cohort")
    label = cohort.cases[0].label
    assert label is not None
    path = cohort.root / label.path
    plain = path.with_suffix("")  # .nii
    nib.save(nib.load(path), plain)
    content = bytearray(plain.read_bytes())
    content[88:92] = np.float32(0).tobytes()  # pixdim[3]
    plain.write_bytes(bytes(content))
    cases = (
        replace(cohort.cases[0], label=replace(label, path=str(Path(label.path).with_suffix("")))),
        *cohort.cases[1:],
    )
    return replace(inspection, cohort=replace(cohort, cases=cases))


def prepared(run: Inspection, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Inspection:
    """The same run, its prepared training cases changed."""
    return changed(run, "train", cases=[change(as_dictionary(case)) for case in run.train.cases])


def without_a_slice(case: dict[str, Any]) -> dict[str, Any]:
    image = np.array(case["image"])
    image[..., 20] = 0
    return {**case, "image": image}


def with_ct_moved(case: dict[str, Any]) -> dict[str, Any]:
    """The CT one voxel (4 mm) to the side."""
    image = np.array(case["image"])
    image[1] = np.roll(image[1], 1, axis=0)
    return {**case, "image": image}


def with_one_pair_moved_apart() -> Inspection:
    run = prepared(fusion_run(), with_ct_moved)
    return changed(run, "train", cases=run.train.cases[:1])


def with_patch(size: int) -> Inspection:
    run = lesion_run()
    return replace(run, contract={**run.contract, "patch_size": [size] * 3})


PROOFS = [
    Proof(
        "R10",
        "Shape, affine, spacing, sform and qform of every file, from its header.",
        "affines of image and label differed, and the saved affine was the identity",
        lambda: findings(HEADERS, with_files_changed("shifted", shifted)),
        lambda: findings(HEADERS, lesion_run(), fusion_run()),
    ),
    Proof(
        "R10",
        "The field of view in the plane of the slices.",
        "the spacing was invented",
        lambda: findings(VIEW, with_files_changed("tenth", tenth, "images/flair")),
        lambda: findings(VIEW, lesion_run(), fusion_run()),
        severity="warn",
    ),
    Proof(
        "R10",
        "Voxels of every case at the spacing of the network, against its window.",
        "four poolings on 26 slices",
        lambda: findings(WINDOW, with_patch(128)),
        lambda: findings(WINDOW, lesion_run(), fusion_run()),
    ),
    Proof(
        "R10",
        "Slices that are constant between slices that are not.",
        "missing neighbour slices were filled with zeros",
        lambda: findings(SLICES, prepared(lesion_run(), without_a_slice)),
        lambda: findings(SLICES, lesion_run(), fusion_run()),
    ),
    Proof(
        "R11",
        "Dice of the outlines of the heads and the peak of the mutual information of a few pairs.",
        "MRI and CT of a case did not lie on each other",
        lambda: findings(REGISTRATION, with_one_pair_moved_apart()),
        lambda: findings(REGISTRATION, fusion_run()),
    ),
]
