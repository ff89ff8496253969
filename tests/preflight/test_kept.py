"""Findings on the data are kept, never stale, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from monai.transforms import Compose, RandFlipd

from pipelines.manifests import Manifest
from pipelines.manifests.cache import CachedCase
from pipelines.preflight import CannotRun, Finding, Inspection, Rule
from pipelines.preflight import kept as kept_module
from pipelines.preflight.kept import FOLDER, data_digest, kept_battery
from transforms import NormalizeIntensityInMaskd
from transforms.errors import UsageError

CALLS: list[str] = []
ALARM = Finding(
    "R05", "error", "class lesion", "0 voxels", "> 0 voxels", "a table", "Correct it.", "data", ("s1",), {"n": [1, 2.5]}
)  # fmt: skip


def finds(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    CALLS.append("finds")
    return [ALARM]


def passes(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    CALLS.append("passes")
    return []


def lacks(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    CALLS.append("lacks")
    raise CannotRun("no mask")


def finds_nan(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    CALLS.append("finds_nan")
    return [replace(ALARM, evidence={"mean": float("nan")})]


FINDS = Rule("R05", "voxels per class", finds, {"share": 0.01}, of_data=True)
PASSES = Rule("R09", "masks", passes, of_data=True)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


@pytest.fixture
def inspection(tiny_cohort: Manifest) -> Inspection:
    def dataset(*names: str, transform: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            cases=[CachedCase(Path("cache") / n, {"case": n}, {}) for n in names], transform=transform
        )

    return Inspection(
        "segmentation",
        cohort=tiny_cohort,
        contract={"spacing": [2.0, 2.0, 2.0]},
        train=dataset("aa", "bb", transform=Compose([RandFlipd("image", 0.5)])),
        validation=dataset("cc", transform=NormalizeIntensityInMaskd("image", statistics_key="intensity_statistics")),
    )


def entries(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.json"))


def test_the_second_time_nothing_is_looked_at_again(inspection: Inspection, tmp_path: Path) -> None:
    first = kept_battery([FINDS, PASSES], inspection, tmp_path)
    second = kept_battery([FINDS, PASSES], inspection, tmp_path)
    assert CALLS == ["finds", "passes"]
    assert second == first
    assert second.findings == [ALARM]
    assert [outcome.status for outcome in second.outcomes] == ["found", "passed"]


def test_a_kept_finding_is_reported_and_can_be_accepted_like_a_new_one(
    inspection: Inspection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_battery([FINDS], inspection, tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        battery = kept_battery([FINDS], inspection, tmp_path, acknowledge=["R05: a phantom"])
    assert "R05 error: class lesion" in caplog.text
    assert battery.stopping == []
    with pytest.raises(UsageError):
        kept_battery([FINDS], inspection, tmp_path, acknowledge=["R05:"])


@pytest.mark.parametrize("change", ["cohort", "files or chain", "chain behind the cache", "contract", "limit", "code"])
def test_what_it_depends_on_has_changed(
    change: str, inspection: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_battery([FINDS], inspection, tmp_path)
    thresholds: list[str] = []
    assert inspection.cohort is not None
    if change == "cohort":
        inspection = replace(inspection, cohort=replace(inspection.cohort, cases=inspection.cohort.cases[:-1]))
    elif change == "files or chain":
        inspection = replace(inspection, train=SimpleNamespace(cases=[CachedCase(Path("cache/dd"), {}, {})]))
    elif change == "chain behind the cache":
        other = NormalizeIntensityInMaskd("image", statistics_key="intensity_statistics", background=-1.0)
        inspection.validation.transform = other
    elif change == "contract":
        inspection = replace(inspection, contract={"spacing": [1.0, 1.0, 1.0]})
    elif change == "limit":
        thresholds = ["R05.share=0.02"]
    else:
        monkeypatch.setattr(kept_module, "code_digest", lambda: "another")
    kept_battery([FINDS], inspection, tmp_path, thresholds=thresholds)
    assert CALLS == ["finds", "finds"]
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["{", "[]", "other findings", "no finding"])
def test_a_damaged_entry_is_made_again(
    damage: str, inspection: Inspection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_battery([FINDS], inspection, tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_text()
    content = json.loads(whole)
    if damage == "other findings":
        content["findings"] = []
    elif damage == "no finding":
        content = {"findings": [{"rule": "R05"}], "digest": kept_module.canonical_digest([{"rule": "R05"}])}
    entry.write_text(json.dumps(content) if " " in damage else damage)
    with caplog.at_level(logging.WARNING):
        battery = kept_battery([FINDS], inspection, tmp_path)
    assert CALLS == ["finds", "finds"]
    assert battery.findings == [ALARM]
    assert "made again" in caplog.text
    assert entry.read_text() == whole


def test_what_did_not_run_or_is_not_of_the_data_is_not_kept(inspection: Inspection, tmp_path: Path) -> None:
    rules = [Rule("R09", "masks", lacks, of_data=True), Rule("R16", "memory", passes)]
    for _ in range(2):
        assert kept_battery(rules, inspection, tmp_path).outcomes[0].status == "not run"
    assert CALLS == ["lacks", "passes"] * 2
    assert entries(tmp_path) == []


def test_findings_that_json_cannot_hold_are_not_kept_and_not_lost(inspection: Inspection, tmp_path: Path) -> None:
    for _ in range(2):
        assert len(kept_battery([Rule("R05", "nan", finds_nan, of_data=True)], inspection, tmp_path).findings) == 1
    assert CALLS == ["finds_nan"] * 2


def test_a_rule_of_another_task_is_neither_run_nor_kept(inspection: Inspection, tmp_path: Path) -> None:
    battery = kept_battery([replace(FINDS, tasks=("fusion",))], inspection, tmp_path)
    assert battery.outcomes[0].status == "not for this task"
    assert (CALLS, entries(tmp_path)) == ([], [])


@pytest.mark.parametrize("lacking", ["cohort", "cached cases", "a chain without chance"])
def test_data_that_cannot_be_told_apart_is_looked_at_every_time(
    lacking: str, inspection: Inspection, tmp_path: Path
) -> None:
    if lacking == "cohort":
        inspection = replace(inspection, cohort=None)
    elif lacking == "cached cases":
        inspection = replace(inspection, train=SimpleNamespace(cases=[{"case": "a"}]))
    else:
        inspection.validation.transform = RandFlipd("image", 0.5)
    assert data_digest(inspection) is None
    for _ in range(2):
        kept_battery([FINDS], inspection, tmp_path)
    assert CALLS == ["finds", "finds"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    inspection: Inspection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert kept_battery([FINDS], inspection, tmp_path).findings == [ALARM]
    assert "are not kept" in caplog.text
