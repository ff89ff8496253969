"""``fiducial check`` as a user meets it: a table, two files, an exit code, whatever the cohort is like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.manifests import Manifest
from pipelines.preflight import Battery, CannotRun, Finding, Inspection, Rule
from pipelines.preflight import check as check_module
from pipelines.preflight.battery import Outcome
from pipelines.preflight.check import JSON_NAME, PAGE_NAME, exit_code, plain, table

QUICK = ["--spacing", "[3.0,3.0,3.0]", "--patch_size", "[16,16,16]", "--filters", "[4,8,8]", "--precision", "fp32"]


def finding(rule: str, severity: Any = "error", source: Any = "data", cases: tuple[str, ...] = ("s1",)) -> Finding:
    return Finding(rule, severity, "class lesion", "0 voxels", "> 0 voxels", "a table", "Correct it.", source, cases)


def on_data(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    return [finding("R05")]


def on_configuration(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    return [finding("R26", source="configuration", cases=())]


def warns(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    return [finding("R09", "warn")]


def lacks(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    raise CannotRun("there is no mask")


def passes(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    return []


WARNS, LACKS = Rule("R09", "masks", warns), Rule("R11", "registration", lacks)
PASSES, SMOKE = Rule("R10", "geometry", passes), Rule("R20", "real steps", passes, when="smoke")
ON_DATA, ON_CONFIGURATION = Rule("R05", "voxels", on_data), Rule("R26", "logits", on_configuration)


def check(cohort: Path, folder: Path, *more: str) -> int:
    """Return the exit code of the command on the lesion bundle."""
    words = ["check", "brain_lesion_mri_segmentation", "--manifest", str(cohort), "-o", str(folder / "out")]
    return main([*words, "--cache_dir", str(folder / "cache"), "--runs_dir", str(folder / "runs"), *QUICK, *more])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / JSON_NAME).read_text())


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> list[Rule]:
    """The rules that the command runs: at first one that passes, one that warns, one that cannot run, one of smoke."""
    chosen = [PASSES, WARNS, LACKS, SMOKE]
    monkeypatch.setattr(check_module, "RULES", chosen)
    return chosen


def test_a_warning_does_not_stop_and_everything_is_written(
    rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_cohort.path is not None
    assert check(tiny_cohort.path, tmp_path) == 0
    got = result(tmp_path)
    assert (got["error"], got["exit_code"]) == (None, 0)
    assert got["checks"] == {"passed": 1, "found": 1, "not run": 1}
    assert [(each["rule"], each["severity"], each["cases"]) for each in got["findings"]] == [("R09", "warn", ["s1"])]
    assert got["not_run"] == [{"rule": "R11", "name": "registration", "why": "there is no mask"}]
    assert {case["case"] for case in got["fingerprint"]["cases"]} == {"s0", "s1", "s2", "s3"}  # s4 is of the test split
    assert got["plan"]["command"].startswith("--spacing '[2.0, 2.0, 2.0]'")
    assert "3 checks" in (printed := capsys.readouterr().out)
    assert "R09" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [PAGE_NAME, JSON_NAME]
    assert not (tmp_path / "runs").exists()  # no run was made


@pytest.mark.parametrize(
    ("wrong", "more", "code"),
    [
        ([ON_DATA], [], 3),
        ([ON_CONFIGURATION], [], 4),
        ([ON_DATA, ON_CONFIGURATION], ["--acknowledge", "['R05: planted']"], 4),
        ([ON_DATA], ["--acknowledge", "['R05: planted']"], 0),
    ],
    ids=["data", "configuration", "one of two accepted", "accepted"],
)
def test_the_exit_code_is_that_of_the_first_error_not_accepted(
    wrong: list[Rule], more: list[str], code: int, rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path
) -> None:
    rules[:] = wrong
    assert check(Path(str(tiny_cohort.path)), tmp_path, *more) == code
    got = result(tmp_path)
    assert got["exit_code"] == code
    assert got["acknowledged"] == ({"R05": "planted"} if more else {})
    assert "R05" in (tmp_path / "out" / PAGE_NAME).read_text() or wrong == [ON_CONFIGURATION]


def test_smoke_rules_run_only_where_asked(rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path) -> None:
    rules[:] = [PASSES, SMOKE]
    assert check(Path(str(tiny_cohort.path)), tmp_path, "--smoke") == 0
    assert [each["rule"] for each in result(tmp_path)["outcomes"]] == ["R10", "R20"]


def test_a_cohort_that_cannot_be_read_ends_in_three_lines_and_a_record(
    rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "cohort"
    shutil.copytree(tiny_cohort.root, copy)
    (copy / "s1" / "t1.nii.gz").unlink()
    assert check(copy / "manifest.json", tmp_path, "--data_root", str(copy)) == 3
    error = result(tmp_path)["error"]
    assert error["exit_code"] == 3
    assert "s1" in error["what"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line.split(":")[0].strip() for line in lines[-3:]] == ["error", "why", "fix"]
    page = (tmp_path / "out" / PAGE_NAME).read_text()
    assert "The check could not be finished" in page
    assert not list((tmp_path / "out").glob(".*"))


def test_a_misspelt_option_is_written_down_too(rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path) -> None:
    assert check(Path(str(tiny_cohort.path)), tmp_path, "--max_epoch", "3") == 2
    assert "max_epoch" in result(tmp_path)["error"]["what"]


def test_a_configuration_that_has_nothing_to_look_at(rules: list[Rule], tiny_cohort: Manifest, tmp_path: Path) -> None:
    assert check(Path(str(tiny_cohort.path)), tmp_path, "--config", "no_such_training") == 4
    assert "no_such_training" in result(tmp_path)["error"]["what"]


# --- the table and the values, without a bundle


def test_the_table_puts_findings_first_and_breaks_long_texts() -> None:
    long = Outcome("R11", "registration", "not run", reason="word " * 40)
    outcomes = (Outcome("R10", "geometry", "passed"), long, Outcome("R05", "voxels", "found", (finding("R05"),)))
    lines = table(Battery((*outcomes, Outcome("R15", "grid", "not for this task")), {}), width=110)
    assert [line.split()[0] for line in lines[2:] if line.startswith("R")] == ["R05", "R11", "R10"]
    assert max(map(len, lines)) <= 130
    assert "class lesion" in lines[2]
    assert "4 checks: 1 found, 1 not for this task, 1 not run, 1 passed" in lines[-1]


def test_accepted_findings_say_so() -> None:
    battery = Battery((Outcome("R05", "voxels", "found", (finding("R05"),)),), {"R05": "planted"})
    assert "error, accepted" in "\n".join(table(battery))
    assert exit_code(battery) == 0


def test_values_become_json() -> None:
    import numpy as np

    given = {"a": float("nan"), "b": np.float32(0.5), "c": np.array([1, 2]), 3: {Path("x")}, "d": (True, None)}
    assert plain(given) == {"a": None, "b": 0.5, "c": [1, 2], "3": ["x"], "d": [True, None]}
