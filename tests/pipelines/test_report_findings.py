"""The section of the report that says what was found before and during training, and what was accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import Page, write_run

from pipelines.preflight import Battery, Finding
from pipelines.preflight.battery import Outcome
from pipelines.reports import write_report
from pipelines.reports.findings import findings_panel
from pipelines.training.outcome import watch_record

MASKS = Finding(
    "R09", "error", "the brain mask of case p1 has the volume of no brain", "512 mL", "700 to 2200 mL", "an infant",
    "Look at <it>.", "data", ("p1", "p2"),
)  # fmt: skip
GONE = Finding("R14", "warn", "/data/someone/p3/flair.nii.gz is missing", "1 of 9", "9", "moved", "Restore it.")
BATTERY = Battery(
    (
        Outcome("R09", "masks", "found", (MASKS,)),
        Outcome("R14", "files", "found", (GONE,)),
        Outcome("R10", "geometry", "passed"),
        Outcome("R16", "peak of a step", "not run", reason="the run has no GPU"),
    ),
    {"R09": "heads of infants"},
)
COLLAPSE = {
    **Finding("R31", "error", "everything is lesion", "99.9 %", "<= 99 %", "the loss", "Look at it.").as_json(),
    "phase": "decoder", "first_epoch": 4, "last_epoch": 6, "acknowledged": None,
}  # fmt: skip


def recorded(run: Path, **entries: Any) -> Page:
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps({**record, **entries}))
    return Page(write_report([run]).read_text())


def texts(page: Page, *columns: str) -> list[list[str]]:
    return [[cell["text"] for cell in row] for row in page.table(*columns)]


def test_findings_acknowledgements_and_what_was_not_looked_at(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 2})
    watched = watch_record([{"findings": [COLLAPSE]}], {}, {"R36": "the metric is no Dice"})
    page = recorded(run, preflight=BATTERY.record(), watchdogs=watched)
    masks, gone = texts(page, "rule", "severity", "what", "measured", "expected", "fix", "cases", "accepted")
    assert masks == [
        "R09", "error", MASKS.what, "512 mL", "700 to 2200 mL", "Look at <it>.", "p1, p2", "heads of infants",
    ]  # fmt: skip
    assert gone[2] == "…/flair.nii.gz is missing"
    assert "someone" not in page.text
    (collapse,) = texts(page, "rule", "severity", "what", "measured", "expected", "fix", "cases", "accepted", "epochs")
    assert (collapse[0], collapse[-2:]) == ("R31", ["", "decoder: 4 to 6"])
    assert texts(page, "rule", "check", "why") == [
        ["R16", "peak of a step", "the run has no GPU"],
        ["R36", "while it trains", "the metric is no Dice"],
    ]
    assert "Before the training: 2 found, 1 passed, 1 not run. While it trained: 1 finding." in page.text
    assert page.scripts == 1


def test_a_run_without_findings_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 2})
    passed = Battery((Outcome("R10", "geometry", "passed"),), {})
    page = recorded(run, preflight=passed.record(), watchdogs=watch_record([{"findings": []}], {}, {}))
    assert "Before the training: 1 passed. While it trained: 0 findings." in page.text


def test_an_older_record_has_no_such_section(tmp_path: Path) -> None:
    assert findings_panel({"seed": 0}) is None
    page = Page(write_report([write_run(tmp_path / "run", {"p1": 2})]).read_text())
    assert "Findings" not in page.text


@pytest.mark.parametrize("damaged", [["R09"], {"findings": [{"rule": "R09"}]}, {"findings": 3}])
def test_a_damaged_record_is_a_note_and_no_crash(damaged: Any, tmp_path: Path) -> None:
    page = recorded(write_run(tmp_path / "run", {"p1": 2}), preflight=damaged)
    assert "The findings in record.json cannot be shown" in page.text


def test_many_cases_are_counted() -> None:
    many = {**MASKS.as_json(), "cases": [f"p{n}" for n in range(13)]}
    content = findings_panel({"preflight": {"findings": [many]}})
    assert content is not None
    assert content["tables"][0]["rows"][0][6] == "p0, p1, p2, p3, p4, p5, p6, p7, p8, p9 and 3 more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b/c.nii.gz is gone", "…/c.nii.gz is gone"),
        ("file 'C:\\data\\x.nii' is gone", "file '…/x.nii' is gone"),
        ("DHW in mm/voxel, 3 and/or 4", "DHW in mm/voxel, 3 and/or 4"),
        ("p1/flair.nii.gz is missing", "p1/flair.nii.gz is missing"),
    ],
)
def test_only_folders_of_a_machine_are_cut(text: str, shown: str) -> None:
    content = findings_panel({"preflight": {"findings": [{**MASKS.as_json(), "what": text}]}})
    assert content is not None
    assert content["tables"][0]["rows"][0][2] == shown
