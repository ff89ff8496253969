"""Rules about metrics: known figures, answers in the input, merged cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import Proof
from proof_metrics import INPUT, METRIC, PREDICTION, PROOFS, RULES, Leaks, of
from proof_network import fusion, lesion

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.metrics import (
    expected_figures,
    judge_components,
    judge_inputs,
    judge_prediction,
    measure_components,
    segmentation_figures,
)
from pipelines.training import ValidationDice

LIMITS = {rule.name: rule.limits for rule in RULES}
MERGED = LIMITS["merged instances"]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


def test_figures_of_the_projects_dice() -> None:
    # a right case and an empty one: the empty one is left out, 1. A right case and a missed one: (1 + 0) / 2.
    metric = ValidationDice({1: "core", 2: "edge"})
    figures = segmentation_figures(metric, [1, 2])
    assert [figure.measured for figure in figures] == [1.0, 1.0, 0.5]
    assert [figure.expected for figure in figures] == [1.0, *expected_figures("worst")]
    assert expected_figures("exclude") == (1.0, 1.0)


def test_a_metric_of_the_wrong_class_is_found() -> None:
    class Background(ValidationDice):
        """Scores whatever is not the label: a missed case is nearly right."""

        def _label_map(self, item: dict[str, torch.Tensor], key: str) -> torch.Tensor:
            return (item[key][0] == 0).int()

    (finding,) = of(METRIC, replace(lesion(), metrics={"dice": Background({1: "lesion"})}))
    assert "missed" in finding.what or "without any label" in finding.what


def test_the_runs_metric_keeps_its_cases() -> None:
    metric = ValidationDice({1: "lesion"})
    truth = torch.ones(1, 4, 4, dtype=torch.int)
    metric.update([{"pred": truth, "label": truth}])
    of(METRIC, replace(lesion(), metrics={"dice": metric}))
    assert metric.compute() == 1.0


def test_metrics_that_do_not_say_their_keys_are_not_judged() -> None:
    with pytest.raises(CannotRun, match="keys"):
        of(METRIC, replace(lesion(), metrics={"dice": object()}))


def test_a_copy_of_the_truth_in_any_scale_is_found() -> None:
    draw = np.random.default_rng(0)
    truth = (draw.random((8, 8, 8)) > 0.8).astype(float)
    image = draw.random((2, 8, 8, 8))
    limits = LIMITS[INPUT]
    assert judge_inputs(image, {"lesion": truth}, "a", limits) == []
    for scaled in (truth, 5 * truth - 1, 1 - truth):
        (finding,) = judge_inputs(np.stack([image[0], scaled]), {"lesion": truth}, "a", limits)
        assert finding.cases == ("a",)
        assert "channel 1" in finding.what
    # bright lesions are no leak, an empty mask says nothing
    assert judge_inputs(image + truth, {"lesion": truth}, "a", limits) == []
    assert judge_inputs(0 * image, {"lesion": 0 * truth}, "a", limits) == []


def test_the_target_in_the_condition_is_found() -> None:
    leaking = replace(fusion(), train=Leaks(fusion().train, channel=0, position=4))
    (finding,) = of(INPUT, leaking)
    assert "x0" in finding.what
    lesions = replace(lesion(), train=Leaks(lesion().train, channel=0, position=1))
    assert "label 1" in of(INPUT, lesions)[0].what


def test_a_leak_in_validation_alone_is_found() -> None:
    leaking = replace(fusion(), validation=Leaks(fusion().validation, channel=0, position=4))
    assert of(INPUT, leaking) == []
    (finding,) = of(PREDICTION, leaking)
    assert "channel 4" in finding.what


def test_shared_memory_and_equality() -> None:
    truth = torch.tensor([0, 1, 1, 0])
    assert judge_prediction(truth.clone() * 2, truth) == []
    assert "memory" in judge_prediction(truth[1:], truth)[0].measured
    assert "equal" in judge_prediction(truth.clone(), truth, "a")[0].measured
    assert judge_prediction(torch.zeros(4), torch.zeros(4)) == []  # nothing there, and nothing found: right
    assert judge_prediction(truth.numpy(), truth)


@pytest.mark.parametrize(("merged", "number"), [(5, 0), (6, 1)])
def test_share_of_merged_cells_at_its_limit(merged: int, number: int) -> None:
    # 100 cells of 50 pixels; a merged one has more than one and a half medians, and a waist
    areas = [76.0] * merged + [50.0] * (100 - merged)
    solidities = [0.89] * merged + [0.9] * (100 - merged)
    assert len(judge_components(areas, solidities, MERGED)) == number


def test_large_cells_alone_and_ragged_cells_alone_are_none_grown_together() -> None:
    assert judge_components([101.0] * 20 + [50.0] * 80, [0.95] * 100, MERGED) == []
    assert judge_components([50.0] * 100, [0.8] * 20 + [0.95] * 80, MERGED) == []
    assert judge_components([75.0] * 20 + [50.0] * 80, [0.8] * 20 + [0.95] * 80, MERGED) == []  # one and a half medians


def test_an_image_at_another_magnification_holds_no_merged_cells() -> None:
    # 30 cells of 400 pixels beside 70 of 50, all a little ragged; within each image they are all alike
    areas, images = [400.0] * 30 + [50.0] * 70, [0] * 30 + [1] * 70
    assert judge_components(areas, [0.89] * 100, MERGED, images=images) == []
    assert judge_components(areas, [0.89] * 100, MERGED)


def test_the_typical_cell_is_a_convex_one_even_where_most_are_joined() -> None:
    # 6 of 10 are pairs: their median is a pair, that of the convex ones a single cell
    assert judge_components([100.0] * 60 + [50.0] * 40, [0.84] * 60 + [0.95] * 40, MERGED)


def test_an_instance_whose_shape_was_not_measured_does_not_count() -> None:
    areas = [101.0] * 10 + [50.0] * 90
    solidities = [0.8] * 5 + [float("nan")] * 5 + [0.95] * 45 + [float("nan")] * 45
    assert "10.0 % of 50" in judge_components(areas, solidities, MERGED)[0].measured


def test_large_cells_of_another_class_are_not_merged() -> None:
    areas, classes = [200.0] * 30 + [50.0] * 70, [2] * 30 + [1] * 70
    assert judge_components(areas, [0.89] * 100, MERGED, classes) == []
    assert judge_components(areas, [0.89] * 100, MERGED)
    assert judge_components([50.0] * 10 + [200.0] * 9, [0.89] * 19, MERGED) == []  # too few to say


def test_areas_and_solidity_by_hand() -> None:
    # a square of 16 pixels fills its hull; an L of 7 in a square of 4 x 4 has a hull of 13: 4 + 4 + 3 + 2
    ids = np.zeros((12, 12), int)
    ids[1:5, 1:5] = 1
    ids[6:10, 1], ids[9, 1:5] = 2, 2
    ids[6, 6:11] = 3  # a line has no hull of its own
    areas, solidities = measure_components(ids)
    assert areas.tolist() == [16, 7, 5]
    assert solidities[0] == pytest.approx(1.0)
    assert solidities[1] < 0.9
    assert solidities[2] == 1.0


def test_cases_without_instances_are_not_judged() -> None:
    class Images:
        cases = ({"case": "a"},)

    with pytest.raises(CannotRun, match="instances"):
        next(rule for rule in RULES if rule.id == "R44").check(Inspection("instances", train=Images()), MERGED)
