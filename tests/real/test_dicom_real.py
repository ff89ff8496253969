"""Real scanners' DICOM: the tilted CT is refused with its reason or resampled, the MR goes there and back unchanged."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from pipelines.dicom.cases import as_case_folders
from pipelines.dicom.headers import planes_of
from pipelines.dicom.objects import Origin, to_bytes
from pipelines.dicom.privacy import names_found, names_in
from pipelines.dicom.report import volumes_of_report
from pipelines.dicom.results import write_back
from pipelines.dicom.segmentation import dicom_segmentation, labels_of_segmentation
from pipelines.dicom.series import find_series
from pipelines.dicom.volume import Volume, read_volume
from pipelines.manifests.model import Label
from transforms.errors import DataError

LABELS = [
    Label(0, "background", "#000000", (0,)),
    Label(1, "lesion", "#ff0000", (1,)),
    Label(2, "brain", "#00ff00", (2,)),
]
ORIGIN = Origin("brain_lesion_mri_segmentation", ("ab" * 32,))


def labels_like(voxels: np.ndarray, seed: int) -> np.ndarray:
    """A label map as ragged as the image: three classes by the quartiles of its values, with noise at their edges."""
    noisy = voxels + np.random.default_rng(seed).normal(0, voxels.std() / 4, voxels.shape)
    return np.digitize(noisy, np.quantile(noisy, [0.5, 0.8])).astype(np.uint8)


def differing(volume: Volume, prediction: np.ndarray) -> int:
    """Voxels that differ after a segmentation was written to bytes and read back."""
    result = pydicom.dcmread(io.BytesIO(to_bytes(dicom_segmentation(prediction, volume, LABELS, ORIGIN))))
    return int((labels_of_segmentation(result, volume) != volume.to_slices(prediction)).sum())


def test_the_t1_goes_there_and_back_without_a_voxel_changed(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "dicom_mr_head" / "t1w_part"
    cases = as_case_folders(folder, ["t1"], tmp_path / "work")
    (case,) = cases.cases
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    theirs = np.eye(4)
    theirs[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    theirs[:3, 3] = image.GetOrigin()
    theirs[:2] *= -1
    ours = nib.load(cases.folder / case.name / "t1.nii.gz")
    voxels = ours.get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(voxels, SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0))
    corners = np.array([[i, j, k, 1] for i in (0, 383) for j in (0, 273) for k in (0, 43)])
    apart = np.linalg.norm((corners @ (ours.affine - theirs).T)[:, :3], axis=1).max()
    print(f"t1w_part: corners of the volume at most {apart:.2g} mm from SimpleITK's")
    assert apart < 0.01
    prediction = labels_like(voxels, 0)
    nib.save(nib.Nifti1Image(prediction, ours.affine), tmp_path / f"{case.name}.nii.gz")
    written = write_back(tmp_path, cases, tmp_path / "out", LABELS, ORIGIN)
    assert differing(case.volume, prediction) == 0
    report = pydicom.dcmread(next(path for path in written if path.name == "measurements.dcm"))
    volume_ml = abs(np.linalg.det(ours.affine[:3, :3])) / 1000
    expected = {
        f"{label.name} {case.volume.series.key}": (prediction == label.id).sum() * volume_ml for label in LABELS[1:]
    }
    assert volumes_of_report(report) == pytest.approx(expected, rel=1e-6)
    names = names_in(series.header for series in find_series(folder, tmp_path / "again").series)
    assert {"Jane_Doe"} <= names
    for path in written:
        assert names_found(path.read_bytes(), [name for name in names if len(name) > 3]) == []


def test_the_tilted_ct_is_refused_with_its_reason(real_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        as_case_folders(real_data / "dicom_ct_head" / "ge_head", ["ct"], tmp_path / "work")
    print(refused.value)
    assert "tilted gantry" in refused.value.what
    assert "18.5 degrees" in refused.value.why
    assert "1.08" in refused.value.why  # and its gaps are uneven
    assert len(str(refused.value).splitlines()) == 3


def test_the_tilted_ct_resampled_agrees_with_its_slices_where_they_truly_lie(real_data: Path, tmp_path: Path) -> None:
    (series,) = find_series(real_data / "dicom_ct_head" / "ge_head", tmp_path / "work").series
    volume = read_volume(series, allow_resampling=True)
    assert volume.padding[0] > 0
    planes, decoded = planes_of(series), [pydicom.dcmread(image.path) for image in series.images]
    inverse, rng = np.linalg.inv(volume.affine), np.random.default_rng(0)
    checked, wrong = 0, []
    for plane, image in zip(planes, decoded, strict=True):
        stored = image.pixel_array.astype(float)
        rows, columns = rng.integers(100, 400, 200), rng.integers(100, 400, 200)
        across, down = np.array(plane.orientation).reshape(2, 3)
        spots = (
            np.array(plane.position)
            + np.outer(columns * plane.spacing[1], across)
            + np.outer(rows * plane.spacing[0], down)
        )
        index = np.column_stack([spots * [-1, -1, 1], np.ones(200)]) @ inverse.T
        on_a_slice = np.abs(index[:, 2] - index[:, 2].round()) < 0.02  # this source slice is a slice of the new grid
        for at, row, column in zip(index[on_a_slice], rows[on_a_slice], columns[on_a_slice], strict=True):
            i, k = round(at[0]), round(at[2])
            j = int(np.floor(at[1]))
            part = at[1] - j  # linear between two rows, of which the original pixel is a part
            near = stored[row - 1 : row + 2, column]
            value = (1 - part) * volume.voxels[i, j, k] + part * volume.voxels[i, j + 1, k]
            wrong.append(not near.min() - 1 <= value <= near.max() + 1)
            checked += 1
    print(f"ge_head: {checked} pixels compared, {sum(wrong)} outside of the range of their neighbours")
    assert checked > 200
    assert np.mean(wrong) < 0.01
    prediction = labels_like(volume.voxels, 1)
    assert differing(volume, prediction) == 0
    assert volume.to_slices(prediction).shape == (28, 512, 512)


def test_a_time_series_is_refused_as_several_volumes(real_data: Path, tmp_path: Path) -> None:
    (series,) = find_series(real_data / "dicom_mr_head" / "ge_epi_fmri", tmp_path / "work").series
    with pytest.raises(DataError, match="several volumes") as refused:
        read_volume(series, allow_resampling=True)
    assert "150 images at 15 positions, 10 each" in refused.value.why


def test_one_volume_of_the_time_series_is_read_as_simpleitk_reads_it(real_data: Path, tmp_path: Path) -> None:
    paths = sorted((real_data / "dicom_mr_head" / "ge_epi_fmri").glob("*.dcm"))
    chosen, seen = [], set()
    for path in paths:
        place = tuple(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient)
        if place not in seen:
            seen.add(place)
            chosen.append(path)
    (tmp_path / "one").mkdir()
    for path in chosen:
        (tmp_path / "one" / path.name).write_bytes(path.read_bytes())
    volume = read_volume(find_series(tmp_path / "one", tmp_path / "work").series[0])
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "one")))
    image = reader.Execute()
    np.testing.assert_array_equal(volume.voxels, SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine[:3, 3] * [-1, -1, 1], image.GetOrigin(), atol=1e-4)
    assert differing(volume, labels_like(volume.voxels, 2)) == 0
