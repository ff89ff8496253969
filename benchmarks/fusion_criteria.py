"""Plot the validation of fusion trainings beside the criteria of success of the system that this bundle comes from.

Its criteria: after 20 epochs brain SSIM above .15, bone PSNR above 5 dB, bone SSIM above .05; after 50 epochs .50,
12 dB and .30. Our validation is stricter: inputs are degraded, the reference is the clean pair.

    .venv/bin/python benchmarks/fusion_criteria.py RUN [RUN ...] -o docs/images/fusion_criteria.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

CRITERIA = {
    "brain_ssim": ("brain SSIM", {20: 0.15, 50: 0.50}),
    "bone_psnr_db": ("bone PSNR, dB", {20: 5.0, 50: 12.0}),
    "bone_ssim": ("bone SSIM", {20: 0.05, 50: 0.30}),
}


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the epochs of a run that were validated."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    return [entry for entry in record["outcome"]["history"] if "brain_ssim" in entry]


def criteria_met(entries: list[dict[str, Any]], metric: str) -> list[tuple[int, float, float | None]]:
    """Return epoch, criterion and our figure at the last validation up to that epoch; None = not trained that long."""
    met = []
    for epoch, least in CRITERIA[metric][1].items():
        reached = [entry[metric] for entry in entries if entry["epoch"] <= epoch]
        trained = bool(entries) and entries[-1]["epoch"] >= epoch
        met.append((epoch, least, reached[-1] if reached and trained else None))
    return met


def main() -> None:
    """Draw the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG")
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(CRITERIA), figsize=(12, 3.4), layout="constrained")
    for axis, (metric, (title, criteria)) in zip(axes, CRITERIA.items(), strict=True):
        for run in options.runs:
            entries = validations(run)
            axis.plot([e["epoch"] for e in entries], [e[metric] for e in entries], marker="o", ms=3, label=run.name)
            for epoch, least, value in criteria_met(entries, metric):
                shown = "not trained that long" if value is None else f"{value:.3f}"
                print(f"{run.name}: {title} at epoch {epoch}: {shown} (criterion {least:g})")
        axis.scatter(
            list(criteria), list(criteria.values()), marker="_", s=400, color="black", label="origin's criteria"
        )
        axis.set(title=title, xlabel="epoch", ylim=(0, None))
    axes[0].legend(fontsize=8)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
