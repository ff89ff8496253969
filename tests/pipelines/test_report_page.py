"""The report as a reader meets it: one file, true numbers, the worst cases first, and a word about what is missing."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import LABELS, Page, write_run

from pipelines.cli import main
from pipelines.metrics.calibration import count_calibration
from pipelines.metrics.comparison import compare_runs
from pipelines.reports import report as report_module
from pipelines.reports import write_report
from pipelines.reports.html import MOST_ROWS, format_number
from pipelines.reports.panels import calibration_panel, panel_of
from pipelines.reports.report_data import load_run
from pipelines.reports.tables import format_table, read_per_case_csv
from transforms.errors import UsageError

NASTY = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cases: Dice of the lesion 1, 2/3 (overlap 2 of 4), 0 (missed) and 2/5 (overlap 1 of 4)."""
    overlaps = {"good": 4, "half": 2, "nothing": 0, NASTY: 1}
    return write_run(tmp_path_factory.mktemp("runs") / "first", overlaps, LABELS)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report([run]).read_text())


def external_references(page: Page) -> list[str]:
    """Return what a browser would fetch: addresses in attributes and style sheets that are neither data nor anchors."""
    found = [
        value
        for _, name, value in page.attributes
        if name in ("src", "href", "action", "data", "poster", "srcset") and value and not re.match(r"data:|#", value)
    ]
    found += re.findall(r"@import[^;]*|url\((?!['\"]?data:)[^)]*\)", "".join(page.code))
    return found + [reference for frame in page.frames for reference in external_references(Viewer(frame))]


class Viewer(Page):
    """A page of nilearn, which does not close all of its tags."""

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def close(self) -> None:
        super().close()
        self.open = []


def test_the_page_needs_no_other_file(run: Path, page: Page) -> None:
    assert external_references(page) == []
    text = (run / "report" / "index.html").read_text()
    own = re.sub(r'srcdoc="[^"]*"|data:image/[^"]*', "", text)
    assert "http:" not in own
    assert "https:" not in own
    assert "//" not in own
    assert "default-src 'none'" in own


def test_an_external_reference_is_found() -> None:
    planted = Page('<img src="https://example.org/a.png"><style>@import "x.css"; a { b: url(y.png) }</style>')
    assert external_references(planted) == ["https://example.org/a.png", '@import "x.css"', "url(y.png)"]


def test_the_numbers_are_those_of_the_summary(run: Path, page: Page) -> None:
    summary = json.loads((run / "metrics" / "summary.json").read_text())
    shown = {(row[0]["text"], row[1]["text"]): row for row in page.table("label", "metric", "n", "missed")}
    expected = {**summary["labels"], "(mean over labels)": summary["mean_over_labels"]}
    assert set(shown) == {(label, metric) for label, metrics in expected.items() for metric in metrics}
    for (label, metric), row in shown.items():
        entry = expected[label][metric]
        for column, key in enumerate(("n", "n_missed", "n_false_alarm", "n_empty", "mean"), start=2):
            assert json.loads(row[column]["value"]) == entry[key]
            assert row[column]["text"] == format_number(entry[key])
        low, high = (format_number(entry[key]) for key in ("ci95_low", "ci95_high"))
        assert row[7]["text"].replace("to", " to ").split() == [low, "to", high]
        assert json.loads(row[8]["value"]) == entry["median"]
    assert shown["lesion", "dice"][3]["text"] == "1"  # one case was missed
    assert shown["lesion", "dice"][6]["text"] == "0.517"  # (1 + 2/3 + 0 + 2/5) / 4 = 0.51666...


def test_the_table_of_the_terminal_names_its_interval(run: Path) -> None:
    lines = format_table(json.loads((run / "metrics" / "summary.json").read_text())).splitlines()
    assert "4 cases of 4 subjects; interval of the mean: BCa bootstrap, 50 resamples of subjects, seed 0." in lines
    assert lines[1] == "-" * max(len(line) for line in lines[:-2])


def test_the_cases_are_those_of_the_table(run: Path, page: Page) -> None:
    rows = read_per_case_csv(run / "metrics" / "per_case.csv")
    shown = page.table("case", "label", "status", "dice")
    assert [[row[0]["value"], row[1]["value"], float(row[3]["value"])] for row in shown] == [
        [row["case"], row["label"], row["dice"]] for row in rows
    ]


def test_the_worst_case_comes_first(page: Page) -> None:
    # mean over both labels, label 2 always right: 0.5, 0.7, 5/6, 1
    order = [re.search(rf"{place}\. (\S+) (lesion \S+)", page.text) for place in (1, 2, 3, 4)]
    assert [match and match.group(1) for match in order] == ["nothing", '<script>alert("1")</script>', "half", "good"]
    assert order[0] is not None
    assert order[0].group(2) == "lesion missed,"


def test_every_case_has_three_planes_and_the_worst_two_a_viewer(page: Page) -> None:
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 4 * 3
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert len(page.frames) == 2
    assert page.text.count("Click through all slices") == 2


def test_a_case_called_script_is_text_and_no_script(run: Path, page: Page) -> None:
    assert page.scripts == 1
    assert NASTY in page.text
    assert "<script>alert" not in re.sub(r'srcdoc="[^"]*"', "", (run / "report" / "index.html").read_text())


def test_no_subject_leaves_the_run(run: Path, page: Page) -> None:
    for name in ("index.html", "cases.csv", "report.json"):
        assert "Jane Doe" not in (run / "report" / name).read_text()


def test_the_record_says_what_ran(page: Page) -> None:
    assert "digest of the weights w1" in page.text
    for said in ("seed 17", "cases left out while training p07 (3 times)", "skipped steps (loss not finite) 2"):
        assert said in page.text
    assert "2026-11-20T10:00:00, despite machine: threads was 4, now 2" in page.text
    assert "monai 1.6.1, torch 2.13.0" in page.text
    assert "fiducial train some_bundle" in page.text


def test_csv_and_json_stand_beside_the_page(run: Path, page: Page) -> None:
    with (run / "report" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows[::2]] == ["nothing", NASTY, "half", "good"]
    assert [row["rank"] for row in rows] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    content = json.loads((run / "report" / "report.json").read_text())["runs"][0]
    assert content["summary"] == json.loads((run / "metrics" / "summary.json").read_text())
    assert [entry["case"] for entry in content["ranking"]] == ["nothing", NASTY, "half", "good"]
    assert content["without_picture"] == {}


def test_two_runs_are_compared_case_by_case(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(6)]
    first = write_run(tmp_path / "first", dict.fromkeys(names, 1))
    second = write_run(tmp_path / "second", {name: 1 + i % 3 for i, name in enumerate(names)})
    with pytest.raises(UsageError, match="belongs to none"):
        write_report([first, second])
    page = Page(write_report([first, second], tmp_path / "both").read_text())
    rows = [read_per_case_csv(folder / "metrics" / "per_case.csv") for folder in (first, second)]
    expected = compare_runs(*rows, metrics=["dice", "hd95_mm"])
    shown = page.table("label", "metric", "n", "subjects")
    keys = ("n", "n_subjects", "mean_a", "mean_b", "difference", "ci95_low", "ci95_high", "p", "p_holm")
    for row, entry in zip(shown, expected, strict=True):  # volumes are no figure of merit: not tested
        assert [json.loads(cell["value"] or "null") for cell in row[2:11]] == [entry[key] for key in keys]
    side = page.table("label", "metric", "n: first", "mean: first")
    summary = json.loads((second / "metrics" / "summary.json").read_text())
    assert json.loads(side[0][6]["value"]) == summary["labels"]["lesion"]["dice"]["mean"]
    with (tmp_path / "both" / "cases.csv").open(newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"first", "second"}


def test_runs_over_different_cases_are_not_compared_in_silence(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {case: 2, "c": 1}) for name, case in (("first", "a"), ("second", "b"))]
    page = Page(write_report(runs, tmp_path / "both").read_text())
    assert "were not measured on the same cases" in page.text
    assert "second cannot be compared with first case by case" in page.text


def test_a_run_twice_or_no_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"a": 2})
    with pytest.raises(UsageError, match="each once"):
        write_report([run, run / "metrics"], tmp_path / "out")
    with pytest.raises(UsageError, match="no run"):
        write_report([tmp_path])


def test_one_label_has_no_mean_over_labels(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / "run", {"p1": 0, "p2": 3}, LABELS[:2])]).read_text())
    assert {row[0]["text"] for row in page.table("label", "metric", "n", "missed")} == {"lesion"}


def test_only_the_worst_are_drawn_and_the_table_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", {"p1": 4, "p2": 0, "p3": 1})
    monkeypatch.setattr(report_module, "MOST_PICTURES", 2)
    monkeypatch.setattr("pipelines.reports.html.MOST_ROWS", 1)
    page = Page(write_report([run]).read_text())
    assert MOST_ROWS > 1
    assert "Shown are 2 of 3 cases, the worst first by dice" in page.text
    assert [row[0]["text"] for row in page.table("case", "label")] == ["p2"]
    assert "Shown are 1 of 3 rows, those of the worst cases" in page.text


def test_merged_folds_find_the_files_of_every_fold(tmp_path: Path) -> None:
    merged = write_run(tmp_path / "cv_folds", {"p1": 0, "p2": 3})
    about = json.loads((merged / "metrics" / "cases.json").read_text())
    (merged / "metrics" / "cases.json").unlink()
    for fold, case in enumerate(("p1", "p2")):
        entry = {**about["cases"][case]}
        for key in ("image", "reference", "prediction"):
            entry[key] = f"../{entry[key]}"
        folder = merged / f"fold{fold}" / "metrics"
        folder.mkdir(parents=True)
        (folder / "cases.json").write_text(json.dumps({**about, "cases": {case: entry}}))
    table = merged / "metrics" / "per_case.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{rows[0]},fold", f"{rows[1]},0", f"{rows[2]},1"]) + "\n")
    data = load_run(merged)
    assert sorted(data.cases) == ["p1", "p2"]
    assert "fold" not in data.metrics
    assert sum(name == "src" for _, name, _ in Page(write_report([merged]).read_text()).attributes) == 6


def test_panels_appear_when_their_files_are_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    # two voxels at 0.25 of which one is foreground: frequency 0.5; two at 0.75, both foreground: 1
    counts = count_calibration(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0, 1, 1, 1]))
    content = calibration_panel({NASTY: counts})
    assert content["charts"][0]["series"][NASTY] == [[0.25, 0.5], [0.75, 1.0]]
    (run / "metrics" / "calibration.json").write_text(json.dumps(content))
    (run / "metrics" / "rois.json").write_text(json.dumps({"frontal": {"dice": 0.5}, "n": 3}))
    (run / "metrics" / "broken.json").write_text(json.dumps({"title": "x", "tables": [{"rows": []}]}))
    page = Page(write_report([run]).read_text())
    assert page.scripts == 1
    row = page.table("label", "n_voxels")[0]
    assert row[0]["text"] == NASTY
    assert json.loads(row[4]["value"]) == 0.25  # ECE: (2 * 0.25 + 2 * 0.25) / 4
    assert [cell["text"] for cell in page.table("key", "value")[0]] == ["frontal", '{"dice": 0.5}']
    assert "broken.json is not a panel as it should be (KeyError: 'columns')" in page.text
    assert page.text.count("reliability") >= 1
    with pytest.raises(UsageError, match="0 labels"):
        calibration_panel({})


def test_a_list_of_findings_is_a_table() -> None:
    table = panel_of("preflight", [{"check": "leakage", "level": "warning"}, {"check": "spacing"}]).tables[0]
    assert table.columns == ["check", "level"]
    assert table.rows == [["leakage", "warning"], ["spacing", None]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (3, "3"), (0.0, "0"), (0.51666, "0.517"), (-2.5, "-2.500"), (1e-5, "1e-05"), (123456.0, "1.23e+05")],
)
def test_numbers_for_a_reader(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {"p1": 0})
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")
    assert main(["report", str(run / "metrics"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").is_file()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "neither record.json nor metrics/summary.json" in capsys.readouterr().err
