"""A fused image on disk: on the grid of the MRI, nothing that is not finite, and a picture the right way up."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from monai.data import MetaTensor
from scipy import ndimage

from pipelines.inference import SaveFusion
from pipelines.inference.output import image_nifti
from pipelines.manifests.digest import file_digest
from pipelines.reports.planes import PLANES, three_planes
from transforms.errors import BundleError

Writer = Callable[..., Path]
SHAPE = (5, 4, 3)
FUSED = np.random.default_rng(0).uniform(-0.1, 1.3, SHAPE).astype(np.float32)


# ---- NIfTI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (1, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("kind", ["oblique", "LAS"])
def test_values_affine_and_codes(tmp_path: Path, oblique: np.ndarray, qform: int, sform: int, kind: str) -> None:
    affine = oblique if kind == "oblique" else np.diag([-0.5, 1.0, 3.0, 1.0])
    source = nib.Nifti1Image(np.zeros(SHAPE, np.int16), affine)
    source.set_qform(affine, qform)
    source.set_sform(affine, sform)
    nib.save(source, tmp_path / "mri.nii.gz")
    stored = nib.load(tmp_path / "mri.nii.gz")
    image = nib.Nifti1Image.from_bytes(gzip.decompress(image_nifti(FUSED, tmp_path / "mri.nii.gz", "fused")))
    np.testing.assert_array_equal(np.asarray(image.dataobj), FUSED)
    np.testing.assert_array_equal(image.affine, stored.affine)
    assert image.get_data_dtype() == np.float32
    for name in ("get_qform", "get_sform"):
        ours, theirs = getattr(image, name)(coded=True), getattr(stored, name)(coded=True)
        assert ours[1] == theirs[1]
        np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(image.header.get_zooms(), stored.header.get_zooms())
    assert bytes(image.header["descrip"].item()) == b"Fiducial fused"
    assert image.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(write_nifti: Writer, value: float) -> None:
    source = write_nifti("mri", np.zeros(SHAPE, np.float32))
    wrong = FUSED.copy()
    wrong[1, 2, 0] = value
    with pytest.raises(BundleError, match=r"mri.nii.gz: the fused image has values that are not finite") as caught:
        image_nifti(wrong, source, "fused")
    assert caught.value.why == "1 of 60 voxels"


def test_another_grid_is_refused(write_nifti: Writer) -> None:
    source = write_nifti("mri", np.zeros((5, 4, 2), np.float32))
    with pytest.raises(BundleError, match=r"the prediction has shape \(5, 4, 3\)"):
        image_nifti(FUSED, source, "fused")


def test_equal_images_are_equal_files(write_nifti: Writer) -> None:
    source = write_nifti("mri", np.zeros(SHAPE, np.float32))
    first = image_nifti(FUSED, source, "fused")
    assert image_nifti(FUSED.astype(np.float64), source, "fused") == first
    assert image_nifti(FUSED + 1, source, "fused") != first


# ---- the handler ---------------------------------------------------------------------------------------------------


def engine_of(source: Path, pred: np.ndarray, case: str = "p01") -> SimpleNamespace:
    image = MetaTensor(torch.zeros(1, *SHAPE), meta={"filename_or_obj": str(source)})
    pair = torch.stack([torch.full(SHAPE, 200.0), torch.full(SHAPE, 40.0)])
    output = [{"image": image, "pred": torch.as_tensor(pred)}]
    return SimpleNamespace(state=SimpleNamespace(output=output, batch=[{"case": case, "pair": pair}]))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    path.write_bytes(b"weights")
    return path


def test_one_channel_is_written_as_the_fused_image(
    tmp_path: Path, write_nifti: Writer, oblique: np.ndarray, weights: Path
) -> None:
    source = write_nifti("mri", np.zeros(SHAPE, np.float32), oblique)
    SaveFusion(tmp_path / "out", [weights])(engine_of(source, FUSED[None]))  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p01.json", "p01.png", "p01_fused.nii.gz"]
    written = nib.load(tmp_path / "out" / "p01_fused.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), FUSED)
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)
    report = json.loads((tmp_path / "out" / "p01.json").read_text())
    assert report["case"] == "p01"
    assert report["weights"] == {"file": str(weights), "sha256": file_digest(weights)}
    assert report["maps"] == {"fused": {"mean": pytest.approx(FUSED.mean()), "max": pytest.approx(FUSED.max())}}


def test_two_channels_are_the_mean_and_its_uncertainty(tmp_path: Path, write_nifti: Writer, weights: Path) -> None:
    source = write_nifti("mri", np.zeros(SHAPE, np.float32))
    spread = np.abs(FUSED) / 10
    SaveFusion(tmp_path / "out", [weights])(engine_of(source, np.stack([FUSED, spread])))  # type: ignore[arg-type]
    for name, voxels in (("fused", FUSED), ("uncertainty", spread)):
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / f"p01_{name}.nii.gz").dataobj), voxels)
    report = json.loads((tmp_path / "out" / "p01.json").read_text())
    assert list(report["maps"]) == ["fused", "uncertainty"]


def test_a_network_that_failed_leaves_nothing_behind(tmp_path: Path, write_nifti: Writer, weights: Path) -> None:
    source = write_nifti("mri", np.zeros(SHAPE, np.float32))
    wrong = np.stack([FUSED, np.full(SHAPE, np.nan, np.float32)])
    with pytest.raises(BundleError, match="not finite"):
        SaveFusion(tmp_path / "out", [weights])(engine_of(source, wrong))  # type: ignore[arg-type]
    assert not list((tmp_path / "out").glob("*"))


# ---- the picture ---------------------------------------------------------------------------------------------------

# 20 x 30 x 10 voxels of 2 x 1 x 4 mm: 40 x 30 x 40 mm. A block lies to the right, in front and above; it crosses no
# middle plane but its own three copies: each plane shows the block that has one index at the middle.
GRID, AFFINE = (20, 30, 10), np.diag([2.0, 1.0, 4.0, 1.0])
GREY, BLOCK = 0.3, 0.6


def marked() -> np.ndarray:
    """RAS: grey, with a bar to the right and in front, one to the right and above, one in front and above."""
    volume = np.full(GRID, GREY, np.float32)
    volume[14:18, 21:27, 4:7] = BLOCK  # axial: right, anterior
    volume[14:18, 13:18, 7:9] = BLOCK  # coronal: right, above
    volume[8:13, 21:27, 7:9] = BLOCK  # sagittal: in front, above
    return volume


def panels(picture: np.ndarray) -> list[list[np.ndarray]]:
    """The drawn planes as rows of columns: large areas that are not black; letters are small ones."""
    areas, _ = ndimage.label(picture > 0.05)
    found = [at for at in ndimage.find_objects(areas) if picture[at].size > 5000]
    found.sort(key=lambda at: (at[0].start + at[0].stop) // 2)
    columns = len(found) // len(PLANES)
    rows = [found[row * columns : (row + 1) * columns] for row in range(len(PLANES))]
    return [[picture[at] for at in sorted(row, key=lambda at: at[1].start)] for row in rows]


def drawn(volumes: dict[str, np.ndarray], affine: np.ndarray) -> np.ndarray:
    content = three_planes(volumes, affine, "p01", dict.fromkeys(volumes, (0.0, 1.0)))
    return imread(io.BytesIO(content))[..., 0]


@pytest.mark.parametrize(("plane", "mm"), [("sagittal", (30, 40)), ("coronal", (40, 40)), ("axial", (40, 30))])
def test_each_plane_is_upright_and_in_proportion(plane: str, mm: tuple[int, int]) -> None:
    shown = panels(drawn({"fused": marked()}, AFFINE))[PLANES.index(plane)][0]
    height, width = shown.shape
    assert width / height == pytest.approx(mm[0] / mm[1], rel=0.02)
    rows, columns = np.nonzero(np.abs(shown - BLOCK) < 0.02)
    assert rows.mean() < 0.4 * height  # above, in the axial plane in front
    assert columns.mean() > 0.6 * width  # to the right, in the sagittal plane in front


@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR"])
def test_the_storage_of_the_source_does_not_turn_the_picture(codes: str) -> None:
    image = nib.Nifti1Image(marked(), AFFINE)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    )
    assert nib.aff2axcodes(turned.affine) == tuple(codes)
    np.testing.assert_array_equal(
        drawn({"fused": np.asarray(turned.dataobj)}, turned.affine), drawn({"fused": marked()}, AFFINE)
    )
    # planted: the voxels of the other storage under the first affine
    assert not np.array_equal(drawn({"fused": marked()[::-1]}, AFFINE), drawn({"fused": marked()}, AFFINE))


def test_a_column_for_every_volume() -> None:
    greys = (0.2, 0.4, 0.7)
    shown = panels(drawn({f"v{grey}": np.full(GRID, grey, np.float32) for grey in greys}, AFFINE))
    assert len(shown) == 3
    for row in shown:
        assert [float(np.median(each)) for each in row] == pytest.approx(greys, abs=0.01)


def test_without_a_window_percentiles_are_black_and_white() -> None:
    volume = np.broadcast_to(np.linspace(50, 1050, 20, dtype=np.float32)[:, None, None], GRID).copy()
    content = three_planes({"MRI": volume}, AFFINE, "p01")
    axial = panels(imread(io.BytesIO(content))[..., 0])[2][0]
    middle = axial[axial.shape[0] // 2]
    assert middle[0] < 0.1
    assert middle[-1] > 0.98
    assert np.unique(middle.round(2)).size > 10
