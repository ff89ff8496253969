"""The model card says what the run says, and the checks at export find what they are for."""

from __future__ import annotations

import json
from pathlib import Path

from bundles_for_export import Exported

from pipelines.export.card import _cell, render_card
from pipelines.export.checks import (
    differing_versions,
    judge_artefacts,
    judge_code,
    judge_history,
    judge_results,
    judge_versions,
)
from pipelines.export.lock import Pin
from pipelines.export.privacy import pseudonyms_of
from pipelines.export.source import read_run

WORDS = {"out_of_scope": ["Teeth."], "limits": ["Small | data."]}
SECTIONS = ("Data", "What it takes and gives", "Results", "Failure cases", "Limits", "Training", "Findings")


def test_the_card_has_every_section_and_the_numbers_of_the_evaluation(exported: Exported) -> None:
    card = (exported.folder / "docs" / "README.md").read_text()
    for section in SECTIONS:
        assert f"\n## {section}\n" in card
    assert "**Intended use.** Research and training" in card
    summary = json.loads((exported.run / "metrics" / "summary.json").read_text())
    dice = summary["labels"]["lesion"]["dice"]
    assert f"| lesion | dice | 1 | 0 | {dice['mean']:.3f} |" in card
    assert "volume_reference_ml" not in card  # it describes the case, not how good the result is
    assert "CC0" in card
    assert "made by a test" in card
    assert "| train | 1 cases of 1 subjects |" in card


def test_an_acknowledged_finding_stands_in_the_card_with_its_reason(exported: Exported) -> None:
    card = (exported.folder / "docs" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("- R10")]
    assert line.endswith("**Acknowledged: three small boxes**")


def test_the_card_of_weights_that_nobody_measured_says_so(tiny_run: Path) -> None:
    run = read_run(tiny_run)
    unmeasured = type(run)(**{**run.__dict__, "summary": None, "rows": []})
    metadata = {"name": "N", "description": "D", "version": "1.0.0", "intended_use": "U"}
    finding = judge_results(None, run.weights_sha256)[0].as_json()
    battery = {"findings": [finding], "acknowledged": {"R42": "a trial"}}
    card = render_card(unmeasured, pseudonyms_of(run.cohort), metadata, battery, WORDS, [])
    assert "**These weights were not measured.** a trial" in card
    assert "## Failure cases" not in card
    assert "- Teeth." in card
    assert "Small \\| data." in card


def test_a_cell_stays_in_its_cell() -> None:
    assert _cell("a | b\n<script> c") == "a \\| b &lt;script> c"


# ---- the rules at export, each with a planted failure and a healthy case --------------------------------------------


def test_results_must_be_of_these_weights() -> None:
    assert judge_results({"weights_sha256": "w"}, "w") == []
    (missing,) = judge_results(None, "w")
    (other,) = judge_results({"weights_sha256": ["w", "v"]}, "w")
    assert (missing.rule, missing.severity, other.rule, other.severity) == ("R42", "error", "R42", "error")


def test_files_of_the_run_must_be_there() -> None:
    assert judge_artefacts([]) == []
    assert "tensorboard/" in judge_artefacts(["tensorboard/"])[0].what


def test_a_figure_that_is_always_0_is_found_and_a_count_of_failures_is_not() -> None:
    healthy = [{"epoch": 1, "loss": 1.0, "n_missed_lesion": 0}, {"epoch": 2, "loss": 0.5, "n_missed_lesion": 0}]
    assert judge_history(healthy) == []
    assert judge_history([{**healthy[0], "dice": 0.0}]) == []  # one epoch proves nothing
    assert judge_history([{**healthy[0], "dice": 0.0}, {**healthy[1], "dice": 0.2}]) == []
    (dead,) = judge_history([{**entry, "dice_lesion": 0.0} for entry in healthy])
    assert (dead.rule, dead.severity) == ("R42", "warn")
    assert "dice_lesion was 0" in dead.what


def test_other_sources_and_other_versions_are_said() -> None:
    assert judge_code("d", "d") == []
    assert judge_code(None, "d")[0].severity == "warn"
    assert judge_versions({}) == []
    many = {f"p{number}": ("1", "2") for number in range(8)}
    assert "p0 1 (lock 2)" in judge_versions(many)[0].measured
    assert judge_versions(many)[0].measured.endswith("and 2 more")


def test_versions_are_compared_without_the_build_and_only_where_they_are_installed() -> None:
    import numpy
    import torch

    version = torch.__version__.partition("+")[0]
    pins = [Pin("torch", f"{version}+cu130", ()), Pin("numpy", "1.0", ()), Pin("no-such-package", "1", ())]
    assert differing_versions(pins) == {"numpy": (numpy.__version__, "1.0")}
