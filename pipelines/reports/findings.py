"""What was found wrong with a run, before it trained and while it did, and what somebody has accepted, with the reason.

The run's record has it at ``preflight`` (``Battery.record``) and at ``watchdogs`` (``training.outcome.watch_record``);
here it becomes a section of the report. A record without both, of an older run, has no such section.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("rule", "severity", "what", "measured", "expected", "fix", "cases", "accepted")
_PATH = re.compile(
    r"(?<![\w.…])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:;,'\"]+)+[/\\](?=[^\s/\\])"
)  # folders of an absolute path
MOST_CASES = 10  # named in a row


def findings_panel(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return findings, acknowledgements and what was not looked at as a panel (``panels.panel_of``).

    Folders of a machine are cut from the texts; files keep their names.

    Returns:
        None where the record says nothing of either.

    Raises:
        AttributeError, KeyError, TypeError: a record of another form.
    """
    before, during = record.get("preflight"), record.get("watchdogs")
    if before is None and during is None:
        return None
    sentences, tables = [], []
    if before is not None:
        counts = ", ".join(f"{number} {status}" for status, number in before.get("checks", {}).items())
        sentences.append(f"Before the training: {counts or 'nothing was checked'}.")
        rows = [_row(finding, before.get("acknowledged", {})) for finding in before.get("findings", [])]
        tables += _table("Before the training", _COLUMNS, rows)
    if during is not None:
        found = during.get("findings", [])
        sentences.append(f"While it trained: {len(found)} finding{'' if len(found) == 1 else 's'}.")
        rows = [[*_row(finding, during.get("acknowledged", {})), _epochs(finding)] for finding in found]
        tables += _table("While it trained", (*_COLUMNS, "epochs"), rows)
    not_run = [[each["rule"], each["name"], _shown(each["why"])] for each in (before or {}).get("not_run", [])]
    not_run += [[rule, "while it trains", _shown(why)] for rule, why in (during or {}).get("not_watched", {}).items()]
    tables += _table("Not looked at", ("rule", "check", "why"), not_run)
    return {"title": "Findings", "text": " ".join(sentences), "tables": tables}


def _row(finding: Mapping[str, Any], acknowledged: Mapping[str, str]) -> list[Any]:
    cases = [str(case) for case in finding.get("cases", ())]
    named = ", ".join(cases[:MOST_CASES]) + (f" and {len(cases) - MOST_CASES} more" if len(cases) > MOST_CASES else "")
    texts = [_shown(finding[key]) for key in ("what", "measured", "threshold", "fix")]
    reason = finding.get("acknowledged") or acknowledged.get(finding["rule"]) or ""
    return [finding["rule"], finding["severity"], *texts, named, reason]


def _epochs(finding: Mapping[str, Any]) -> str:
    first, last = finding["first_epoch"], finding["last_epoch"]
    phase = f"{finding['phase']}: " if finding.get("phase") else ""
    return f"{phase}{first}" if first == last else f"{phase}{first} to {last}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    return [{"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}] if rows else []


def _shown(text: Any) -> str:
    return _PATH.sub("…/", str(text))
