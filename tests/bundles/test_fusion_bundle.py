"""The fusion bundle as a user runs it: train both kinds of network, evaluate them beside the rules, fuse a new pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from pipelines.cli import main
from pipelines.embedded import pair_cohort
from pipelines.phantoms import head_subject
from pipelines.reports.tables import read_per_case_csv
from pipelines.runner import BUNDLES
from pipelines.training.checkpoints import read_contract
from pipelines.training.fusion_evaluation import MRI_ALONE, ORACLE, method_of
from transforms import FUSION_RULES
from transforms.fusion import ct_display

pytestmark = pytest.mark.slow

BUNDLE = BUNDLES / "head_mri_ct_fusion"
COARSE = ["--spacing", "[4.0,4.0,4.0]", "--patch_size", "[48,56,1]", "--warmup_epochs", "0"]
SMALL = [*COARSE, "--channels", "[8,16,24]"]
AS_THEY_ARE = ["--appearance", "0"]  # so few steps are enough for heads of one kind only

Command = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fusion")


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    """A command of ours on pairs of five subjects at 4 mm; every run in one folder."""
    pair_cohort(folder / "pairs", subjects=5, spacing_mm=(4.0, 4.0, 4.0), seed=6, contrasts=("t1", "flair"))

    def run(name: str, *arguments: str) -> int:
        where = ["--manifest", str(folder / "pairs" / "manifest.json"), "--runs_dir", str(folder / "runs")]
        if name == "train":
            where += ["--cache_dir", str(folder / "cache")]
        return main([name, str(BUNDLE), *where, *arguments])

    return run


def run_folder(folder: Path, name: str) -> Path:
    return folder / "runs" / BUNDLE.name / name


def history(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "record.json").read_text())["outcome"]["history"]


@pytest.fixture(scope="module")
def one_pass(command: Command, folder: Path) -> Path:
    """A network that regresses in one pass, 200 steps; MONAI would call them 8 epochs of 25."""
    epochs = ["--max_epochs", "8", "--steps_per_epoch", "25", "--val_interval", "8", "--learning_rate", "0.002"]
    assert command("train", *SMALL, *epochs, *AS_THEY_ARE, "--schedule", "none", "--run_name", "one_pass") == 0
    return run_folder(folder, "one_pass")


@pytest.fixture(scope="module")
def head(command: Command, folder: Path) -> Path:
    """The weights of a lesion head after five steps: whether it runs, not whether it learns."""
    quick = ["--filters", "[8,16,24]", "--max_epochs", "1", "--steps_per_epoch", "5", "--val_interval", "1"]
    assert command("train", "--config", "train_lesion_head", *COARSE, *quick, "--run_name", "head") == 0
    return run_folder(folder, "head") / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="module")
def diffusion(command: Command, folder: Path, head: Path) -> Path:
    """A diffusion after ten steps, with the lesion head in its loss."""
    quick = ["--max_epochs", "1", "--steps_per_epoch", "10", "--val_interval", "1", "--sampling_steps", "2"]
    chosen = ["--schedule", "cosine", "--prediction", "v", "--preset", "stroke", "--lesion_head", str(head)]
    assert command("train", *SMALL, *quick, *chosen, "--run_name", "diffusion") == 0
    return run_folder(folder, "diffusion")


@pytest.fixture(scope="module")
def evaluated(command: Command, one_pass: Path) -> Path:
    given = ["--run_name", "one_pass", "--method", "one pass", "--severities", "[0,2]"]
    assert command("evaluate", *given) == 0
    return one_pass / "metrics"


def test_it_learns(command: Command, folder: Path, one_pass: Path, evaluated: Path) -> None:
    still = ["--max_epochs", "1", "--steps_per_epoch", "1", "--val_interval", "1", "--learning_rate", "1e-9"]
    assert command("train", *SMALL, *still, *AS_THEY_ARE, "--schedule", "none", "--run_name", "untrained") == 0
    untrained, trained = history(run_folder(folder, "untrained"))[-1], history(one_pass)[-1]
    # An untrained network gives its first guess, the blend of what it is given: that is where learning starts. Losses
    # of single epochs are no measure of it, as every sample is degraded at random.
    assert trained["brain_ssim"] > untrained["brain_ssim"] + 0.03
    assert trained["bone_ssim"] > untrained["bone_ssim"] + 0.01
    assert trained["bone_psnr_db"] > untrained["bone_psnr_db"] + 1
    assert trained["fusion_score"] > untrained["fusion_score"] + 0.02
    rows = {(row["case"], method_of(row)): row for row in read_per_case_csv(evaluated / "per_case.csv")}
    for case in {case for case, _ in rows}:
        ours, mean = rows[case, "one pass"], rows[case, "mean"]
        assert ours["bone_psnr_db"] > mean["bone_psnr_db"] + 1.5
        assert ours["brain_ssim_within"] > mean["brain_ssim_within"]
        if case.endswith("@2"):  # undegraded, the blend is the target
            blend = rows[case, "blend"]
            assert ours["bone_psnr_db"] > blend["bone_psnr_db"] + 0.5
            assert ours["brain_ssim_within"] > blend["brain_ssim_within"] + 0.01


def test_the_evaluation_has_every_rule_at_every_severity(evaluated: Path) -> None:
    rows = read_per_case_csv(evaluated / "per_case.csv")
    assert {method_of(row) for row in rows} == {"one pass", *FUSION_RULES, ORACLE, MRI_ALONE}
    assert len(rows) == 2 * 2 * (1 + len(FUSION_RULES) + 2)  # one subject in two contrasts, twice
    psnr = {row["label"]: row["bone_psnr_db"] for row in rows}
    assert psnr[f"{ORACLE} @0"] == pytest.approx(100, abs=1e-3)
    assert psnr[f"{ORACLE} @2"] < 40  # the masks of the truth over an image that is not clean
    assert list(json.loads((evaluated / "ranks.json").read_text())["severities"]) == ["0", "2"]


def test_a_diffusion_with_a_lesion_term_stands_beside_the_regression(
    command: Command, diffusion: Path, evaluated: Path, head: Path
) -> None:
    contract = read_contract(diffusion / "checkpoints" / "best.safetensors")
    assert (contract["network"], contract["schedule"], contract["prediction"]) == ("denoiser", "cosine", "v")
    losses = history(diffusion)[-1]
    assert np.isfinite([losses[name] for name in ("loss/diffusion", "loss/brain", "loss/bone", "loss/lesion")]).all()
    given = ["--run_name", "diffusion", "--sampling_steps", "2", "--samples", "2", "--severities", "[0,2]"]
    # the other evaluation has no figures of lesions: refused before anything is measured
    assert command("evaluate", *given, "--lesion_head", str(head), "--compare_with", f"['{evaluated}']") == 3
    assert not (diffusion / "metrics" / "per_case.csv").exists()
    assert command("evaluate", *given, "--compare_with", f"['{evaluated}']") == 0
    ranks = json.loads((diffusion / "metrics" / "ranks.json").read_text())["severities"]["2"]["mean_ranks"]
    assert {row["method"] for row in ranks} == {"ours", "one pass", *FUSION_RULES}
    cases = json.loads((diffusion / "metrics" / "uncertainty.json").read_text())["cases"]
    assert len(cases) == 4
    assert min(case["rms_std"] for case in cases) > 0.01


def test_lesions_are_read_from_the_fused_image(
    command: Command, one_pass: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(head.parent)  # paths count from here, not from the bundle
    given = ["--run_name", "one_pass", "--severities", "[1]", "--output_dir", str(tmp_path)]
    assert command("evaluate", *given, "--lesion_head", head.name) == 0
    rows = read_per_case_csv(tmp_path / "metrics" / "per_case.csv")
    assert {"lesion_dice", "lesion_hd95_mm", "lesion_nsd"} <= set(rows[0])
    assert command("evaluate", *given, "--lesion_head", str(one_pass / "checkpoints" / "best.safetensors")) == 4


# ---- fusing new pairs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(folder: Path) -> Path:
    """A new patient at 3 x 3 x 5 mm, stored left-posterior-superior: an MRI, a CT, and no mask."""
    patient = head_subject(77, 0, (3.0, 3.0, 5.0), ["t1", "ct"], clean=True)
    (folder / "scans" / "patient_7").mkdir(parents=True)
    for modality, name in (("t1", "MRI"), ("ct", "CT")):
        image = nib.Nifti1Image(patient.images[modality].astype(np.int16), patient.affine)
        turned = image.as_reoriented(nib.io_orientation(np.diag([-1, -1, 1, 1])))
        nib.save(turned, folder / "scans" / "patient_7" / f"{name}.nii.gz")
    return folder / "scans"


def predict(scans: Path, out: Path, weights: Path, *more: str) -> int:
    given = ["-i", str(scans), "-o", str(out), "--checkpoint", str(weights / "checkpoints" / "best.safetensors")]
    return main(["predict", str(BUNDLE), *given, *more])


def test_a_pair_without_masks_is_fused_on_the_grid_of_its_mri(one_pass: Path, scans: Path, tmp_path: Path) -> None:
    assert predict(scans, tmp_path, one_pass) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"patient_7{end}" for end in (".json", ".png", "_fused.nii.gz")
    ]
    fused, mri, ct = (
        nib.load(path)
        for path in (tmp_path / "patient_7_fused.nii.gz", *(scans / "patient_7" / f"{n}.nii.gz" for n in ("MRI", "CT")))
    )
    assert fused.shape == mri.shape
    assert nib.aff2axcodes(fused.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(fused.affine, mri.affine)
    np.testing.assert_array_equal(fused.get_qform(), mri.get_qform())
    assert fused.get_data_dtype() == np.float32
    image, signal, hounsfield = (np.asarray(each.dataobj, np.float32) for each in (fused, mri, ct))
    assert np.isfinite(image).all()
    shown = np.where(hounsfield > 200, ct_display(hounsfield), signal / np.percentile(signal, 99.5))
    # without the rim of the head, which the coarse grid of the network blurs into the air
    inside = ndimage.binary_erosion(hounsfield > -300, iterations=2)

    def agreement(of: np.ndarray) -> float:
        return float(np.corrcoef(of[inside], shown[inside])[0, 1])

    assert agreement(image) > 0.8
    for axis in range(3):  # it lies as the head lies, not mirrored
        assert agreement(np.flip(image, axis)) < agreement(image) - 0.1


def test_several_samples_leave_a_map_of_uncertainty(diffusion: Path, scans: Path, tmp_path: Path) -> None:
    assert predict(scans, tmp_path, diffusion, "--samples", "2", "--sampling_steps", "2") == 0
    spread = nib.load(tmp_path / "patient_7_uncertainty.nii.gz")
    voxels = np.asarray(spread.dataobj)
    assert voxels.min() >= 0
    assert voxels.max() > 0.01
    np.testing.assert_array_equal(spread.affine, nib.load(tmp_path / "patient_7_fused.nii.gz").affine)


# 26 slices of 6 mm, as in a stroke protocol: a patch that is halved across the slices once, or a stack of five slices.
@pytest.mark.parametrize(
    ("dimensions", "patch", "schedule", "prediction"),
    [("3", "[32,32,16]", "rectified_flow", "x0"), ("2.5", "[32,32,8]", "cosine", "v")],
)
def test_twenty_six_thick_slices(
    dimensions: str, patch: str, schedule: str, prediction: str, tmp_path: Path, scans: Path
) -> None:
    pair_cohort(tmp_path / "pairs", subjects=3, spacing_mm=(4.0, 4.0, 6.0), seed=3, contrasts=("t2",))
    for path in (tmp_path / "pairs").rglob("*.nii.gz"):
        whole = nib.load(path)
        kept = whole.slicer[:, :, 6:32]
        nib.save(nib.Nifti1Image(np.asarray(kept.dataobj).astype(whole.get_data_dtype()), kept.affine), path)
    manifest = str(tmp_path / "thick.json")
    roles = ["--image", "mri={subject}/t2/mri.nii.gz", "--image", "ct={subject}/t2/ct.nii.gz", "--unit", "ct=HU"]
    masks = [word for name in ("brain", "bone") for word in ("--mask", f"{name}={{subject}}/t2/{name}.nii.gz")]
    splits = ["--label", "{subject}/t2/lesion.nii.gz", "--validation", "head_001", "--test", "head_002"]
    names = ["--name", "thick", "-o", manifest]
    assert main(["manifest", "import", "folder", str(tmp_path / "pairs"), *roles, *masks, *splits, *names]) == 0
    where = ["--manifest", manifest, "--runs_dir", str(tmp_path), "--run_name", "r"]
    where += ["--cache_dir", str(tmp_path / "cache"), "--spacing", "[4.0,4.0,6.0]", "--patch_size", patch]
    chosen = ["--dimensions", dimensions, "--schedule", schedule, "--prediction", prediction, "--channels", "[8,16,24]"]
    quick = ["--max_epochs", "1", "--steps_per_epoch", "3", "--val_interval", "1", "--sampling_steps", "2"]
    assert main(["train", str(BUNDLE), *where, *chosen, *quick, "--warmup_epochs", "0", "--batch_size", "2"]) == 0
    run = tmp_path / BUNDLE.name / "r"
    assert np.isfinite(history(run)[-1]["brain_ssim"])
    assert predict(scans, tmp_path / "out", run, "--sampling_steps", "2") == 0
    assert np.isfinite(nib.load(tmp_path / "out" / "patient_7_fused.nii.gz").get_fdata()).all()


def test_what_is_no_pair_is_refused(
    one_pass: Path, head: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = scans / "patient_7"
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "ct.nii.gz").write_bytes((patient / "MRI.nii.gz").read_bytes())
    (tmp_path / "swapped" / "mri.nii.gz").write_bytes((patient / "CT.nii.gz").read_bytes())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "mri.nii.gz").write_bytes((patient / "MRI.nii.gz").read_bytes())
    for name, check, words in (
        ("swapped", "raise", "misregistered"),
        ("swapped", "none", "channel ct: not in Hounsfield units"),
        ("alone", "raise", "modality ct is missing"),
    ):
        assert predict(tmp_path / name, tmp_path / "out", one_pass, "--registration_check", check) == 3
        assert words in capsys.readouterr().err
    assert predict(scans, tmp_path / "out", head.parent.parent) == 4
    assert "weights of another network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_newest_fusion_is_found_beside_a_newer_lesion_head(command: Command, one_pass: Path, head: Path) -> None:
    head.touch()
    assert command("evaluate", "--severities", "[0]", "--output_dir", str(head.parent)) == 0
