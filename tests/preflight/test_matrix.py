"""Every rule of the catalogue has a proof, and the documentation lists every rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matrix import HERE, TITLES, Row, markdown, proofs, row_of
from planted import Proof

from pipelines.preflight import Finding

ALARM = Finding("R05", "error", "class lesion", "0 voxels", "> 0 voxels", "wrong table", "Correct the table.", "data")


def quiet() -> list[Finding]:
    return []


def alarm() -> list[Finding]:
    return [ALARM]


def breaks() -> list[Finding]:
    raise RuntimeError("no | such thing")


def test_the_catalogue_has_forty_five_rules() -> None:
    assert list(TITLES) == [f"R{number:02d}" for number in range(1, 46)]


def test_every_rule_has_a_proof() -> None:
    assert {proof.rule for proof in proofs()} == set(TITLES)


def test_the_documentation_lists_every_rule() -> None:
    text = (HERE.parents[1] / "docs" / "failure-catalogue.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (R\d\d) ", text, re.MULTILINE) == sorted(re.findall(r"^\| (R\d\d) ", text, re.MULTILINE))
    assert set(re.findall(r"^\| (R\d\d) ", text, re.MULTILINE)) == set(TITLES)


@pytest.mark.parametrize(
    ("planted", "healthy", "severity", "proven", "words"),
    [
        (alarm, quiet, "error", True, ("found (error)", "quiet")),
        (alarm, quiet, "warn", False, ("found (error)", "quiet")),
        (quiet, quiet, "error", False, ("**not found**", "quiet")),
        (alarm, alarm, "error", False, ("found (error)", "**1 false alarm**")),
        (breaks, quiet, "error", False, ("**broke: RuntimeError: no | such thing**", "quiet")),
        (alarm, breaks, "error", False, ("found (error)", "**broke: RuntimeError: no | such thing**")),
    ],
    ids=["proven", "other severity", "not found", "false alarm", "planted breaks", "healthy breaks"],
)
def test_a_row_says_what_happened(
    planted: object, healthy: object, severity: str, proven: bool, words: tuple[str, str]
) -> None:
    row = row_of(Proof("R05", "counts voxels", "a table", planted, healthy, severity))  # type: ignore[arg-type]
    assert (row.planted, row.healthy) == words
    assert row.proven is proven


def test_a_finding_of_another_rule_is_no_proof() -> None:
    assert row_of(Proof("R06", "looks at the background", "ignored", alarm, quiet)).planted == "**not found**"


def test_the_page_has_a_line_per_rule_and_no_bar_inside_of_a_cell() -> None:
    page = markdown([Row("R05", "a class | b", "counts", "found (error)", "quiet", "says", True)])
    lines = [line for line in page.splitlines() if re.match(r"\| R\d\d ", line)]
    assert len(lines) == 45
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in lines)
    assert "1 of 45 rules proven, by 1 proofs." in page


def test_the_page_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    page = markdown([Row("R14", "files", "counts", "found (error)", "quiet", f"file {tmp_path}/a/b.nii.gz", True)])
    assert str(tmp_path) not in page
    assert "…/b.nii.gz" in page
