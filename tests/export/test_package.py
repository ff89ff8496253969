"""An export from end to end: what is in it, what never is, that it repeats byte for byte, and what stops it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from bundle_runs import BUNDLE
from bundles_for_export import Exported

from pipelines.cli import main
from pipelines.export.archive import read_archive
from pipelines.export.package import REQUIRED, refuse_incomplete, with_weights
from pipelines.export.verify import verify
from pipelines.export.wheel import build_wheel
from pipelines.manifests import load_manifest
from pipelines.runner import BUNDLES
from pipelines.training.checkpoints import read_contract
from transforms.errors import BundleError

ROOT = BUNDLES.parent
NAMES = ("Meier01", "Kowalska02", "Okafor03")


def test_the_archive_passes_verify_and_names_its_maker(exported: Exported) -> None:
    verified = verify(exported.archive, exported.keys / "allowed")
    assert verified.signer == "maker@hospital"
    assert verify(exported.folder, exported.keys / "allowed").files == verified.files


def test_it_holds_every_part_that_is_promised(exported: Exported) -> None:
    names = set(read_archive(exported.archive))
    assert set(REQUIRED) <= names
    assert {"results/summary.json", "results/per_case.csv", "results/report.html", "SHA256SUMS.sig"} <= names
    assert [name for name in names if name.startswith("wheels/")] == ["wheels/fiducial-0.1.0-py3-none-any.whl"]
    # and nothing that only its maker can use
    assert not [name for name in names if name.endswith((".pt", ".pkl")) or "export.yaml" in name]


def test_the_weights_are_those_of_the_run_and_the_configuration_uses_them(exported: Exported) -> None:
    files = read_archive(exported.archive)
    assert files["models/model.safetensors"] == (exported.run / "checkpoints" / "best.safetensors").read_bytes()
    for name in ("inference", "evaluate"):
        config = yaml.safe_load(files[f"configs/{name}.yaml"])
        assert (config["checkpoint"], config["manifest"]) == ("models/model.safetensors", "")
    own = yaml.safe_load((BUNDLE / "configs" / "inference.yaml").read_text())
    assert own == {**config_of(files, "inference"), "checkpoint": "", "manifest": own["manifest"]}


def config_of(files: dict[str, bytes], name: str) -> dict[str, object]:
    return dict(yaml.safe_load(files[f"configs/{name}.yaml"]))


def test_the_metadata_say_what_these_weights_take(exported: Exported) -> None:
    metadata = json.loads(read_archive(exported.archive)["configs/metadata.json"])
    contract = read_contract(exported.folder / "models" / "model.safetensors")
    image = metadata["network_data_format"]["inputs"]["image"]
    assert image["channel_def"] == {"0": "flair", "1": "t1"}
    assert image["num_channels"] == len(contract["modalities"]) == 2
    assert image["spatial_shape"] == [16, 16, 16]
    summary = json.loads((exported.run / "metrics" / "summary.json").read_text())
    assert metadata["eval_metrics"]["lesion dice"] == summary["labels"]["lesion"]["dice"]["mean"]
    assert metadata["pytorch_version"] == "2.13.0"


def test_no_patient_and_no_path_leaves_with_it(exported: Exported) -> None:
    files = read_archive(exported.archive)
    for name, content in files.items():
        for forbidden in (*NAMES, str(exported.run.parents[2]), str(ROOT), str(Path.home()) + "/"):
            assert forbidden.encode() not in content, f"{name} holds {forbidden}"
            assert forbidden not in name


def test_who_has_the_cohort_can_prove_which_case_was_in_which_split(exported: Exported) -> None:
    cohort = json.loads(read_archive(exported.archive)["provenance/cohort.json"])
    manifest = load_manifest(exported.run.parents[2] / "data" / "manifest.json")
    assert cohort["manifest_digest"] == manifest.digest
    assert {split: own["cases"] for split, own in cohort["splits"].items()} == {"train": 1, "validation": 1, "test": 1}
    digest = hashlib.sha256(f"{manifest.digest}\0case\0Okafor03".encode()).hexdigest()[:12]
    assert cohort["splits"]["test"]["case_digests"] == [f"case-{digest}"]
    (row,) = csv.DictReader(io.StringIO(read_archive(exported.archive)["results/per_case.csv"].decode()))
    assert row["case"] == f"case-{digest}"


def test_the_numbers_are_those_of_the_run(exported: Exported) -> None:
    files = read_archive(exported.archive)
    assert json.loads(files["results/summary.json"]) == json.loads((exported.run / "metrics/summary.json").read_text())
    record = json.loads((exported.run / "record.json").read_text())
    travelling = json.loads(files["provenance/run.json"])
    for key in ("commit", "code_digest", "seed", "versions", "manifest_digest", "contract", "outcome", "machine"):
        assert travelling[key] == record[key]
    assert travelling["preflight"]["acknowledged"] == {"R10": "three small boxes"}
    assert "manifest" not in travelling


def test_one_flipped_bit_anywhere_is_found(exported: Exported, tmp_path: Path) -> None:
    content = exported.archive.read_bytes()
    spoilt = tmp_path / "lesion.zip"
    for position in range(7, len(content), len(content) // 12):
        spoilt.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert main(["verify", str(spoilt), "--allowed_signers", str(exported.keys / "allowed")]) == 3


def test_verify_unpacks_what_has_passed_and_nothing_else(exported: Exported, tmp_path: Path) -> None:
    allowed = ["--allowed_signers", str(exported.keys / "allowed")]
    assert main(["verify", str(exported.archive), *allowed, "--unpack", str(tmp_path / "here")]) == 0
    for path in exported.folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "here" / path.relative_to(exported.folder)).read_bytes() == path.read_bytes()
    assert main(["verify", str(exported.archive), *allowed, "--unpack", str(tmp_path / "here")]) == 2
    (tmp_path / "here" / "configs" / "inference.yaml").write_text("run: [$print(1)]\n")
    assert main(["verify", str(tmp_path / "here"), *allowed, "--unpack", str(tmp_path / "there")]) == 3
    assert not (tmp_path / "there").exists()


@pytest.mark.slow
def test_two_checkouts_export_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    """The same run, exported by two copies of the repository in other places, times and file modes."""
    archives = []
    for name, mask in (("first", 0o022), ("second", 0o077)):
        checkout = tmp_path / name / "repository"
        for part in ("pipelines", "transforms", "bundles", "docs", "locks"):
            shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / part, checkout / part)
        for path in checkout.rglob("*"):
            path.chmod(0o777 & ~mask if path.is_dir() else 0o666 & ~mask)
            os.utime(path, (1e9 + mask, 1e9 + mask))
        out = tmp_path / name / "lesion.zip"
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "export", str(exported.run), "-o", str(out)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(len(archives) + 1)},
            capture_output=True,
            text=True,
            umask=mask,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        archives.append(out.read_bytes())
    assert archives[0] == archives[1]
    ours = {name: content for name, content in read_archive(exported.archive).items() if "SHA256SUMS" not in name}
    assert {name: read_archive(tmp_path / "first" / "lesion.zip")[name] for name in ours} == ours


def test_the_wheel_is_the_code_and_its_bytes_follow_from_it(exported: Exported) -> None:
    files = read_archive(exported.archive)
    wheel = build_wheel(ROOT)
    assert files[f"wheels/{wheel.name}"] == wheel.content
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        names = set(archive.namelist())
        assert archive.read("pipelines/cli.py") == (ROOT / "pipelines" / "cli.py").read_bytes()
    for package in ("pipelines", "transforms"):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
    # what the code reads beside itself
    beside = {"pipelines/manifests/schema.json", "pipelines/export/templates/card.md.j2", "transforms/__init__.pyi"}
    assert beside <= names


def test_a_wheel_is_made_of_a_checkout_alone(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    with pytest.raises(BundleError, match=r"transforms, pyproject\.toml"):
        build_wheel(tmp_path)


# ---- what stops an export ------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt_run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / BUNDLE.name / "r"))


def test_a_run_that_nobody_measured_is_refused_by_name(
    spoilt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spoilt_run / "metrics" / "summary.json").unlink()
    assert main(["export", str(spoilt_run), "-o", str(tmp_path / "x.zip")]) == 4
    assert "R42: metrics/summary.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()
    assert not (tmp_path / "x").exists()


def test_results_of_other_weights_are_refused(
    spoilt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = spoilt_run / "checkpoints" / "last.safetensors"
    summary = json.loads((spoilt_run / "metrics" / "summary.json").read_text())
    summary["source"]["weights_sha256"] = hashlib.sha256(last.read_bytes() + b"1").hexdigest()
    (spoilt_run / "metrics" / "summary.json").write_text(json.dumps(summary))
    assert main(["export", str(spoilt_run), "-o", str(tmp_path / "x.zip")]) == 4
    assert "of other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda run: (run / "record.json").unlink(), 4, "record.json"),
        (lambda run: (run / "config.yaml").unlink(), 4, "config.yaml"),
        (lambda run: [path.unlink() for path in (run / "checkpoints").glob("*.safetensors")], 4, "no weights"),
        (lambda run: [path.unlink() for path in (run / "tensorboard").iterdir()], 4, "tensorboard"),
        (lambda run: edit(run, "outcome", None), 4, "not finished"),
        (lambda run: edit(run, "manifest", "/nowhere/manifest.json"), 2, "--manifest"),
        (lambda run: edit(run, "manifest_digest", "0" * 64), 2, "another cohort"),
    ],
)
def test_a_run_that_lacks_something_is_refused_by_name(
    spoilt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, code: int, said: str
) -> None:
    assert callable(spoil)
    spoil(spoilt_run)
    assert main(["export", str(spoilt_run), "-o", str(tmp_path / "x.zip")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


def edit(run: Path, key: str, value: object) -> None:
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps({**record, key: value}))


def test_nothing_is_overwritten(exported: Exported, tmp_path: Path) -> None:
    before = exported.archive.read_bytes()
    assert main(["export", str(exported.run), "-o", str(exported.archive)]) == 2
    assert exported.archive.read_bytes() == before
    assert main(["export", str(exported.run), "-o", str(tmp_path / "no_archive")]) == 2


@pytest.mark.parametrize("missing", ["LICENSE", "golden/golden.json", "locks/cuda.txt", "models/model.onnx"])
def test_a_missing_part_is_named(exported: Exported, missing: str) -> None:
    names = [*read_archive(exported.archive), "models/model.onnx", "models/parity.json"]
    refuse_incomplete(names, ["onnx"], True)
    with pytest.raises(BundleError, match=f"R42: the export lacks {missing}"):
        refuse_incomplete([name for name in names if name != missing], ["onnx"], True)


def test_a_wheel_and_a_golden_case_must_be_there(exported: Exported) -> None:
    names = list(read_archive(exported.archive))
    for part in ("wheels/", "golden/input/", "golden/expected/"):
        with pytest.raises(BundleError, match=part):
            refuse_incomplete([name for name in names if not name.startswith(part)], [], True)


def test_weights_can_only_be_named_where_there_is_an_option_for_them() -> None:
    text = "manifest: ../../a.json  # the cohort\ncheckpoint: ''  # weights\n"
    changed = "manifest: ''  # the cohort\ncheckpoint: models/model.safetensors  # weights\n"
    assert with_weights(text, "inference.yaml") == changed
    with pytest.raises(BundleError, match=r"inference\.yaml"):
        with_weights("manifest: a\n", "inference.yaml")
