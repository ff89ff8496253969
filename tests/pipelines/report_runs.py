"""A small run folder as an evaluation leaves it, and a reader of pages that knows their tables, links and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pipelines.metrics.summary import summarise
from pipelines.reports.gallery import largest_error_slices
from pipelines.reports.tables import write_per_case_csv, write_summary_json

SHAPE, SPACING_MM = (12, 10, 8), (1.0, 2.0, 3.0)
LABELS = [
    {"id": 0, "name": "background", "colour": "#000000"},
    {"id": 1, "name": "lesion", "colour": "#e69f00"},
    {"id": 2, "name": "oedema", "colour": "#56b4e9"},
]
VOID = {"meta", "line", "circle", "rect", "polyline", "img", "br", "link"}


def masks(overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Return truth (4 voxels of label 1 along x, 2 of label 2) and a prediction that has ``overlap`` of the 4."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[3:7, 4, 5] = 1
    truth[8, 2:4, 1] = 2
    prediction = truth.copy()
    prediction[3 : 7 - overlap, 4, 5] = 0
    return truth, prediction


def dice(truth: np.ndarray, prediction: np.ndarray, label: int) -> float:
    both = np.count_nonzero((truth == label) & (prediction == label))
    return 2 * both / (np.count_nonzero(truth == label) + np.count_nonzero(prediction == label))


def write_run(
    run: Path,
    overlaps: Mapping[str, int],
    labels: Sequence[Mapping[str, Any]] = LABELS[:2],
    affine: np.ndarray | None = None,
) -> Path:
    """Write results, images and masks of cases with the given overlap of 4 voxels (Dice = 2 n / (4 + n) or 0)."""
    rows, cases = [], {}
    affine = np.diag([*SPACING_MM, 1.0]) if affine is None else affine
    for number, (case, overlap) in enumerate(overlaps.items()):
        truth, prediction = masks(overlap)
        image = np.random.default_rng(number).normal(100, 10, SHAPE).astype(np.float32)
        files = {"image": "image", "reference": "truth", "prediction": "mask"}
        for key, voxels in (("image", image), ("truth", truth), ("mask", prediction)):
            path = run.parent / "data" / f"{run.name}_{number}_{key}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, affine), path)
        slices, wrong = largest_error_slices(truth, prediction)
        cases[case] = {
            **{key: f"../../data/{run.name}_{number}_{name}.nii.gz" for key, name in files.items()},
            "channel": None,
            "largest_error": {"slices": list(slices), "wrong_voxels": list(wrong)},
        }
        for label in labels[1:]:
            value = dice(truth, prediction, label["id"])
            row = {"case": case, "subject": f"Jane Doe {number}", "label": label["name"]}
            rows.append(
                {**row, "status": "both" if value else "missed", "dice": value, "volume_ml": 0.024, "hd95_mm": 7.5 / 3}
            )
    source = {"cohort": "small", "split": "test", "fold": None, "manifest_digest": "d1", "weights_sha256": "w1"}
    folder = run / "metrics"
    write_per_case_csv(rows, folder / "per_case.csv")
    write_summary_json({"source": source, **summarise(rows, n_resamples=50)}, folder / "summary.json")
    about = {"labels": list(labels), "label_values": [[0, 0], [1, 1], [2, 2]], "cases": cases}
    (folder / "cases.json").write_text(json.dumps(about))
    (run / "record.json").write_text(json.dumps(record()))
    return run


def record() -> dict[str, Any]:
    """Return the record of a finished run, resumed once, with a skipped step and a bad case."""
    history = [
        {"epoch": 1, "loss": 1.5, "mean_dice": None, "n_missed_lesion": 0.0},
        {"epoch": 2, "loss": 1.0, "mean_dice": 0.5, "n_missed_lesion": 0.0},
        {"epoch": 3, "loss": 0.7, "mean_dice": 0.6, "n_missed_lesion": 0.0},
    ]
    return {
        "command": ["fiducial", "train", "some_bundle"],
        "python": "3.11.7",
        "versions": {"monai": "1.6.1", "torch": "2.13.0"},
        "gpus": [],
        "machine": {"device": "cpu", "threads": 2},
        "cohort": "small",
        "manifest_digest": "d1",
        "seed": 17,
        "resumed": [{"at": "2026-11-20T10:00:00", "command": ["x"], "despite": {"machine": ["threads was 4, now 2"]}}],
        "outcome": {
            "phase": "all",
            "epochs": 3,
            "steps": 30,
            "best_metric": 0.6,
            "best_epoch": 3,
            "skipped_steps": 2,
            "bad_cases": {"p07": 3},
            "history": history,
        },
    }


class Page(HTMLParser):
    """What a page says: ``tables`` of rows of cells {text, value}, texts, attributes, and frames (``srcdoc``)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[dict[str, Any]]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.frames: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = dict(attributes)
        for name, value in attributes:
            self.attributes.append((tag, name, value or ""))
        if known.get("srcdoc"):
            self.frames.append(known["srcdoc"] or "")
        self.scripts += tag == "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append({"text": "", "value": known.get("data-value")})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.code.append(data)
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1]["text"] += data.strip()

    @property
    def text(self) -> str:
        """All texts, white space collapsed."""
        return " ".join(" ".join(self.texts).split())

    def table(self, *heads: str) -> list[list[dict[str, Any]]]:
        """Return the rows of the first table whose first heads are these."""
        for rows in self.tables:
            if [cell["text"] for cell in rows[0][: len(heads)]] == list(heads):
                return rows[1:]
        raise AssertionError(f"no table {heads}")
