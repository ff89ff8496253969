"""The preflight on real images: what is wrong with the public sets is found, and nothing else is.

Where a bundle trains on a set, ``fiducial check --smoke`` is asked. Of the other sets, the functions that judge are
given the files: headers, label maps, instances, spectra, boxes. Each finding here was looked at, see docs/preflight.md.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import loadmat
from scipy.signal import savgol_filter
from skimage.measure import label as components

from pipelines.cli import main
from pipelines.preflight import Finding
from pipelines.preflight.geometry import Grid, case_findings, form_findings, missing_slices, slice_findings
from pipelines.preflight.label_counts import Tally
from pipelines.preflight.labels import classes_without_truth, ignored_wrongly
from pipelines.preflight.metrics import judge_components, measure_components
from pipelines.preflight.rules import RULES
from pipelines.preflight.spectral import bad_axis, centres_off_grid, crossing_filters, segments
from pipelines.preflight.splits import missing_classes
from pipelines.preflight.tables import unknown_values

LESIONS = "brain_lesion_mri_segmentation"
LIMITS = {rule.name: rule.limits for rule in RULES}
GEOMETRY, MERGED = LIMITS["files of a case on one grid, as declared"], LIMITS["merged instances"]
CLASSES, FILTERS = LIMITS["classes of the training"], LIMITS["filters across a cut"]

MS = ["ms_lesion_mri/mni", "--image", "flair={subject}/FLAIR.nii.gz", "--image", "t1={subject}/T1.nii.gz"]
MS += ["--image", "t2={subject}/T2.nii.gz", "--label", "{subject}/lesion.nii.gz"]
MS += ["--train", "patient07", "--validation", "patient19"]
GLIOMA = ["glioma_brats2015_subset", "--image", "flair={subject}/Flair_subtrMeanDivStd.nii.gz"]
GLIOMA += ["--image", "t1c={subject}/T1c_subtrMeanDivStd.nii.gz", "--label", "{subject}/OTMultiClass.nii.gz"]
GLIOMA += ["--mask", "brain={subject}/brainmask.nii.gz", "--validation", "brats_2013_pat0006_1"]
TUMOUR_CLASSES = ["1:necrosis", "2:oedema", "3:non_enhancing", "4:enhancing"]
STROKE = ["stroke_lesion_mri", "--image", "t2=T2.nii.gz", "--label", "lesion.nii.gz"]
TUMOUR = ["brain_tumour_mri", "--image", "t1c={subject}_image.nii.gz", "--label", "{subject}_label.nii.gz"]
HIPPOCAMPUS = ["hippocampus_mri", "--image", "t1=images/{case}.nii.gz", "--label", "labels/{case}.nii.gz"]
HIPPOCAMPUS += ["--label-name", "1:anterior", "--label-name", "2:posterior"]
CROPS = ("R10", "warn", "images/t1 has an unlikely field of view for a head")
TOO_SMALL = ("R10", "error", "images/t1 is much smaller than the window of the network")


def named(labels: Sequence[str]) -> list[str]:
    return [word for name in labels for word in ("--label-name", name)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imported", "options", "expected"),
    [
        (STROKE, [], []),
        (TUMOUR, [], []),
        ([*GLIOMA, *named(["1:whole_tumour=1+2+3+4"])], [], []),
        ([*GLIOMA, *named(TUMOUR_CLASSES)], [], []),
        (MS, [], []),
        (HIPPOCAMPUS, [], [CROPS, TOO_SMALL]),
        (HIPPOCAMPUS, ["--patch_size", "[32,32,32]"], [CROPS]),
    ],
    ids=["stroke", "tumour", "glioma", "glioma in four classes", "ms", "hippocampus", "hippocampus, small patch"],
)
def test_the_lesion_bundle(
    real_data: Path, tmp_path: Path, imported: list[str], options: list[str], expected: list[tuple[str, str, str]]
) -> None:
    manifest = str(tmp_path / "manifest.json")
    words = [str(real_data / imported[0]), *imported[1:], "--name", "real", "-o", manifest]
    assert main(["manifest", "import", "folder", *words]) == 0
    where = ["--cache_dir", str(tmp_path / "cache"), "--runs_dir", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]
    code = main(["check", LESIONS, "--smoke", "--manifest", manifest, *where, *options])
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert sorted((each["rule"], each["severity"], each["what"]) for each in found["findings"]) == sorted(expected)
    assert code == (4 if TOO_SMALL in expected else 0)


# --- geometry


def grid(path: Path, case: str, key: str) -> Grid:
    image: Any = nib.load(path)
    forms = []
    for affine, code in (image.header.get_sform(coded=True), image.header.get_qform(coded=True)):
        forms.append(None if affine is None or code == 0 else (affine, int(code)))
    return Grid(case, key, image.shape[:3], image.affine, *forms)


def test_shifted_origins_are_found_in_every_patient_but_one(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real_data / "ms_lesion_mri" / "masks_only"
    patients = sorted(path for path in folder.iterdir() if path.is_dir())
    keys = ("consensus_gt", "brainmask")
    (finding,) = case_findings([grid(p / f"{key}.nii.gz", p.name, key) for p in patients for key in keys], GEOMETRY)
    assert (finding.rule, finding.measured) == ("R10", "largest difference 0.45")  # half a voxel of the original scan
    assert set(finding.cases) == {p.name for p in patients} - {"patient12"}
    words = [str(folder), "--image", "brain={subject}/brainmask.nii.gz", "--label", "{subject}/consensus_gt.nii.gz"]
    assert main(["manifest", "import", "folder", *words, "--name", "ms", "-o", str(tmp_path / "m.json")]) == 3
    assert "the affine differs by 0.4 " in capsys.readouterr().err


def test_two_studies_on_grids_of_their_own(real_data: Path) -> None:
    folder = real_data / "ms_lesion_mri" / "longitudinal_raw" / "patient12"
    keys = ("study1_FLAIR", "study1_T1W", "study2_FLAIR")
    shapes, affines = case_findings([grid(folder / f"{key}.nii.gz", "12", key) for key in keys], GEOMETRY)
    assert shapes.what == "study1_T1W and study1_FLAIR have different shapes"
    assert affines.what == "study2_FLAIR and study1_FLAIR have different affines"


def test_sform_and_qform_of_every_file_agree(real_data: Path) -> None:
    grids = [grid(path, str(path), "image") for path in sorted(real_data.rglob("*.nii.gz"))]
    assert len(grids) > 100
    assert form_findings(grids, GEOMETRY) == []


def test_no_section_is_missing_in_electron_microscopy(real_data: Path) -> None:
    sections = sorted((real_data / "em_drosophila_vnc" / "raw").iterdir())
    volumes = {
        "fib25": tifffile.imread(real_data / "em_fib25_neurons" / "raw.tif"),
        "vnc": np.stack([tifffile.imread(path) for path in sections]),
    }
    assert slice_findings({name: missing_slices(volume[None]) for name, volume in volumes.items()}) == []
    volumes["fib25"][80] = 128  # planted: a section that was lost and filled
    (finding,) = slice_findings({"fib25": missing_slices(volumes["fib25"][None])})
    assert "the first at 80 along axis 0" in finding.measured


# --- labels

VNC_VALUES = (0, 32, 64, 96, 128, 159, 191, 223, 255)


def counts_of(folder: Path) -> dict[int, int]:
    files = [tifffile.imread(path) if path.suffix == ".tif" else Image.open(path) for path in sorted(folder.iterdir())]
    values, numbers = np.unique(np.stack([np.asarray(file) for file in files]), return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_label_values_of_the_nerve_cord(real_data: Path) -> None:
    limits = LIMITS["label values"]
    counts = counts_of(real_data / "em_drosophila_vnc" / "labels")
    assert unknown_values("labels", counts, VNC_VALUES, limits) == []
    (finding,) = unknown_values("labels", counts, VNC_VALUES[1:], limits)  # 0 is not described as a class: 2.5 %
    assert "label table: 0" in finding.what
    # foreground is 255 in some voxels of the synapses and 1 in others
    (finding,) = unknown_values("synapses", counts_of(real_data / "em_drosophila_vnc" / "synapses"), (0, 255), limits)
    assert "label table: 1" in finding.what


def test_single_nuclei_are_quiet_and_their_mask_is_not(real_data: Path) -> None:
    # 38 pictures at several magnifications; drawn one by one, and as connected components of the same mask
    maps = [
        np.asarray(Image.open(path)).astype(np.int32)
        for path in sorted((real_data / "nuclei_dsb2018" / "instances").iterdir())
    ]
    assert judged(maps) == []
    (finding,) = judged([components(ids > 0) for ids in maps])
    assert (finding.rule, finding.severity) == ("R44", "warn")


def judged(maps: Sequence[np.ndarray]) -> list[Finding]:
    measured = [measure_components(ids) for ids in maps]
    images = np.concatenate([np.full(len(areas), number) for number, (areas, _) in enumerate(measured)])
    areas, solidities = (np.concatenate([pair[i] for pair in measured]) for i in (0, 1))
    return judge_components(areas, solidities, MERGED, images=images)


def test_boxes_of_blood_cells(real_data: Path) -> None:
    names = {1: "RBC", 2: "WBC", 3: "Platelets"}
    tallies = []
    for path in sorted((real_data / "blood_cells_bccd" / "annotations").glob("*.xml")):
        found = [each.findtext("name") for each in ElementTree.parse(path).getroot().iter("object")]
        counted = Counter(found)
        tallies.append(Tally(path.stem, {number: counted[name] for number, name in names.items()}, len(found)))
    parts = {"train": tallies[:96], "validation": tallies[96:]}
    assert [f for part, some in parts.items() for f in classes_without_truth(part, some, names, CLASSES)] == []
    assert missing_classes(parts, names) == []


def test_types_of_red_cells_that_a_split_by_file_name_loses(real_data: Path) -> None:
    names = {5: "stomatocyte", 8: "burr", 12: "elliptocyte"}
    tallies = []
    for path in sorted((real_data / "blood_cells_chula" / "labels").glob("*.txt")):
        types = Counter(int(line.split()[2]) for line in path.read_text().splitlines() if line.strip())
        tallies.append(Tally(path.stem, dict(types), sum(types.values())))
    train = [f for f in classes_without_truth("train", tallies[:32], names, CLASSES) if f.severity == "error"]
    assert ["elliptocyte" in finding.what for finding in train] == [True]  # the part of the set here has none
    lost = missing_classes({"train": tallies[:32], "validation": tallies[32:]}, names)
    assert [finding.what.split("(")[1].split(")")[0] for finding in lost] == ["stomatocyte", "burr"]


# --- spectra

BANDS = (1655, 1545, 1740, 1240, 1080, 1450, 1395, 1160)


def derivative(spectrum: np.ndarray) -> np.ndarray:
    return np.asarray(savgol_filter(spectrum, 11, 5, deriv=2))


def test_a_raman_map_with_and_without_a_cut(real_data: Path) -> None:
    arrays = np.load(real_data / "raman_cartilage" / "chondro.npz")
    whole = arrays["wavenumber_cm1"].astype(float)
    assert bad_axis(whole, arrays["cube"].shape[-1], len(whole)) == []
    assert crossing_filters("derivative", derivative, whole, FILTERS) == []
    assert centres_off_grid(BANDS, whole, FILTERS) == []
    cut = whole[(whole < 1350) | (whole > 1490)]  # the range of paraffin
    (crossing,) = crossing_filters("derivative", derivative, cut, FILTERS)
    assert "between 1346 and 1494" in crossing.what
    (off,) = centres_off_grid(BANDS, cut, FILTERS)
    assert "1450, 1395" in off.what


def test_three_points_without_a_label_need_no_ignored_value(real_data: Path) -> None:
    labels = np.load(real_data / "raman_cartilage" / "chondro.npz")["labels"]
    shares = {int(value): float((labels == value).mean()) for value in np.unique(labels)}
    limits = LIMITS["ignored voxels"]
    assert ignored_wrongly(shares, None, 1 - shares[0], False, limits) == []


def test_spectrometers_that_overlap_are_no_axis(real_data: Path) -> None:
    folder = real_data / "hsi_reference_cubes"
    single = loadmat(folder / "an_hsi_image_sub_for_demo.mat")["wavelengths"].ravel().astype(float)
    assert bad_axis(single, 72, 72) == []
    assert len(segments(single)) == 1
    four = loadmat(folder / "a_hsi_img_for_VI_demo.mat")["wavelengths"].ravel().astype(float)
    (finding,) = bad_axis(four, 224, 224)
    assert "3 steps the other way" in finding.measured
    assert [part.start for part in segments(four)] == [0, *(np.flatnonzero(np.diff(four) < 0) + 1).tolist()]
    assert crossing_filters("derivative", derivative, four, FILTERS)
