"""The rules on labels: hand-derived counts, thresholds from both sides, and the planted failures of the proofs."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.transforms import Compose

sys.path.append(str(Path(__file__).parent))
from planted import Proof
from proof_labels import (
    ORGANELLES,
    PROOFS,
    MaskedBce,
    UnknownAsZero,
    cores,
    crops,
    found_in,
    ignoring,
    lesion,
    plain_cross_entropy,
    union,
)

from pipelines.losses import CompositeLoss, DeepSupervisionLoss, segmentation_loss
from pipelines.losses.terms import cross_entropy_loss
from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.annotation import (
    check_mixing,
    gradient_where_unknown,
    mixed_without_intersection,
    unknown_as_background,
)
from pipelines.preflight.label_counts import Tally, channel_of, ignored_value, is_balanced, tally_of, thinned
from pipelines.preflight.labels import (
    check_patches,
    classes_without_truth,
    ignored_wrongly,
    patches_without_truth,
    valid_voxels,
    windows_of,
)
from pipelines.preflight.tables import colour_counts, contradicting_tables, unknown_values

R05 = {"share": 0.0001, "cases": 3}
R06 = {"background": 0.8, "labelled": 0.5}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_a_planted_failure_is_found_and_a_healthy_run_passes(proof: Proof) -> None:
    planted = proof.planted()
    assert planted
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert proof.healthy() == []


# --- R05


def tallies(*voxels: int, total: int = 10_000) -> list[Tally]:
    return [Tally(f"c{i}", {1: count}, total) for i, count in enumerate(voxels)]


@pytest.mark.parametrize(
    ("voxels", "severity"),
    [
        ((0, 0, 0, 0), "error"),
        ((1, 1, 1, 0), "warn"),  # 3 of 40,000 = .0075 %, below .01 %
        ((2, 1, 1, 0), None),  # 4 of 40,000 = .01 %
        ((200, 200, 0, 0), "warn"),  # two cases are less than three
        ((5, 5), None),  # of a split of two, both have it
        ((5, 0), "warn"),
    ],
)
def test_classes_just_below_and_above_the_limits(voxels: tuple[int, ...], severity: str | None) -> None:
    found = classes_without_truth("train", tallies(*voxels), {1: "lesion"}, R05)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert all("class 1 (lesion) in split train" in finding.what for finding in found)


def test_a_class_counts_only_where_somebody_has_looked_for_it() -> None:
    looked, not_looked = Tally("a", {1: 5, 2: 0}, 100), Tally("b", {1: 0, 2: 9}, 10**9, frozenset([1]))
    # class 1: 5 of 100 + 10^9 voxels; class 2: looked for in a alone, where it is not
    found = classes_without_truth("train", [looked, not_looked], {1: "er", 2: "nuc"}, R05)
    assert [(finding.severity, finding.what.split(" in ")[0]) for finding in found] == [
        ("warn", "class 1 (er)"),
        ("error", "class 2 (nuc)"),
    ]
    assert "annotated in 1" in found[1].measured


def test_voxels_are_counted_from_centres_only_where_these_are_all() -> None:
    label = np.zeros((1, 200, 200), np.uint8)
    label[0, :100] = 1
    few, thinned_out = np.zeros((7, 2)), np.zeros((10_001, 2))  # the second may be every other of 20,002
    assert tally_of({"case": "a", "label": label, "centres_1": few}, [1]).voxels == {1: 7}
    assert tally_of({"case": "a", "label": label, "centres_1": thinned_out}, [1]).voxels == {1: 20_000}


def test_channels_are_counted_without_what_is_unknown() -> None:
    label = np.stack([np.full((2, 2), np.nan), np.eye(2)]).astype(np.float32)
    assert tally_of({"label": label, "annotated": [5]}, [3, 5]) == Tally("", {3: 0, 5: 2}, 4, frozenset([5]))
    assert [channel_of(5, [3, 5], channels) for channels in (2, 3)] == [1, 2]  # without and with a background


def test_a_share_of_the_validation_tells_nothing_about_a_class() -> None:
    one_of_two = SimpleNamespace(cases=[{"case": "a", "label": np.ones((1, 2, 2))}], n_cases=2)
    with pytest.raises(CannotRun, match="1 of the 2 cases of validation"):
        found_in(replace(lesion(), validation=one_of_two), "R05", "classes of the validation")
    with pytest.raises(CannotRun, match="0 of the 0 cases"):
        found_in(replace(lesion(), validation=SimpleNamespace(cases=[])), "R05", "classes of the validation")


# --- R06


@pytest.mark.parametrize(
    ("shares", "ignored", "labelled", "balanced", "found"),
    [
        ({0: 0.95, 1: 0.05}, -100, 0.05, True, ["ignored value -100 is in no label"]),
        ({0: 0.95, 1: 0.05}, None, 0.05, True, ["no value is ignored"]),
        ({0: 0.95, 1: 0.05}, 0, 0.05, False, []),
        ({0: 0.51, 1: 0.49}, -100, 0.51, False, []),  # at least half is labelled
        ({0: 0.51, 1: 0.49}, -100, 0.49, False, ["in no label"]),
        ({0: 0.80, 1: 0.20}, None, 1.0, False, ["nothing balances"]),
        ({0: 0.79, 1: 0.21}, None, 1.0, False, []),
        ({0: 0.99, 1: 0.01}, None, 1.0, True, []),
        ({0: 0.40, 1: 0.10, 255: 0.5}, 255, 1.0, False, ["nothing balances"]),  # .4 / (.4 + .1) = 80 %
    ],
)
def test_ignored_values(shares: dict, ignored: int | None, labelled: float, balanced: bool, found: list[str]) -> None:
    findings = ignored_wrongly(shares, ignored, labelled, balanced, R06)
    assert len(findings) == len(found)
    assert all(words in finding.what for words, finding in zip(found, findings, strict=True))


def test_what_a_loss_ignores_and_balances_is_read_from_it() -> None:
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce", ignore_index=255))
    assert (ignored_value(loss), is_balanced(loss)) == (255, True)
    assert (ignored_value(plain_cross_entropy("")), is_balanced(plain_cross_entropy(""))) == (None, False)
    assert is_balanced(torch.nn.CrossEntropyLoss(weight=torch.ones(2)))
    assert ignored_value(torch.nn.CrossEntropyLoss()) == -100


def test_cross_entropy_alone_on_lesions_is_found() -> None:
    (finding,) = found_in(replace(lesion(), loss=plain_cross_entropy), "R06")
    assert "nothing balances the classes" in finding.what


def test_an_unlabelled_class_that_enters_the_loss_is_found_whatever_balances_it() -> None:
    (finding,) = found_in(cores(ignoring(None), 1.0), "R06")
    assert finding.measured.startswith("1.8% of the voxels labelled")  # 2 x 36 of 4096


# --- R07


def test_patches_and_the_cases_they_come_from() -> None:
    patches = [("a", 0.5), ("b", 0.0), ("c", 0.0), ("b", 0.0)]
    (finding,) = patches_without_truth(patches, {"a": 0.5, "b": 0.0, "c": 0.009}, {"case": 0.01})
    assert finding.measured == "75.0% of the patches"
    assert finding.cases == ("b", "c")
    assert finding.evidence == {"without": ["b"], "few": ["c"]}
    assert patches_without_truth([("a", 1e-6)], {"a": 1e-6}, {"case": 0.01}) == []


def test_what_is_valid() -> None:
    label = np.array([[[0.0, 1.0], [255.0, np.nan]]])
    assert valid_voxels(label, None, ()).tolist() == [[True, True], [True, False]]
    assert valid_voxels(label, None, (0, 255)).tolist() == [[False, True], [False, False]]
    assert not valid_voxels(label, frozenset([0]), ()).any()  # nobody has looked for any class
    channels = np.array([[[np.nan, np.nan]], [[0.0, np.nan]]])
    assert valid_voxels(channels, None, ()).tolist() == [[True, False]]  # known in one channel is known


def test_the_windows_are_those_of_the_training() -> None:
    """The data set itself, without its random transforms, cuts the same voxels in its first epoch."""
    dataset = copy.copy(lesion().train)
    dataset.transform, dataset.crop_size, dataset.margin = Compose([]), (16, 12, 8), (0, 0, 0)
    dataset.set_epoch(1, 0)
    for index, (case, window) in enumerate(windows_of(dataset, 20)):
        source = next(c for c in dataset.cases if c.values["case"] == case).array("image")
        assert dataset[index]["case"] == case
        np.testing.assert_array_equal(dataset[index]["image"], source[(slice(None), *window)])


def test_a_core_without_labels_is_named() -> None:
    (finding,) = found_in(cores(ignoring(0), 1.0, labelled_only=False), "R07")
    assert finding.cases == ("core5",)
    assert finding.evidence["without"] == ["core5"]


def test_a_training_without_patches_cannot_be_checked() -> None:
    with pytest.raises(CannotRun, match="draws no patches"):
        check_patches(crops(MaskedBce()), {"patches": 10, "case": 0.01})


# --- R12


def test_tables_that_contradict_one_another() -> None:
    ours, theirs = {0: "background", 1: "rbc", 2: "wbc"}, {0: "background", 1: "wbc", 2: "rbc"}
    assert contradicting_tables({"manifest": ours, "contract": dict(ours)}, strict=("manifest", "contract")) == []
    (finding,) = contradicting_tables({"manifest": ours, "metadata": theirs}, strict=("manifest", "contract"))
    assert finding.severity == "warn"  # what a bundle declares is an example; a run's own tables have to be equal
    assert "id 1: rbc in the manifest, wbc in the metadata" in finding.measured
    # other names, or fewer, are another vocabulary; where tables have to be equal they are a contradiction
    assert contradicting_tables({"manifest": ours, "metadata": {0: "background", 1: "cell"}}) == []
    (finding,) = contradicting_tables({"manifest": ours, "contract": {0: "background"}}, ("manifest", "contract"))
    assert (finding.severity, finding.measured.count("none in the contract")) == ("error", 2)


@pytest.mark.parametrize(("wrong", "found"), [(1, False), (2, True)])
def test_unknown_values_just_below_and_above_a_thousandth(wrong: int, found: bool) -> None:
    findings = unknown_values("case a", {0: 900, 1: 100 - wrong, 7: wrong}, {0, 1}, {"unknown": 0.001})
    assert [finding.evidence["values"] for finding in findings] == ([{"7": wrong}] if found else [])


def test_colours_of_an_annotation() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = (255, 0, 128)
    image[0, 1] = (254, 1, 127)  # what a JPEG makes of it
    counts = colour_counts(image)
    assert counts == {"#000000": 2, "#ff0080": 1, "#fe017f": 1}
    (finding,) = unknown_values("core 1", counts, {"#000000", "#ff0080"}, {"unknown": 0.001})
    assert "#fe017f" in finding.what
    assert finding.measured == "25.00% of the voxels"


def test_an_unknown_value_in_a_prepared_label_is_found() -> None:
    label = np.full((1, 4, 4), 9, np.uint8)
    labels = {"labels": [{"id": 0, "name": "background"}]}
    wrong = Inspection("instances", contract=labels, train=SimpleNamespace(cases=[{"case": "a", "label": label}]))
    (finding,) = found_in(wrong, "R12", "label values")
    assert finding.cases == ("case a",)


# --- R17


def test_unknown_in_one_label_for_all_classes() -> None:
    #            er er bg bg       er er ignored
    labels = {
        "said": (np.array([[1, 1, 0, 0]]), frozenset([1])),
        "left out": (np.array([[1, 1, 255, 255]]), frozenset([1])),
    }
    (finding,) = unknown_as_background(labels, [1, 2], {255})
    assert finding.cases == ("said",)
    assert finding.measured == "said: [2]"


def test_unknown_in_a_channel_of_its_own() -> None:
    unknown = np.stack([np.eye(2), np.full((2, 2), np.nan)])
    assert unknown_as_background({"a": (unknown, frozenset([1]))}, [1, 2], ()) == []
    assert len(unknown_as_background({"a": (np.nan_to_num(unknown), frozenset([1]))}, [1, 2], ())) == 1
    assert len(unknown_as_background({"a": (unknown, frozenset())}, [1, 2], ())) == 1  # er is not looked for either


def times_mask(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mask comes too late: NaN times 0 is NaN."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * torch.isfinite(target)).sum()


def with_mask(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * mask).sum() / mask.sum()


def ignores_mask(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


@pytest.mark.parametrize(
    ("loss", "found"),
    [(MaskedBce(), 0), (UnknownAsZero(), 1), (times_mask, 1), (with_mask, 0), (ignores_mask, 1)],
    ids=["removed", "as zero", "NaN times 0", "masked", "mask not used"],
)
def test_no_gradient_where_nobody_has_looked(loss: torch.nn.Module, found: int) -> None:
    target = torch.zeros(1, 3, 4, 4)
    target[:, 1] = torch.nan
    findings = gradient_where_unknown("bce", loss, target, [1])
    assert len(findings) == found
    assert all("channels [1]" in finding.what for finding in findings)


@pytest.mark.parametrize(
    ("inspection", "what"),
    [
        (lambda: crops(UnknownAsZero()), "teaches classes that are not annotated (channels [2])"),
        (lambda: crops(MaskedBce(), unknown=0.0), "as if they had none of classes that nobody has looked for"),
        (lambda: crops(MaskedBce(), mix=union), "takes classes [3] for annotated in both"),
    ],
    ids=["gradient", "encoding", "mixing"],
)
def test_partial_annotation_of_organelles(inspection: object, what: str) -> None:
    findings = found_in(inspection(), "R17")  # type: ignore[operator]
    assert any(what in finding.what for finding in findings)


def test_mixing() -> None:
    a, b = frozenset([1, 2]), frozenset([2, 3])
    assert mixed_without_intersection(lambda x, y: x & y, a, b) == []
    assert mixed_without_intersection(lambda x, y: [], a, b) == []
    (finding,) = mixed_without_intersection(lambda x, y: x | y, a, b)
    assert "[1, 3]" in finding.what
    unseen = replace(crops(MaskedBce(), mix=union), extra={})
    with pytest.raises(CannotRun, match="MixUp"):
        check_mixing(unseen, {})


def test_an_ignored_value_in_the_label_is_no_background() -> None:
    """Classes 1 to 3 in one label, 3 not looked for, and 255 wherever it might be: nothing to find."""
    loss = CompositeLoss({"ce": (1.0, cross_entropy_loss)}, ignore_index=255)
    label = np.array([[1, 2, 255, 255]], np.uint8)[None]
    cases = [{"case": "a", "label": label, "annotated": [1, 2]}]
    healthy = replace(
        crops(loss), task="segmentation", train=SimpleNamespace(cases=cases), contract={"labels": ORGANELLES}
    )
    assert found_in(healthy, "R17") == []
    cases[0]["label"] = np.where(label == 255, 0, label)
    assert len(found_in(healthy, "R17")) == 1


def test_a_thinned_array_keeps_its_channels() -> None:
    array = np.zeros((2, 100, 100, 100), np.uint8)
    assert thinned(array).shape[0] == 2
    assert 50_000 < thinned(array).size <= 250_000
    assert thinned(array[:, :4, :4, :4]).shape == (2, 4, 4, 4)
