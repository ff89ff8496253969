"""A mask lands on the grid of the image it was made from, header and all; its volumes are those of a ruler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pipelines.inference import SavePredictions, segmentation_nifti, uncertainty_nifti, volumes
from pipelines.inference.output import uncertainty_inside
from pipelines.manifests.digest import file_digest
from pipelines.manifests.model import Label
from transforms.errors import BundleError

Writer = Callable[..., Path]
LABELS = [
    Label(0, "background", "#000000", (0,)),
    Label(1, "lesion", "#ff0000", (1,)),
    Label(2, "edema", "#00ff00", (2,)),
]
MASK = np.zeros((5, 4, 3), np.uint8)
MASK[1:3, 1:3, 1] = 1
MASK[4, 3, 2] = 2


def decoded(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (1, 0), (0, 2), (2, 4), (0, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_affine_and_codes_equal_the_source(
    tmp_path: Path, oblique: np.ndarray, qform: int, sform: int, turned: bool
) -> None:
    affine = oblique if turned else np.diag([-0.5, -1.0, 3.0, 1.0])
    source = nib.Nifti1Image(np.zeros((5, 4, 3), np.float32), affine)
    source.set_qform(affine, qform)
    source.set_sform(affine, sform)
    nib.save(source, tmp_path / "source.nii.gz")
    stored = nib.load(tmp_path / "source.nii.gz")
    image = decoded(segmentation_nifti(MASK, tmp_path / "source.nii.gz"))
    np.testing.assert_array_equal(image.affine, stored.affine)
    for name in ("get_qform", "get_sform"):
        ours, theirs = getattr(image, name)(coded=True), getattr(stored, name)(coded=True)
        assert ours[1] == theirs[1]
        np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(image.header.get_zooms(), stored.header.get_zooms())
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), MASK)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_qform_and_sform_that_differ_are_both_kept(tmp_path: Path, oblique: np.ndarray) -> None:
    source = nib.Nifti1Image(np.zeros((5, 4, 3), np.float32), oblique)
    source.set_qform(np.diag([0.5, 1.0, 3.0, 1.0]), 1)
    source.set_sform(oblique, 2)
    nib.save(source, tmp_path / "source.nii")
    image = decoded(segmentation_nifti(MASK, tmp_path / "source.nii"))
    np.testing.assert_allclose(image.get_qform(), np.diag([0.5, 1.0, 3.0, 1.0]), atol=1e-6)
    np.testing.assert_allclose(image.get_sform(), oblique, atol=1e-6)


def test_the_bytes_depend_on_nothing_but_the_mask(write_nifti: Writer) -> None:
    source = write_nifti("source", np.zeros((5, 4, 3), np.float32))
    first = segmentation_nifti(MASK, source)
    assert segmentation_nifti(MASK.astype(np.int64), source) == first
    assert first[4:8] == bytes(4)  # gzip's time stamp
    assert segmentation_nifti(np.zeros_like(MASK), source) != first


def test_a_four_dimensional_source_gives_a_three_dimensional_mask(write_nifti: Writer) -> None:
    source = write_nifti("source", np.zeros((5, 4, 3, 2), np.float32))
    assert decoded(segmentation_nifti(MASK, source)).shape == (5, 4, 3)


def test_another_shape_is_refused(write_nifti: Writer) -> None:
    source = write_nifti("source", np.zeros((5, 4, 2), np.float32))
    with pytest.raises(BundleError, match=r"source.nii.gz: the prediction has shape \(5, 4, 3\)"):
        segmentation_nifti(MASK, source)


@pytest.mark.parametrize("value", [256, -1, 0.5])
def test_a_value_that_does_not_fit_is_refused(write_nifti: Writer, value: float) -> None:
    source = write_nifti("source", np.zeros((5, 4, 3), np.float32))
    wrong = MASK.astype(np.float64)
    wrong[0, 0, 0] = value
    with pytest.raises(BundleError, match="no label map of uint8"):
        segmentation_nifti(wrong, source)


def test_volumes_by_hand_at_an_anisotropic_spacing() -> None:
    # Voxels of 0.5 x 1 x 3 = 1.5 mm3. Label 1: a square of 4 voxels, and one more that touches it only by a corner: 5
    # voxels are 7.5 mm3 in one component. Label 2: two voxels far apart. Label 3 is absent.
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1:3, 1:3, 1] = 1
    mask[3, 3, 2] = 1
    mask[0, 0, 5] = mask[5, 5, 5] = 2
    names = {0: "background", 1: "lesion", 2: "edema", 3: "core"}
    assert volumes(mask, (0.5, 1.0, 3.0), names) == [
        {"id": 1, "name": "lesion", "voxels": 5, "volume_ml": pytest.approx(0.0075), "components": 1},
        {"id": 2, "name": "edema", "voxels": 2, "volume_ml": pytest.approx(0.003), "components": 2},
        {"id": 3, "name": "core", "voxels": 0, "volume_ml": 0.0, "components": 0},
    ]


def test_the_handler_writes_mask_and_volumes_by_case(tmp_path: Path, write_nifti: Writer, oblique: np.ndarray) -> None:
    source = write_nifti("flair", np.zeros((5, 4, 3), np.float32), oblique)
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(b"weights")
    image = MetaTensor(torch.zeros(1, 5, 4, 3), meta={"filename_or_obj": str(source)})
    output = [{"image": image, "pred": torch.as_tensor(MASK.astype(np.float32))[None]}]
    engine = SimpleNamespace(state=SimpleNamespace(output=output, batch=[{"case": "p01"}]))
    SavePredictions(tmp_path / "out", LABELS, [weights])(engine)  # type: ignore[arg-type]
    written = nib.load(tmp_path / "out" / "p01.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), MASK)
    np.testing.assert_allclose(written.affine, oblique, atol=1e-6)
    report = json.loads((tmp_path / "out" / "p01.json").read_text())
    assert report["case"] == "p01"
    assert report["weights"] == {"file": str(weights), "sha256": file_digest(weights)}
    np.testing.assert_allclose(report["spacing_mm"], [0.5, 1.0, 3.0], atol=1e-6)  # of the turned grid
    assert [(row["name"], row["voxels"]) for row in report["labels"]] == [("lesion", 4), ("edema", 1)]
    assert report["labels"][0]["volume_ml"] == pytest.approx(4 * 1.5 / 1000, rel=1e-6)
    assert "uncertainty" not in report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p01.json", "p01.nii.gz"]


ENTROPY = np.zeros((5, 4, 3), np.float32)
ENTROPY[1:3, 1:3, 1] = [[0.1, 0.2], [0.3, 0.4]]  # in the four voxels of the lesion: a mean of .25
ENTROPY[0, 0, 0] = 0.7  # outside


def test_uncertainty_is_written_as_it_is_on_the_grid_of_the_image(write_nifti: Writer, oblique: np.ndarray) -> None:
    source = write_nifti("source", np.zeros((5, 4, 3), np.float32), oblique)
    image = decoded(uncertainty_nifti(ENTROPY, source, "entropy"))
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(image.dataobj), ENTROPY)
    np.testing.assert_array_equal(image.affine, nib.load(source).affine)
    assert bytes(image.header["descrip"].item()) == b"Fiducial entropy (nats)"
    with pytest.raises(BundleError, match="the prediction has shape"):
        uncertainty_nifti(ENTROPY[1:], source, "entropy")


@pytest.mark.parametrize(("value", "count"), [(np.nan, "1 not finite, 0 neg"), (-0.1, "0 not finite, 1 neg")])
def test_what_is_no_uncertainty_is_refused(write_nifti: Writer, value: float, count: str) -> None:
    source = write_nifti("source", np.zeros((5, 4, 3), np.float32))
    wrong = ENTROPY.copy()
    wrong[4, 3, 2] = value
    with pytest.raises(BundleError, match="entropy has values that are no uncertainty") as refusal:
        uncertainty_nifti(wrong, source, "entropy")
    assert refusal.value.why.startswith(count)


def test_mean_uncertainty_inside_each_label() -> None:
    names = {0: "background", 1: "lesion", 2: "edema", 3: "core"}
    assert uncertainty_inside(MASK, {"entropy": ENTROPY}, names) == [
        {"id": 1, "name": "lesion", "mean_entropy": pytest.approx(0.25)},
        {"id": 2, "name": "edema", "mean_entropy": 0.0},
        {"id": 3, "name": "core", "mean_entropy": None},  # no voxel of it
    ]


@pytest.mark.parametrize("members", [1, 3])
def test_the_handler_writes_uncertainty_and_names_every_member(
    tmp_path: Path, write_nifti: Writer, members: int
) -> None:
    source = write_nifti("flair", np.zeros((5, 4, 3), np.float32))
    weights = [tmp_path / f"{number}.safetensors" for number in range(members)]
    for number, path in enumerate(weights):
        path.write_bytes(bytes([number]))
    image = MetaTensor(torch.zeros(1, 5, 4, 3), meta={"filename_or_obj": str(source)})
    maps = {"entropy": torch.as_tensor(ENTROPY)[None], "mutual_information": torch.as_tensor(ENTROPY)[None] / 2}
    output = [{"image": image, "pred": torch.as_tensor(MASK.astype(np.float32))[None], **maps}]
    engine = SimpleNamespace(state=SimpleNamespace(output=output, batch=[{"case": "p01"}]))
    SavePredictions(tmp_path / "out", LABELS, weights)(engine)  # type: ignore[arg-type]
    for name, factor in (("entropy", 1), ("mutual_information", 0.5)):
        np.testing.assert_allclose(nib.load(tmp_path / "out" / f"p01_{name}.nii.gz").get_fdata(), ENTROPY * factor)
    report = json.loads((tmp_path / "out" / "p01.json").read_text())
    about = report["uncertainty"]
    assert (about["unit"], about["members"], "note" in about) == ("nat", members, members == 1)
    assert about["labels"][0]["mean_entropy"] == pytest.approx(0.25)
    assert about["labels"][0]["mean_mutual_information"] == pytest.approx(0.125)
    listed = report["weights"] if members > 1 else [report["weights"]]
    assert listed == [{"file": str(path), "sha256": file_digest(path)} for path in weights]
