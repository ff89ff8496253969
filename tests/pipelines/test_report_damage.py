"""A report of a run that lacks something or is damaged: a note by name, or an error where numbers are at stake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import Page, write_run

from pipelines.reports import report as report_module
from pipelines.reports import write_report
from transforms.errors import DataError


def test_files_that_are_gone_or_damaged_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 0, "p2": 1, "p3": 2, "p4": 3})
    data = tmp_path / "data"
    (data / "run_0_image.nii.gz").unlink()
    (data / "run_1_mask.nii.gz").write_bytes((data / "run_1_mask.nii.gz").read_bytes()[:60])
    (data / "run_2_truth.nii.gz").write_bytes(b"no image")
    page = Page(write_report([run]).read_text())
    assert "No picture: case p1: its image is gone" in page.text
    assert "No picture: case p2: its prediction cannot be shown" in page.text
    assert "No picture: case p3: its reference cannot be shown" in page.text
    assert sum((tag, name) == ("img", "src") for tag, name, _ in page.attributes) == 3
    without = json.loads((run / "report" / "report.json").read_text())["runs"][0]["without_picture"]
    assert sorted(without) == ["p1", "p2", "p3"]
    assert str(tmp_path) not in page.text  # folders can be called by names of patients


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("metrics/cases.json", "no cases.json beside the results"),
        ("record.json", "no record.json: the run's record cannot be shown"),
        ("metrics/per_case.csv", "no per_case.csv beside summary.json"),
        ("metrics", "no results yet"),
    ],
)
def test_what_a_run_lacks_is_said(tmp_path: Path, missing: str, said: str) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    gone = run / missing
    for path in [*gone.glob("*"), gone] if gone.is_dir() else [gone]:
        path.rmdir() if path.is_dir() else path.unlink()
    assert said in Page(write_report([run]).read_text()).text


def test_damaged_records_are_notes_and_damaged_numbers_are_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 0, "p2": 3})
    (run / "record.json").write_text("{")
    about = json.loads((run / "metrics" / "cases.json").read_text())
    del about["cases"]["p1"]["image"]
    (run / "metrics" / "cases.json").write_text(json.dumps(about))
    page = Page(write_report([run]).read_text())
    assert "record.json is damaged" in page.text
    assert "does not say where the files of case p1 are" in page.text
    per_case = run / "metrics" / "per_case.csv"
    per_case.write_text(per_case.read_text() + per_case.read_text().splitlines()[1].replace("p1", "p9") + "\n")
    assert "summary.json is of 2 cases" in Page(write_report([run]).read_text()).text
    for damaged, why in (("{", "cannot be read"), ("[1]", "does not say n_cases"), ('{"n_cases": 1}', "not say n_sub")):
        (run / "metrics" / "summary.json").write_text(damaged)
        with pytest.raises(DataError, match=r"summary\.json") as refused:
            write_report([run])
        assert why in refused.value.why


@pytest.mark.parametrize("cells", ["a,b", "a,b,c,0.5,0.6"])
def test_a_row_of_another_length_is_an_error(tmp_path: Path, cells: str) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    (run / "metrics" / "per_case.csv").write_text(f"case,subject,label,dice\n{cells}\n")
    with pytest.raises(DataError, match=f"row 1 has {len(cells.split(','))} cells"):
        write_report([run])


@pytest.mark.parametrize(
    "damage", [{"labels": None}, {"labels": [{"id": 1}]}, {"label_values": None}, {"label_values": [1]}, {"cases": [1]}]
)
def test_a_list_of_cases_that_makes_no_sense_is_a_note(tmp_path: Path, damage: dict) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    path = run / "metrics" / "cases.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    assert "cases.json is damaged" in Page(write_report([run]).read_text()).text


def test_results_of_an_unknown_source_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    path = run / "metrics" / "summary.json"
    summary = json.loads(path.read_text())
    assert "1 case of 1 subject: cohort small, split test." in Page(write_report([run]).read_text()).text
    del summary["source"]["fold"]
    path.write_text(json.dumps(summary))
    assert "1 case of 1 subject: cohort small, split test." in Page(write_report([run]).read_text()).text
    del summary["source"]
    path.write_text(json.dumps(summary))
    assert "1 case of 1 subject." in Page(write_report([run]).read_text()).text


def test_without_nilearn_there_are_pictures_and_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "viewer_available", lambda: False)
    page = Page(write_report([write_run(tmp_path / "run", {"p1": 0})]).read_text())
    assert "nilearn is not installed" in page.text
    assert page.frames == []
    assert sum((tag, name) == ("img", "src") for tag, name, _ in page.attributes) == 3
