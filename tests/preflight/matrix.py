"""The failure catalogue as shipped: every rule with a planted failure that it found and a healthy run that it let pass.

    python tests/preflight/matrix.py -o docs/failure-catalogue.md

Collects ``PROOFS`` of every ``proof_*.py`` beside this file, runs both halves of each, and writes the table.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # before tests/, which has folders called transforms and pipelines too
sys.path += [str(folder) for folder in (HERE, HERE.parent, HERE.parent / "pipelines", HERE.parent / "bundles")]

from planted import Proof, Run  # noqa: E402

from pipelines.files import write_atomically  # noqa: E402
from pipelines.preflight import Finding  # noqa: E402

TITLES = {
    "R01": "modalities on different scales",
    "R02": "training and validation on different intensities",
    "R03": "statistics taken at another stage than they are applied",
    "R04": "a window that saturates a region of interest",
    "R05": "a class without ground truth",
    "R06": "a wrong value to ignore",
    "R07": "patches without a valid voxel",
    "R08": "label, mask or map not moved with the image",
    "R09": "an implausible automatic mask",
    "R10": "geometry",
    "R11": "misregistration",
    "R12": "label tables that disagree",
    "R13": "leakage between splits",
    "R14": "missing or dropped files",
    "R15": "filters across a gap in the spectral grid",
    "R16": "memory",
    "R17": "partial annotation",
    "R18": "a dead or dominating loss term",
    "R19": "a loss that is not finite at its edges",
    "R20": "a broken path",
    "R21": "lost resolution",
    "R22": "a condition or an uncertainty without effect",
    "R23": "a wrong sampler",
    "R24": "configuration that nobody reads",
    "R25": "a network that breaks its output contract",
    "R26": "logits adjusted in training only, or in inference only",
    "R27": "class weights",
    "R28": "a metric that is wrong, or is fed the answer",
    "R29": "a checkpoint that cannot be resumed",
    "R30": "NaN in training",
    "R31": "collapse to one class",
    "R32": "a frozen metric",
    "R33": "an output that stands at its clamp",
    "R34": "no better than trivial",
    "R35": "not learning",
    "R36": "overfitting",
    "R37": "early stopping too early",
    "R38": "a best checkpoint that is not the best",
    "R39": "over- or under-prediction",
    "R40": "throughput",
    "R41": "learning rates or phases that are not the configured ones",
    "R42": "missing artefacts",
    "R43": "validation samples that change",
    "R44": "inconsistent instances",
    "R45": "the environment",
}
HEAD = """# The failure catalogue

Every row is a failure that really happened in a medical imaging project, and cost days because nothing complained. Here
each of them has a rule that names it. Each rule is proven twice: on a planted failure, which it must find, and on a
healthy run, at which it must stay quiet. How to run the rules, to accept a finding or to move a limit is in
[preflight.md](preflight.md).

Made by `python tests/preflight/matrix.py -o docs/failure-catalogue.md`, which runs every proof again.

| rule | failure | check | planted | healthy | what it says |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A line of the matrix: ``planted`` and ``healthy`` say what happened, ``proven`` whether that is right."""

    rule: str
    failure: str
    check: str
    planted: str
    healthy: str
    message: str
    proven: bool


def proofs() -> list[Proof]:
    """Return the proofs of all families, by rule."""
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("proof_*.py"))]
    return sorted((proof for module in modules for proof in module.PROOFS), key=lambda proof: proof.rule)


def row_of(proof: Proof) -> Row:
    """Run both halves of a proof; what breaks is said, and is no proof."""
    found, planted = _run(proof.planted)
    quiet, healthy = _run(proof.healthy)
    own = [finding for finding in found or () if finding.rule == proof.rule]
    if found is not None:
        planted = f"found ({own[0].severity})" if own else "**not found**"
    if quiet is not None:
        healthy = f"**{len(quiet)} false alarm{'' if len(quiet) == 1 else 's'}**" if quiet else "quiet"
    message = f"{own[0].what}: {own[0].measured}; expected {own[0].threshold}. Fix: {own[0].fix}" if own else ""
    proven = bool(own) and own[0].severity == proof.severity and quiet is not None and not quiet
    return Row(proof.rule, f"{TITLES[proof.rule]}: {proof.origin}", proof.check, planted, healthy, message, proven)


def markdown(rows: Sequence[Row]) -> str:
    """Return the page: a line per proof, and one for every rule that has none."""
    unproven = [Row(rule, title, "", "no proof", "no proof", "", False) for rule, title in TITLES.items()]
    having = {row.rule for row in rows}
    everyone = sorted([*rows, *(row for row in unproven if row.rule not in having)], key=lambda row: row.rule)
    lines = [
        "| " + " | ".join(_cell(text) for text in (r.rule, r.failure, r.check, r.planted, r.healthy, r.message)) + " |"
        for r in everyone
    ]
    count = len({row.rule for row in rows if row.proven} - {row.rule for row in rows if not row.proven})
    return HEAD + "\n".join(lines) + f"\n\n{count} of {len(TITLES)} rules proven, by {len(rows)} proofs.\n"


def _run(run: Run | Callable[[], Sequence[Finding]]) -> tuple[list[Finding] | None, str]:
    try:
        return list(run()), ""
    except Exception as problem:
        return None, f"**broke: {type(problem).__name__}: {problem}**"


def _cell(text: str) -> str:
    """Return a text for a cell: one line, no bar, no folder of this machine."""
    places = (str(ROOT), tempfile.gettempdir())
    for place in places:
        text = re.sub(rf"{re.escape(place)}(/[^\s/,;:'\"]+)*(?=/)", "…", text)
    return " ".join(text.replace("|", "\\|").split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the matrix; return 1 where something is not proven."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", help="file to write instead of printing")
    parser.add_argument("--rule", action="append", default=[], help="run the proofs of this rule alone")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    rows = []
    for proof in proofs():
        if not options.rule or proof.rule in options.rule:
            print(f"{proof.rule} {proof.check}", file=sys.stderr)
            rows.append(row_of(proof))
    page = markdown(rows)
    if options.output:
        write_atomically(options.output, page.encode())
    else:
        print(page)
    return 0 if rows and all(row.proven for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
