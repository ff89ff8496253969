"""The page of a check: what it shows is what was there, a case may be called anything, and a browser is content."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipelines.manifests import Manifest
from pipelines.preflight import Battery, Finding, Inspection
from pipelines.preflight.battery import Outcome
from pipelines.preflight.fingerprint import fingerprint_of
from pipelines.preflight.page import (
    PANEL_PX,
    Checked,
    cohort_rows,
    histogram,
    plane_pictures,
    render_page,
    shown_cases,
    stored_inside,
)
from pipelines.preflight.planner import plan_for

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = "<script>planted = 1</script>"
LABELS = [{"id": 0, "name": "background", "colour": "#000000"}, {"id": 1, "name": "lesion", "colour": "#ff0000"}]
CONTRACT = {
    "modalities": ["flair", "t1"],
    "labels": LABELS,
    "dimensions": 3,
    "spacing": [2.0] * 3,
    "patch_size": [16] * 3,
}


def prepared_case(cohort: Manifest, number: int, name: str) -> dict[str, Any]:
    """Return a case of the tiny cohort as a chain would leave it: both images, label, foreground, affine."""
    folder = cohort.root / f"s{number}"
    image = np.stack([nib.load(folder / f"{m}.nii.gz").get_fdata(dtype=np.float32) for m in ("flair", "t1")])
    label, brain = (
        np.asarray(nib.load(folder / f"{key}.nii.gz").dataobj)[None].astype(np.uint8) for key in ("lesion", "brain")
    )
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return {"case": name, "image": image, "label": label, "foreground": brain, "image_affine": affine}


def standardised(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "image": (np.asarray(item["image"]) - 100) / 50}


@pytest.fixture(scope="module")
def checked(tiny_cohort: Manifest) -> Checked:
    """s0 to s2 train, one of them under a nasty name; two findings, one accepted, one on the nasty case."""
    names = {"s0": "s0", "s1": NASTY, "s2": "s2"}
    cases = tuple(replace(case, id=names.get(case.id, case.id)) for case in tiny_cohort.cases)
    train = SimpleNamespace(cases=[prepared_case(tiny_cohort, n, names[f"s{n}"]) for n in range(3)])
    validation = SimpleNamespace(cases=[prepared_case(tiny_cohort, 3, "s3")], transform=standardised)
    cohort = replace(tiny_cohort, cases=cases)
    inspection = Inspection("segmentation", cohort=cohort, contract=CONTRACT, train=train, validation=validation)
    evidence = {"voxels": {"s0": 3}, "share": 0.5}
    where = f"file {tiny_cohort.root}/s1/t1.nii.gz"
    found = Finding("R05", "error", where, "0 voxels", "> 0", "a table", "Correct it.", "data", (NASTY,), evidence)
    accepted = Finding("R09", "warn", "brain volume", "22 mL", "700 to 2200 mL", "a phantom", "Look.", "data", ("s0",))
    outcomes = (
        Outcome("R05", "voxels", "found", (found,)),
        Outcome("R09", "masks", "found", (accepted,)),
        Outcome("R11", "registration", "not run", reason="the bundle names no pair"),
    )
    battery = Battery(outcomes, {"R09": "a phantom"})
    fingerprint = fingerprint_of(inspection)
    plan = plan_for(inspection, fingerprint, 8.0)
    return Checked(inspection, battery, fingerprint, plan, "", shown_cases(inspection, battery, fingerprint))


@pytest.fixture(scope="module")
def page(checked: Checked) -> str:
    return render_page("my_bundle", checked)


def test_cases_that_a_finding_names_come_first(checked: Checked) -> None:
    assert [shown.case for shown in checked.cases] == [NASTY, "s0", "s2", "s3"]


def test_every_case_has_pictures_histograms_and_figures(checked: Checked) -> None:
    for shown in checked.cases:
        assert shown.problem == ""
        assert [row.plane for row in shown.rows] == ["flair", "t1", "label"]
        assert [chart.title for chart in shown.charts] == ["as stored, inside the foreground", "as the network sees it"]
        assert all([line.name for line in chart.lines] == ["flair", "t1"] for chart in shown.charts)
        assert "lesion" in dict(shown.figures)
    assert checked.cases[0].grid == "20 × 22 × 24 voxels of 2 × 2 × 2 mm"


def test_the_page_says_what_was_found(page: str) -> None:
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    assert "2 findings, of which 1 would stop a training" in text
    assert "accepted: a phantom" in text
    assert "the bundle names no pair" in text
    assert "Evidence of R05" in text
    assert "--spacing '[2.0, 2.0, 2.0]'" in text


def test_no_path_no_subject_no_address_no_script(page: str, tiny_cohort: Manifest) -> None:
    assert str(tiny_cohort.root) not in page
    assert NASTY not in page
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", page) == []


def test_a_check_that_was_stopped_shows_the_error_alone() -> None:
    page = render_page("b", None, {"what": f"case {NASTY}", "why": "3 mm, expected 1 mm", "fix": "convert it"})
    assert "3 mm, expected 1 mm" in page
    assert NASTY not in page
    assert 'id="findings"' not in page


def test_a_picture_that_fails_is_named_and_the_others_are_shown(tiny_cohort: Manifest, checked: Checked) -> None:
    gone = replace(checked.inspection.need("cohort"), root=tiny_cohort.root / "gone")
    shown = shown_cases(replace(checked.inspection, cohort=gone), checked.battery, checked.fingerprint)
    assert all("cannot be read" in case.problem or "Not everything" in case.problem for case in shown)
    assert all(len(case.rows) == 3 for case in shown)


def test_the_slices_are_those_of_the_label() -> None:
    # 6 x 8 x 10 voxels, the label at (1, 2, 3) alone: its slices are 1, 2 and 3
    label = np.zeros((1, 6, 8, 10), np.uint8)
    label[0, 1, 2, 3] = 1
    case = {"image": np.random.default_rng(0).normal(size=(1, 6, 8, 10)), "label": label, "image_affine": np.eye(4)}
    rows = plane_pictures(case, ["flair"], {1: "#ff0000"})
    assert [row.index for row in rows] == [1, 1]
    assert rows[0].width == 3 * PANEL_PX + 2 * 3
    assert rows[0].data != rows[1].data


def test_an_image_of_one_slice_has_one_panel_and_no_label_row_without_a_label() -> None:
    rows = plane_pictures({"image": np.ones((2, 6, 8))}, ["red", "green"], {})
    assert [(row.plane, row.width) for row in rows] == [("red", PANEL_PX), ("green", PANEL_PX)]


def test_a_histogram_counts_shares() -> None:
    # a quarter at 0, three quarters at 10: 25 % in the first bin, 75 % in the last, nothing between
    chart = histogram("t", {"a": np.array([0.0] * 25 + [10.0] * 75), "none": np.array([np.nan])}, "HU")
    assert chart is not None
    assert [line.name for line in chart.lines] == ["a"]
    heights = [float(point.split(",")[1]) for point in chart.lines[0].pieces[0].split()]
    low, first, last = max(heights), heights[0], heights[-1]  # pixels grow downwards
    assert (low - last) == pytest.approx(3 * (low - first), abs=0.5)
    assert len(set(heights[1:-1])) == 1


def test_stored_values_are_read_where_the_foreground_is(tiny_cohort: Manifest) -> None:
    # the prepared grid starts 3 voxels further along every axis than the file: the affine says so
    case = prepared_case(tiny_cohort, 0, "s0")
    affine = np.array(case["image_affine"])
    affine[:3, 3] = 6.0
    inner = case["foreground"][:, 3:, 3:, 3:]
    moved = {**case, "foreground": inner, "image_affine": affine}
    got = stored_inside(moved, tiny_cohort.cases[0], tiny_cohort.root, ["flair", "t1"])
    want = case["image"][:, 3:, 3:, 3:][:, inner[0] > 0]
    assert got["flair"] == pytest.approx(want[0])
    assert got["t1"] == pytest.approx(want[1])


def test_the_cohort_in_rows(checked: Checked) -> None:
    assert checked.fingerprint is not None
    rows = {row[0]: row[1:] for row in cohort_rows(checked.fingerprint)}
    assert rows["voxels anterior"] == (5, 22, 22, 22)
    assert rows["voxel size right (mm)"] == (5, 2, 2, 2)
    assert rows["lesion (mL)"][0] == 4


# --- a browser

PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table.outliers") || document.querySelector("table.cohort");
  const values = () => Array.from(table.tBodies[0].rows, r => r.cells[2].dataset.value);
  const seen = { errors: window.problems, scripts: typeof planted };
  table.tHead.rows[0].cells[2].querySelector("button").click();
  seen.ascending = values();
  seen.pictures = Array.from(document.images, i => [i.complete, i.naturalWidth, i.width]);
  seen.links = Array.from(document.querySelectorAll("a[href^='#']"), a => !!document.querySelector(a.hash));
  seen.charts = document.querySelectorAll("article svg").length;
  document.documentElement.innerHTML = "<body><pre></pre></body>";
  document.querySelector("pre").textContent = "SEEN" + JSON.stringify(seen) + "END";
}, 500));
</script>
"""
HEAD = """<script>
window.problems = [];
addEventListener("error", e => window.problems.push(String(e.message || e.target.outerHTML)), true);
addEventListener("securitypolicyviolation", e => window.problems.push("policy: " + e.blockedURI));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_is_content(page: str, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("<head>", f"<head>{HEAD}").replace("</body>", f"{PROBE}</body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1300,1000"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", probed.as_uri()]
    done = subprocess.run([str(BROWSER), *flags, *where], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"SEEN(.*?)END", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(unescape(found.group(1)))
    assert seen["errors"] == []
    assert seen["scripts"] == "undefined"
    assert not re.search(r"CONSOLE.*(ERROR|Refused|Uncaught|Failed|violates)", done.stderr)
    numbers = [float(value) for value in seen["ascending"]]
    assert numbers == sorted(numbers)
    assert len(seen["pictures"]) == 4 * 3
    assert all(complete and natural == shown == 3 * PANEL_PX + 6 for complete, natural, shown in seen["pictures"])
    assert all(seen["links"])
    assert seen["charts"] == 4 * 2
