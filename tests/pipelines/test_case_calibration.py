"""Calibration of a whole evaluation: pooled over cases by hand, air left out, and no case lost in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from pipelines.manifests import Label
from pipelines.metrics.calibration import calibration_figures, count_calibration
from pipelines.training import CaseCalibration

LABELS = [
    Label(0, "background", "#000000", (0,)),
    Label(1, "core", "#ff0000", (1,)),
    Label(2, "rim", "#00ff00", (2,)),
]


def case(name: str, probability: np.ndarray, truth: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    """Return a case as a bundle's evaluator leaves it: (K, X, Y), and (1, X, Y) twice."""
    arrays = {"probability": probability, "reference": truth[None], "foreground": inside[None]}
    return {"case": name, **{key: MetaTensor(torch.as_tensor(array)) for key, array in arrays.items()}}


def evaluate(folder: Path, cases: list[dict[str, Any]], labels: list[Label]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the panel that an evaluation of the cases writes, and its figures by label."""

    def step(engine: Engine, batch: Any) -> list[dict[str, Any]]:
        item = dict(cases[engine.state.iteration - 1])
        output = {"probability": item.pop("probability")}
        engine.state.batch = [item]
        return [output]

    engine = Engine(step)
    CaseCalibration(labels, folder).attach(engine)
    engine.run(range(len(cases)))
    panel = json.loads((folder / "calibration.json").read_text())
    (table,) = panel["tables"]
    return panel, {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}


def test_by_hand_over_two_cases(tmp_path: Path) -> None:
    # the only label, of one channel. Case a: 0.75 in two voxels, one of them true, and a voxel of air that would be
    # right; case b: 0.75 in two voxels, both true. So 0.75 came true in 3 of 4: perfectly calibrated
    a = case("a", np.array([[[0.75, 0.75, 0.0]]]), np.array([[1, 0, 0]]), np.array([[1, 1, 0]]))
    b = case("b", np.array([[[0.75, 0.75]]]), np.array([[1, 1]]), np.array([[1, 1]]))
    panel, figures = evaluate(tmp_path, [a, b], LABELS[:2])
    assert panel["charts"][0]["series"] == {"core": [[0.75, 0.75]]}
    assert (figures["core"]["n_voxels"], figures["core"]["ece"]) == (4, 0)
    assert figures["core"]["brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    _, alone = evaluate(tmp_path, [a], LABELS[:2])
    assert alone["core"]["ece"] == 0.25


def test_every_label_has_its_channel_and_cases_are_pooled(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    cases, probabilities, truths = [], [], []
    for number, shape in enumerate([(5, 6), (9, 4), (3, 3)]):
        probability = np.moveaxis(draw.dirichlet(np.ones(3), shape), -1, 0).astype(np.float32)
        truth, inside = draw.integers(0, 3, shape), draw.random(shape) < 0.7
        cases.append(case(str(number), probability, truth, inside))
        probabilities.append(probability[:, inside])
        truths.append(truth[inside])
    together, truth = np.concatenate(probabilities, axis=1), np.concatenate(truths)
    panel, figures = evaluate(tmp_path, cases, LABELS)
    assert list(panel["charts"][0]["series"]) == list(figures) == ["core", "rim"]
    for label in (1, 2):
        expected = calibration_figures(count_calibration(together[label], truth == label))
        found = figures[LABELS[label].name]
        assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_case_without_probabilities_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = case("good", np.array([[[0.75]]]), np.array([[1]]), np.array([[1]]))
    broken = case("broken", np.array([[[np.nan]]]), np.array([[1]]), np.array([[1]]))
    logits = case("logits", np.array([[[2.5]]]), np.array([[1]]), np.array([[1]]))
    with caplog.at_level(logging.WARNING):
        panel, figures = evaluate(tmp_path, [broken, good, logits], LABELS[:2])
    assert figures["core"]["n_voxels"] == 1
    assert panel["text"].endswith("Left out, for the reason in the log: broken, logits.")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "case broken is left out of the calibration",
        "case logits is left out of the calibration",
    ]
    _, none = evaluate(tmp_path, [broken], LABELS[:2])
    assert (none["core"]["n_voxels"], none["core"]["ece"]) == (0, None)
