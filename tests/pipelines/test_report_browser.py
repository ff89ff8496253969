"""The page in a real browser: no complaint in its console, tables sort, every picture loads, the viewer draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from pipelines.reports import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

# clicks twice on the head Dice and once on case, and leaves what it saw as the only text of the page
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const seen = { errors: window.problems, scripts: typeof planted };
  const table = document.querySelector("table.cases");
  const column = name => Array.from(table.tHead.rows[0].cells).findIndex(c => c.textContent.trim() === name);
  const values = name => Array.from(table.tBodies[0].rows, r => r.cells[column(name)].dataset.value);
  const click = name => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
  click("dice"); seen.ascending = values("dice"); seen.sort = table.tHead.rows[0].cells[column("dice")].ariaSort;
  click("dice"); seen.descending = values("dice");
  click("case"); seen.cases = values("case");
  seen.pictures = Array.from(document.images, i => [i.complete, i.naturalWidth, i.width]);
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  setTimeout(() => {
    const frame = document.querySelector("iframe");
    const canvas = frame.contentDocument && frame.contentDocument.querySelector("canvas");
    seen.viewer = canvas ? [canvas.width, canvas.height] : null;
    document.documentElement.innerHTML = "<body><pre></pre></body>";
    document.querySelector("pre").textContent = "SEEN" + JSON.stringify(seen) + "END";
  }, 3000);
}, 500));
</script>
"""
COMPLAINTS = re.compile(r"ERROR|Refused|Uncaught|Failed|violates")
HEAD = """<script>
window.problems = [];
addEventListener("error", e => window.problems.push(String(e.message || e.target.outerHTML)), true);
addEventListener("securitypolicyviolation", e => window.problems.push("policy: " + e.blockedURI));
</script>"""


def browse(page: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Return what the probe saw on a page, and what the browser wrote to its console."""
    probed = folder / "probed.html"
    probed.write_text(page.replace("<head>", f"<head>{HEAD}").replace("</body>", f"{PROBE}</body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1300,1000"]
    where = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", probed.as_uri()]
    done = subprocess.run([str(BROWSER), *flags, *where], capture_output=True, text=True, timeout=120, check=False)
    seen = re.search(r"SEEN(.*?)END", done.stdout, re.DOTALL)
    assert seen, done.stderr[-2000:]
    return json.loads(unescape(seen.group(1))), "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    overlaps = {"p2": 4, "p10": 2, "<script>planted = 1</script>": 0, "p1": 1}
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "run", overlaps)]).read_text()


@pytest.fixture(scope="module")
def browsed(page: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return browse(page, tmp_path_factory.mktemp("browser"))


def test_no_error_in_the_console(browsed: tuple[dict[str, Any], str]) -> None:
    seen, console = browsed
    assert seen["errors"] == []
    assert not COMPLAINTS.search(console), console


def test_planted_errors_are_found(page: str, tmp_path: Path) -> None:
    planted = '<script>undefinedFunction()</script><img src="http://127.0.0.1:9/a.png">'
    seen, console = browse(page.replace("<footer", f"{planted}<footer"), tmp_path)
    assert any("undefinedFunction" in problem for problem in seen["errors"])
    assert "policy: http://127.0.0.1:9/a.png" in seen["errors"]
    assert COMPLAINTS.search(console)


def test_a_case_called_script_does_not_run(browsed: tuple[dict[str, Any], str]) -> None:
    assert browsed[0]["scripts"] == "undefined"


def test_the_table_sorts_by_number_and_by_name(browsed: tuple[dict[str, Any], str]) -> None:
    seen = browsed[0]
    ascending = [float(value) for value in seen["ascending"]]
    assert ascending == sorted(ascending)
    assert len(set(ascending)) == 4
    assert seen["sort"] == "ascending"
    assert [float(value) for value in seen["descending"]] == ascending[::-1]
    assert seen["cases"] == ["<script>planted = 1</script>", "p1", "p2", "p10"]


def test_every_picture_loads(browsed: tuple[dict[str, Any], str]) -> None:
    pictures = browsed[0]["pictures"]
    assert len(pictures) == 4 * 3
    assert all(complete and natural == shown == 852 for complete, natural, shown in pictures)


def test_the_viewer_draws(browsed: tuple[dict[str, Any], str]) -> None:
    width, height = browsed[0]["viewer"]
    assert min(width, height) > 100
