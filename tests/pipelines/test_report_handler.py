"""The end of an evaluation: cases.json, the report, and no failure of numbers because of a picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from report_runs import Page, masks

from pipelines.manifests import Label
from pipelines.reports import WriteReport, handler
from pipelines.training import CaseMetrics
from pipelines.training import evaluation as evaluation_module

LABELS = [Label(0, "background", "#000000", (0,)), Label(1, "lesion", "#e69f00", (255,))]
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def items_on_disk(folder: Path) -> list[dict[str, Any]]:
    """Write two cases with a missing first modality; label files say 255 for the lesion."""
    items = []
    for case, overlap in (("p1", 2), ("p2", 0)):
        truth, prediction = (np.where(mask == 1, 1, 0) for mask in masks(overlap))
        image = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
        paths = {}
        for name, voxels in (("flair", image), ("label", (255 * truth).astype(np.uint8))):
            paths[name] = folder / "data" / case / f"{name}.nii.gz"
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, AFFINE), paths[name])
        mask = folder / "run" / "predictions" / f"{case}.nii.gz"
        mask.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(prediction.astype(np.uint8), AFFINE), mask)
        about = {"case": case, "subject": case, "image": [None, str(paths["flair"])], "channels": [None, None]}
        arrays = {"truth": truth, "prediction": prediction}
        items.append({**about, "reference": str(paths["label"]), "label_values": [[0, 0], [255, 1]], "arrays": arrays})
    return items


def evaluator(items: list[dict[str, Any]], handlers: list[Any]) -> Engine:
    """Return an engine that gives what a bundle's evaluator gives, a case at a time."""

    def step(engine: Engine, batch: Any) -> list[dict[str, Any]]:
        item = items[engine.state.iteration - 1]
        affine = torch.as_tensor(AFFINE)
        reference = MetaTensor(torch.as_tensor(item["arrays"]["truth"])[None], affine=affine)
        engine.state.batch = [{"case": item["case"], "reference": reference}]
        image = MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": item["image"][1]})
        return [{"pred": torch.as_tensor(item["arrays"]["prediction"])[None], "image": image}]

    engine = Engine(step)
    engine.data_loader = range(len(items))  # type: ignore[attr-defined]
    for own in handlers:
        own.attach(engine)
    return engine


def handlers_of(folder: Path, items: list[dict[str, Any]]) -> list[Any]:
    metrics = folder / "run" / "metrics"
    subjects = {item["case"]: item["subject"] for item in items}
    source = {"cohort": "c", "split": "test", "fold": None, "manifest_digest": "d", "weights_sha256": "w"}
    return [
        CaseMetrics(LABELS, 1.0, metrics, subjects, source),
        WriteReport(metrics, folder / "run" / "predictions", items, LABELS),
    ]


def test_an_evaluation_ends_with_a_report(tmp_path: Path) -> None:
    items = items_on_disk(tmp_path)
    evaluator(items, handlers_of(tmp_path, items)).run(range(2))
    about = json.loads((tmp_path / "run" / "metrics" / "cases.json").read_text())
    assert about["label_values"] == [[0, 0], [255, 1]]
    assert about["cases"]["p1"] == {
        "image": "../../data/p1/flair.nii.gz",
        "channel": None,
        "reference": "../../data/p1/label.nii.gz",
        "prediction": "../predictions/p1.nii.gz",
        # truth x 3-6 at y = 4, z = 5; x 3 and 4 are missed
        "largest_error": {"slices": [3, 4, 5], "wrong_voxels": [1, 2, 2]},
    }
    page = Page((tmp_path / "run" / "report" / "index.html").read_text())
    assert page.text.index("1. p2 lesion missed") < page.text.index("2. p1 lesion 0.667")
    assert sum(name == "src" for _, name, _ in page.attributes) == 6
    assert (tmp_path / "run" / "metrics" / "overlays" / "p1.png").is_file()


def test_run_and_data_can_move_together(tmp_path: Path) -> None:
    items = items_on_disk(tmp_path / "before")
    evaluator(items, handlers_of(tmp_path / "before", items)).run(range(2))
    (tmp_path / "before").rename(tmp_path / "after")
    page = Page(handler.write_report([tmp_path / "after" / "run"]).read_text())
    assert sum(name == "src" for _, name, _ in page.attributes) == 6


def test_no_picture_is_a_warning_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(evaluation_module, "save_overlay_figure", fails)
    monkeypatch.setattr(handler, "write_report", fails)
    items = items_on_disk(tmp_path)
    with caplog.at_level(logging.WARNING):
        evaluator(items, handlers_of(tmp_path, items)).run(range(2))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "case p1: no overlay (ValueError: no ink)" in warnings
    assert f"no report of {tmp_path / 'run' / 'metrics'}: no ink" in warnings
    assert json.loads((tmp_path / "run" / "metrics" / "summary.json").read_text())["n_cases"] == 2
