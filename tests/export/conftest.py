"""A run of a tiny network on tiny data, trained, evaluated and exported once for all tests of exports."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from bundles_for_export import Exported, new_key

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundles"))

from bundle_runs import BUNDLE, train, write_tiny_data

from pipelines.cli import main


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three subjects whose names could be a patient's, evaluated on one of them."""
    folder = tmp_path_factory.mktemp("tiny")
    data = folder / "data"
    write_tiny_data(data)
    for before, after in (("a", "Meier01"), ("b", "Kowalska02"), ("c", "Okafor03")):
        (data / before).rename(data / after)
    words = ["--image", "flair={subject}/flair.nii.gz", "--image", "t1={subject}/t1.nii.gz"]
    words += ["--label", "{subject}/lesion.nii.gz", "--name", "small", "--licence", "CC0", "--source", "made by a test"]
    words += ["--validation", "Kowalska02", "--test", "Okafor03", "-o", str(data / "manifest.json")]
    assert main(["manifest", "import", "folder", str(data), *words]) == 0
    assert train(data, "--acknowledge", "['R10: three small boxes']") == 0
    given = ["--manifest", str(data / "manifest.json"), "--runs_dir", str(folder / "runs"), "--run_name", "r"]
    assert main(["evaluate", str(BUNDLE), *given]) == 0
    return folder / "runs" / BUNDLE.name / "r"


@pytest.fixture(scope="session")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny run as a signed archive."""
    folder = tmp_path_factory.mktemp("exported")
    key = new_key(folder)
    assert main(["export", str(tiny_run), "-o", str(folder / "lesion.zip"), "--key", str(key)]) == 0
    return Exported(tiny_run, folder / "lesion.zip", folder / "lesion", folder)


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """The exported folder, to be spoilt."""
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))
