"""The model card of an export: what these weights are for, what they reached on what, where they fail.

Everything in it is taken from the run's record, the cohort and the evaluation; only the words on use and limits are
the bundle's own (``configs/export.yaml``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.export.privacy import Pseudonyms, described_cohort, scrubbed
from pipelines.export.results import travelling_record, worst_cases
from pipelines.export.source import TrainedRun
from pipelines.reports.html import format_number
from pipelines.reports.ranking import better
from pipelines.reports.tables import summary_rows

MOST_ROWS = 60
NOT_IN_CARD = ("labels", "landmarks", "bundle")  # of the contract: said elsewhere, or long
COPIES = {
    "models/model.safetensors": "the weights, canonical; nothing is executed when they are read",
    "models/model.pt2": "the network as an exported program, bit-exact reference, without our classes",
    "models/model.onnx": "for onnxruntime and OpenVINO",
    "models/model.ts": "TorchScript trace, for older runtimes alone",
    "models/parity.json": "by how much each of them differs from the original",
}


def render_card(
    run: TrainedRun,
    names: Pseudonyms,
    metadata: Mapping[str, Any],
    at_export: Mapping[str, Any],
    words: Mapping[str, Sequence[str]],
    files: Sequence[str],
) -> str:
    """Return the model card as Markdown.

    Args:
        run: that is exported.
        names: pseudonyms of its cases.
        metadata: of the export.
        at_export: record of the battery at export.
        words: ``out_of_scope`` and ``limits``, a list of sentences each.
        files: of the export, by name.
    """
    record = travelling_record(run, names)
    metric, worst = worst_cases(run, names)
    rows = [] if run.summary is None else _judged(summary_rows(run.summary))
    found = all_findings(record, scrubbed(at_export, names))
    not_measured = [finding["acknowledged"] for finding in found if finding["rule"] == "R42"]
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            metadata=metadata,
            weights=run.weights_sha256,
            out_of_scope=words["out_of_scope"],
            limits=words["limits"],
            cohort=described_cohort(run.cohort, names),
            contract=[(key, _plain(value)) for key, value in run.contract.items() if key not in NOT_IN_CARD],
            summary=run.summary,
            source={} if run.summary is None else run.summary.get("source", {}),
            why_not_measured=" ".join(not_measured),
            rows=rows[:MOST_ROWS],
            more_rows=max(0, len(rows) - MOST_ROWS),
            ranked_by=metric,
            worst=worst,
            training=_training(record),
            command=" ".join(record["command"]),
            checks=", ".join(f"{count} {status}" for status, count in _checks(record).items()) or "no preflight",
            findings=found,
            copies=[(name, what) for name, what in COPIES.items() if name in files],
        )
    )


def all_findings(record: Mapping[str, Any], at_export: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the findings of a run's whole life, each with when it was made and why it was accepted."""
    stages = {"before": record.get("preflight", {}), "training": record.get("watchdogs", {}), "export": at_export}
    return [
        {**finding, "when": when, "acknowledged": stage.get("acknowledged", {}).get(finding["rule"], "")}
        for when, stage in stages.items()
        for finding in stage.get("findings", [])
    ]


def _checks(record: Mapping[str, Any]) -> Mapping[str, int]:
    return record.get("preflight", {}).get("checks", {})


def _judged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows whose metric says how good a result is, and that have a value."""
    return [row for row in rows if row["mean"] is not None and better(row["metric"]) is not None]


def _training(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    outcome, machine = record["outcome"], record.get("machine", {})
    pairs = {
        "started": record.get("started"),
        "commit": record.get("commit"),
        "digest of the code": record.get("code_digest"),
        "seed": record.get("seed"),
        "machine": _plain(machine),
        "GPUs": ", ".join(record.get("gpus", [])) or "none",
        "platform": record.get("platform"),
        "versions": _plain(record.get("versions", {})),
        "epochs, steps, minutes": ", ".join(format_number(outcome.get(key)) for key in ("epochs", "steps", "minutes")),
        "best validation": f"{format_number(outcome.get('best_metric'))} in epoch {outcome.get('best_epoch')}",
    }
    return [(key, str(value)) for key, value in pairs.items() if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value) or "none"
    return str(value)


def _cell(text: Any) -> str:
    """Return a text that stays in its cell and is no markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipelines.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    environment.filters["number"] = format_number
    return environment
