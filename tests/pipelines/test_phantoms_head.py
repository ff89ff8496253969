"""The head phantom: contrasts follow the table, a label holds all lesion tissue and no more, files repeat exactly."""

from __future__ import annotations

import hashlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from pipelines.phantoms import anatomy as anatomy_module
from pipelines.phantoms import cohorts as cohorts_module
from pipelines.phantoms import head as head_module
from pipelines.phantoms.anatomy import (
    MAX_ROTATION_DEG,
    MAX_TRANSLATION_MM,
    Anatomy,
    Pose,
    head_anatomy,
    random_pose,
)
from pipelines.phantoms.cohorts import write_head_cohort, write_pair_cohort
from pipelines.phantoms.head import MODALITIES, HeadSubject, head_subject, with_lesions
from pipelines.phantoms.lesions import LesionPrior, draw_lesion_load, random_lesions
from pipelines.phantoms.signal import (
    FLAIR_TE_MS,
    FLAIR_TR_MS,
    TISSUES,
    Tissue,
    bias_field,
    inversion_recovery,
    nulling_inversion_time,
    rician_noise,
    spin_echo,
    spoiled_gradient_echo,
    tissue_image,
    tissue_signal,
    varied_tissues,
)
from transforms.errors import ResourceError, UsageError

COARSE = (4.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def mni() -> Anatomy:
    pytest.importorskip("nilearn")
    return head_anatomy(COARSE, "mni152")


@pytest.fixture(scope="module")
def ellipsoid() -> Anatomy:
    return head_anatomy(COARSE, "ellipsoid")


@pytest.fixture(scope="module")
def subject() -> HeadSubject:
    return head_subject(0, 2, COARSE)


def pure(anatomy: Anatomy, tissue: str) -> np.ndarray:
    return anatomy.fractions[tissue] > 0.9


def reaches_border(start: np.ndarray, wall: np.ndarray) -> bool:
    """Whether a path of face neighbours leads from ``start`` to the border of the image without crossing ``wall``."""
    regions, _ = ndimage.label(~wall)
    border = np.concatenate([regions.take(i, axis).ravel() for axis in range(3) for i in (0, -1)])
    return bool(np.intersect1d(regions[start & ~wall], border[border > 0]).size)


# --- anatomy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mni", "ellipsoid"])
def test_fractions_are_a_partition_and_the_head_stands_in_air(source: str, request: pytest.FixtureRequest) -> None:
    head: Anatomy = request.getfixturevalue(source)
    total = sum(head.fractions.values())
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert min(f.min() for f in head.fractions.values()) >= 0
    air = head.fractions["air"]
    assert all(air.take(i, axis).min() == 1 for axis in range(3) for i in (0, -1))


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_head_fits_the_field_of_view_in_the_largest_pose(signs: tuple[int, int, int], mni: Anatomy) -> None:
    angles = tuple(MAX_ROTATION_DEG * s for s in signs)
    shifts = tuple(MAX_TRANSLATION_MM * s for s in signs)
    air = head_anatomy(COARSE, "mni152", Pose(angles, shifts)).fractions["air"]  # type: ignore[arg-type]
    assert all(air.take(i, axis).min() > 0.99 for axis in range(3) for i in (0, -1))


@pytest.mark.parametrize("source", ["mni", "ellipsoid"])
def test_skull_is_a_closed_shell_around_the_brain(source: str, request: pytest.FixtureRequest) -> None:
    head: Anatomy = request.getfixturevalue(source)
    assert not (head.brain & head.bone).any()
    assert not reaches_border(head.brain, head.bone)
    # Planted failure: one hole drilled through the vault opens it.
    drilled = head.bone.copy()
    x, y, _ = (round(c) for c in ndimage.center_of_mass(head.brain))
    drilled[x, y, head.brain[x, y].nonzero()[0].max() :] = False
    assert reaches_border(head.brain, drilled)


def test_mni_brain_has_the_volume_and_the_place_of_nilearns_template_at_anisotropic_spacing() -> None:
    datasets = pytest.importorskip("nilearn.datasets")
    template = datasets.load_mni152_template(resolution=1)
    reference = template.get_fdata() > 0
    spacing = (1.5, 2.0, 3.0)
    head = head_anatomy(spacing, "mni152")
    np.testing.assert_array_equal(nib.affines.voxel_sizes(head.affine), spacing)
    assert head.spacing_mm == spacing
    assert head.voxel_volume_ml == pytest.approx(0.009)
    assert head.brain.sum() * 0.009 == pytest.approx(reference.sum() / 1000, rel=0.01)
    centres = [
        nib.affines.apply_affine(affine, ndimage.center_of_mass(mask))
        for affine, mask in ((head.affine, head.brain), (template.affine, reference))
    ]
    np.testing.assert_allclose(*centres, atol=0.3)


def test_translation_by_one_voxel_is_a_shift_by_one_voxel(ellipsoid: Anatomy) -> None:
    moved = head_anatomy(COARSE, "ellipsoid", Pose(translation_mm=(4.0, 0.0, -4.0)))
    for tissue, fraction in ellipsoid.fractions.items():
        np.testing.assert_allclose(moved.fractions[tissue], np.roll(fraction, (1, 0, -1), (0, 1, 2)), atol=1e-4)


def test_rotation_turns_the_long_axis_of_the_brain_by_its_angle(ellipsoid: Anatomy) -> None:
    # The ellipsoid is longest along y; +5 degrees about z carry +y towards -x.
    def long_axis_deg(head: Anatomy) -> float:
        points = np.argwhere(head.brain)[:, :2]
        x, y = np.linalg.eigh(np.cov(points.T))[1][:, -1]
        return float(np.degrees(np.arctan2(-x * np.sign(y), abs(y))))

    turned = head_anatomy(COARSE, "ellipsoid", Pose(rotation_deg=(0.0, 0.0, 5.0)))
    assert long_axis_deg(ellipsoid) == pytest.approx(0, abs=0.2)
    assert long_axis_deg(turned) == pytest.approx(5, abs=0.5)


def test_poses_stay_within_their_bounds() -> None:
    rng = np.random.default_rng(0)
    poses = [random_pose(rng) for _ in range(100)]
    angles, shifts = (np.abs([getattr(p, f) for p in poses]) for f in ("rotation_deg", "translation_mm"))
    assert 0.9 * MAX_ROTATION_DEG < angles.max() <= MAX_ROTATION_DEG
    assert 0.9 * MAX_TRANSLATION_MM < shifts.max() <= MAX_TRANSLATION_MM


def test_without_skull_only_the_brain_is_left() -> None:
    bare = head_anatomy(COARSE, "ellipsoid", skull=False)
    assert not bare.bone.any()
    outside = sum(bare.fractions[t] for t in ("csf", "grey", "white")) == 0
    assert (bare.fractions["air"][outside] == 1).all()
    assert bare.brain.any()


@pytest.mark.parametrize("spacing", [(4.0, 4.0), (0.1, 4.0, 4.0), (4.0, 4.0, 7.0), (4.0, float("nan"), 4.0)])
def test_senseless_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="spacing_mm"):
        head_anatomy(spacing, "ellipsoid")


def test_ellipsoid_takes_over_without_nilearn_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.warns(UserWarning, match="nilearn is not installed"):
        made = head_subject(0, 0, COARSE, source="auto")
    assert made.source == "ellipsoid"
    assert made.lesion.any()
    with pytest.raises(UsageError, match="demo"):
        head_anatomy(COARSE, "mni152")
    with pytest.raises(UsageError, match="colin27"):
        head_anatomy(COARSE, "colin27")


# --- signal ----------------------------------------------------------------------------------------------------------


def test_signal_equations_at_hand_derivable_points() -> None:
    # TR = T1 ln 2 recovers half; TE = T2 ln 2 decays to half; a 90 degree pulse makes the gradient echo 1 - E.
    tissue = Tissue(t1_ms=1000, t2_ms=100, proton_density=0.8, hu=0)
    half = np.log(2)
    assert spin_echo(tissue, 1000 * half, 100 * half) == pytest.approx(0.8 * 0.5 * 0.5)
    assert spoiled_gradient_echo(tissue, 1000 * half, 90) == pytest.approx(0.8 * 0.5)
    # 60 degrees: sin = sqrt(3)/2, 1 - cos * E = 1 - 1/4.
    assert spoiled_gradient_echo(tissue, 1000 * half, 60) == pytest.approx(0.8 * np.sqrt(3) / 2 * 0.5 / 0.75)
    # Endless TR: null at TI = T1 ln 2, full inversion at TI = 0.
    assert inversion_recovery(tissue, 1e6, 0, 1000 * half) == pytest.approx(0, abs=1e-12)
    assert inversion_recovery(tissue, 1e6, 0, 0) == pytest.approx(-0.8)


def test_flair_nulls_the_fluid_of_the_table() -> None:
    csf = TISSUES["csf"]
    ti_ms = nulling_inversion_time(csf.t1_ms, FLAIR_TR_MS)
    assert inversion_recovery(csf, FLAIR_TR_MS, FLAIR_TE_MS, ti_ms) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("modality", "brightest_first"),
    [
        ("t1", ("fat", "white", "grey", "lesion", "csf", "cortical_bone")),
        ("t2", ("csf", "lesion", "grey", "white", "cortical_bone")),
        ("flair", ("lesion", "grey", "white", "csf")),
        ("ct", ("cortical_bone", "diploe", "grey", "white", "lesion", "csf", "fat", "air")),
    ],
)
def test_contrast_of_the_table_is_that_of_the_modality(modality: str, brightest_first: tuple[str, ...]) -> None:
    signals = [tissue_signal(modality, TISSUES[tissue]) for tissue in brightest_first]
    assert all(a > b for a, b in pairwise(signals)), signals


@pytest.mark.parametrize("modality", MODALITIES)
def test_images_of_a_subject_show_the_contrast_of_the_table(modality: str, mni: Anatomy) -> None:
    head = with_lesions(mni, random_lesions(mni, np.random.default_rng(0), 10.0))
    made = head_module._image(modality, head, varied_tissues(np.random.default_rng(1)), np.random.default_rng(2), False)
    ventricles = pure(head, "csf") & ndimage.binary_erosion(head.brain, iterations=4)
    regions = {"csf": ventricles, "grey": pure(head, "grey"), "white": pure(head, "white")}
    regions["lesion"] = head.fractions["lesion"] > 0.7
    measured = {name: float(np.median(made[mask])) for name, mask in regions.items()}
    expected = {name: tissue_signal(modality, TISSUES[name]) for name in measured}
    if modality == "t1":  # Half-filled lesion voxels and grey matter overlap in T1: only the table separates them.
        measured.pop("lesion")
    assert sorted(measured, key=measured.__getitem__) == sorted(measured, key=expected.__getitem__), measured


def test_tissues_vary_a_little_and_air_does_not() -> None:
    draws = [varied_tissues(np.random.default_rng(seed)) for seed in range(200)]
    ratios = np.array([d["white"].t1_ms / TISSUES["white"].t1_ms for d in draws])
    assert ratios.mean() == pytest.approx(1, abs=0.005)
    assert ratios.std() == pytest.approx(0.015, rel=0.2)
    assert all(d["air"] == TISSUES["air"] for d in draws)


@pytest.mark.parametrize("seed", range(3))
def test_bias_field_is_smooth_positive_and_has_mean_one(seed: int, ellipsoid: Anatomy) -> None:
    field = bias_field(ellipsoid.brain, np.random.default_rng(seed), amplitude=0.2)
    inside = field[ellipsoid.brain]
    assert field.min() > 0
    assert inside.mean() == pytest.approx(1)
    assert inside.max() / inside.min() == pytest.approx(1.2**2)
    # At most one period per field of view: neighbours 4 mm apart differ by a few percent at most.
    assert max(np.abs(np.diff(np.log(field), axis=axis)).max() for axis in range(3)) < 0.06
    # Planted failure: a field that is noise is not smooth.
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, field.shape)
    assert np.abs(np.diff(np.log(noise), axis=0)).max() > 0.06


def test_rician_noise_is_rayleigh_in_air_and_gaussian_at_high_signal() -> None:
    rng = np.random.default_rng(0)
    air = rician_noise(np.zeros((60, 60, 60)), 5.0, rng)
    assert air.mean() == pytest.approx(5 * np.sqrt(np.pi / 2), rel=0.01)
    assert air.std() == pytest.approx(5 * np.sqrt(2 - np.pi / 2), rel=0.01)
    tissue = rician_noise(np.full((60, 60, 60), 500.0), 5.0, rng)
    assert tissue.std() == pytest.approx(5, rel=0.01)
    assert tissue.mean() == pytest.approx(500 + 25 / 1000, abs=0.05)  # s + sigma^2 / 2s


def test_air_of_an_mr_image_has_the_rayleigh_ratio_of_spread_to_mean(subject: HeadSubject) -> None:
    air = np.concatenate([subject.images["flair"].take(i, axis).ravel() for axis in range(3) for i in (0, -1)])
    assert air.std() / air.mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.03)


def test_ct_is_in_hounsfield_units(subject: HeadSubject) -> None:
    ct = subject.images["ct"]
    assert ct[0].mean() == pytest.approx(-1000, abs=2)
    brain = ndimage.binary_erosion(subject.brain, iterations=3)
    assert 20 < ct[brain].mean() < 45
    assert 400 < ct[subject.bone > 0].mean() < 1200
    assert ct[subject.bone > 0].min() > 100
    assert ct.min() >= -1024
    assert ct.max() <= 3071


# --- lesions ---------------------------------------------------------------------------------------------------------


def test_lesion_load_is_log_normal_with_median_two_ml() -> None:
    rng = np.random.default_rng(0)
    loads = np.array([draw_lesion_load(rng) for _ in range(200)])
    # Standard error of the median of ln(load) is 1.25 / sqrt(200) = 0.09.
    assert np.log(np.median(loads)) == pytest.approx(np.log(2), abs=0.25)
    assert np.log(loads).std() == pytest.approx(1, abs=0.15)
    assert loads.min() >= 0.2
    assert loads.max() <= 20
    large = [draw_lesion_load(rng, LesionPrior(median_ml=30.0, largest_ml=60.0)) for _ in range(200)]
    assert np.median(large) == pytest.approx(30, rel=0.25)
    assert max(large) == 60


@pytest.mark.parametrize("spacing", [COARSE, (2.0, 2.0, 5.0)])
@pytest.mark.parametrize("volume_ml", [0.5, 2.0, 12.0])
def test_lesions_have_the_volume_asked_for_and_lie_in_white_matter(
    spacing: tuple[float, float, float], volume_ml: float
) -> None:
    head = head_anatomy(spacing, "auto")
    for seed in range(3):
        label = random_lesions(head, np.random.default_rng(seed), volume_ml) > 0.5
        assert label.sum() * head.voxel_volume_ml == pytest.approx(volume_ml, abs=0.51 * head.voxel_volume_ml)
        assert head.brain[label].all()
        assert head.fractions["csf"][label].max() < 0.2
        assert head.fractions["white"][label].mean() > 0.6


def test_lesions_are_few_compact_blobs_and_not_dust() -> None:
    head = head_anatomy((2.0, 2.0, 2.0), "ellipsoid")
    for seed in range(4):
        label = random_lesions(head, np.random.default_rng(seed), 4.0) > 0.5
        blobs, count = ndimage.label(label, np.ones((3, 3, 3)))
        sizes = np.bincount(blobs.ravel())[1:]
        assert count <= 20
        assert sizes[sizes >= 4].sum() > 0.95 * label.sum()


def test_label_holds_all_lesion_tissue_and_nothing_else(ellipsoid: Anatomy) -> None:
    fraction = random_lesions(ellipsoid, np.random.default_rng(3), 5.0)
    label = fraction > 0.5
    np.testing.assert_array_equal(label, fraction > 0)
    diseased = with_lesions(ellipsoid, fraction)
    np.testing.assert_allclose(sum(diseased.fractions.values()), 1, atol=1e-5)
    signals = {name: tissue_signal("flair", tissue) for name, tissue in TISSUES.items()}
    change = tissue_image(diseased.fractions, signals) - tissue_image(ellipsoid.fractions, signals)
    np.testing.assert_array_equal(np.abs(change) > 1e-6, label)
    assert (change[label] > 0).all()
    # Planted failure: a label one voxel off is not the set of changed voxels.
    assert (np.roll(label, 1, 0) != (np.abs(change) > 1e-6)).any()


def test_subject_carries_the_label_of_the_lesions_that_its_images_show(subject: HeadSubject) -> None:
    lesion = subject.lesion > 0
    shell = ndimage.binary_dilation(lesion, iterations=2) & ~lesion & (subject.brain > 0)
    flair = subject.images["flair"]
    assert np.median(flair[lesion]) > 1.25 * np.median(flair[shell])
    assert subject.lesion_volume_ml == pytest.approx(lesion.sum() * 0.064)
    assert 0.1 < subject.lesion_volume_ml <= 20.2


def test_faint_lesions_are_darker_in_flair_and_lie_where_bright_ones_would() -> None:
    def subject(low: float, high: float) -> HeadSubject:
        return head_subject(5, 0, COARSE, ["flair"], "ellipsoid", lesions=LesionPrior(t2_ms=(low, high)))

    bright, faint = subject(150, 150), subject(95, 95)
    label = bright.lesion > 0
    np.testing.assert_array_equal(faint.lesion, bright.lesion)
    np.testing.assert_array_equal(faint.images["flair"][~label], bright.images["flair"][~label])
    # FLAIR of a lesion is in proportion to exp(-TE / T2), with TE = 120 ms: exp(-120 / 95) / exp(-120 / 150) = 0.63.
    # A fifth of a lesion's voxel is white matter on average, which brings the ratio a little towards 1.
    ratio = np.median(faint.images["flair"][label] / bright.images["flair"][label])
    assert 0.6 < ratio < 0.8
    assert subject(90, 150).images["flair"][label].mean() < bright.images["flair"][label].mean()


@pytest.mark.parametrize(
    "wrong", [{"median_ml": 0.0}, {"median_ml": 30.0}, {"largest_ml": 0.1, "median_ml": 0.05}, {"t2_ms": (100.0, 90.0)}]
)
def test_lesion_prior_that_means_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="lesion"):
        LesionPrior(**wrong)


@pytest.mark.parametrize("volume_ml", [0.0, 0.01, 2000.0])
def test_lesion_volume_that_the_grid_cannot_hold_is_refused(ellipsoid: Anatomy, volume_ml: float) -> None:
    with pytest.raises(UsageError, match="lesion volume"):
        random_lesions(ellipsoid, np.random.default_rng(0), volume_ml)


# --- subjects and cohorts --------------------------------------------------------------------------------------------


def test_same_seed_and_index_give_the_same_bits(subject: HeadSubject) -> None:
    again = head_subject(0, 2, COARSE)
    for modality in MODALITIES:
        assert subject.images[modality].dtype == np.float32
        assert subject.images[modality].tobytes() == again.images[modality].tobytes()
    assert subject.lesion.tobytes() == again.lesion.tobytes()
    for other in (head_subject(1, 2, COARSE, ["t1"]), head_subject(0, 3, COARSE, ["t1"])):
        assert (other.images["t1"] != subject.images["t1"]).mean() > 0.5
        assert (other.lesion != subject.lesion).any()


def test_a_modality_does_not_depend_on_what_is_made_beside_it(subject: HeadSubject) -> None:
    alone = head_subject(0, 2, COARSE, ["t2"])
    assert list(alone.images) == ["t2"]
    np.testing.assert_array_equal(alone.images["t2"], subject.images["t2"])
    np.testing.assert_array_equal(alone.lesion, subject.lesion)


def test_subjects_differ_in_gain_so_that_normalisation_matters() -> None:
    whites = []
    for index in range(5):
        made = head_subject(0, index, COARSE, ["t1"], "ellipsoid")
        whites.append(np.percentile(made.images["t1"][made.brain > 0], 70))
    assert max(whites) / min(whites) > 1.15


@pytest.mark.parametrize(
    ("seed", "index", "modalities"),
    [(-1, 0, ["t1"]), (0, -1, ["t1"]), (0, 0, []), (0, 0, ["t1", "t1"]), (0, 0, ["pet"])],
)
def test_senseless_subject_is_refused(seed: int, index: int, modalities: list[str]) -> None:
    with pytest.raises(UsageError):
        head_subject(seed, index, COARSE, modalities, "ellipsoid")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_cohort_files_hold_the_arrays_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    spacing, modalities = (4.0, 3.0, 5.0), ("flair", "ct")
    calls: list[tuple[int, int]] = []
    options = {"subjects": 2, "spacing_mm": spacing, "seed": 7, "modalities": modalities, "source": "ellipsoid"}
    folders = write_head_cohort(tmp_path / "a", **options, progress=lambda *done: calls.append(done))  # type: ignore[arg-type]
    assert folders == [tmp_path / "a" / "head_000", tmp_path / "a" / "head_001"]
    assert calls == [(1, 2), (2, 2)]
    assert sorted(p.name for p in folders[1].iterdir()) == sorted(
        f"{name}.nii.gz" for name in ("flair", "ct", "lesion", "brain", "bone")
    )
    made = head_subject(7, 1, spacing, modalities, "ellipsoid")
    arrays = {**made.images, "lesion": made.lesion, "brain": made.brain, "bone": made.bone}
    for name, array in arrays.items():
        image = nib.load(folders[1] / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), array)
        np.testing.assert_allclose(image.affine, made.affine, atol=1e-5)
        assert image.header.get_zooms() == spacing
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.get_data_dtype() == (np.int16 if name in modalities else np.uint8)
    write_head_cohort(tmp_path / "b", **options)  # type: ignore[arg-type]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_cohort_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(UsageError, match="not an empty folder"):
            write_head_cohort(target, 1, COARSE, source="ellipsoid")
    with pytest.raises(UsageError, match="at least one"):
        write_head_cohort(tmp_path / "none", 0, COARSE, source="ellipsoid")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_cohort_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    assert write_head_cohort(tmp_path / "cohort", 1, COARSE, modalities=["t1"], source="ellipsoid")[0].is_dir()


def test_nothing_is_left_when_a_subject_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = cohorts_module.write_volumes

    def full_disk(folder: Path, *content: Any) -> None:
        if folder.name == "head_001":
            raise OSError(28, "No space left on device")
        write(folder, *content)

    monkeypatch.setattr(cohorts_module, "write_volumes", full_disk)
    with pytest.raises(ResourceError, match="No space left"):
        write_head_cohort(tmp_path / "cohort", 2, COARSE, modalities=["t1"], source="ellipsoid")
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_clean_and_hold_the_same_ct(tmp_path: Path) -> None:
    """One folder per contrast; without noise the same tissue has the same value everywhere."""
    (folder,) = write_pair_cohort(tmp_path / "pairs", 1, COARSE, contrasts=["t1", "flair"], source="ellipsoid")
    assert sorted(p.name for p in folder.iterdir()) == ["flair", "t1"]
    assert (folder / "t1" / "ct.nii.gz").read_bytes() == (folder / "flair" / "ct.nii.gz").read_bytes()
    ct, mri, brain = (np.asarray(nib.load(folder / "t1" / f"{n}.nii.gz").dataobj) for n in ("ct", "mri", "brain"))
    air = ct == -1000
    assert air.mean() > 0.3
    assert not mri[air].any()
    noisy = head_subject(0, 0, COARSE, ["t1"], "ellipsoid").images["t1"]
    assert np.corrcoef(mri[brain > 0], noisy[brain > 0])[0, 1] > 0.9
    assert not np.array_equal(mri, noisy)


def test_a_pair_has_one_ct(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ct is there in every pair"):
        write_pair_cohort(tmp_path / "pairs", 1, COARSE, contrasts=["t1", "ct"])


def test_pose_is_applied_to_the_anatomy_before_the_lesions(monkeypatch: pytest.MonkeyPatch) -> None:
    resampled: list[np.ndarray] = []
    sample = anatomy_module._sample

    def spy(array: np.ndarray, *rest: object) -> np.ndarray:
        resampled.append(array)
        return sample(array, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(anatomy_module, "_sample", spy)
    head_subject(0, 0, COARSE, ["t1"], "ellipsoid")
    assert len(resampled) == 5  # Three tissues and two distances, each once; nothing that holds a lesion.
