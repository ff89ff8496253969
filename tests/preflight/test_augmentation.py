"""Augmentation: the judging functions on cases worked out by hand, what moves voxels, and the proofs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import (
    AdjustContrastd,
    Compose,
    Lambdad,
    NormalizeIntensityd,
    RandFlipd,
    RandGaussianNoised,
    RandLambdad,
)
from planted import Proof
from proof_augmentation import MOVES, PROOFS, with_more
from proof_intensity import findings, lesion_run

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.augmentation import (
    RULES,
    Draw,
    augmentation_findings,
    bending_findings,
    check_distance_maps,
    distance_map_findings,
    draw_of,
    horizontal_vertical,
    mode_share,
    moved_findings,
    moves_voxels,
    padding_findings,
    painted,
    pattern_of,
)

LIMITS = RULES[0].limits


def draws(n: int = 10, lifted: int = 0, mode: float = 0.0, shift: float = 0.0) -> list[Draw]:
    """Ten draws with minimum -2, mean 0, deviation 1, a quarter of the voxels background; some of them lifted."""
    floor = [-0.01 if index < lifted else -2.0 for index in range(n)]
    return [Draw(f"c{i}", "t1", (-2.0, floor[i]), (0.0, shift), (0.25, 0.25 + mode), 1.0) for i in range(n)]


def test_the_share_of_the_most_frequent_value() -> None:
    assert mode_share(np.array([1, 0, 0, 2])) == 0.5
    assert mode_share(np.ones(7)) == 1
    drawn = draw_of(np.array([-1.0, 0, 0, 1]), np.array([0.0, 0, 0, 1]), "a", "t1")
    assert (drawn.minimum, drawn.mean, drawn.mode_share) == ((-1, 0), (0, 0.25), (0.5, 0.75))


@pytest.mark.parametrize(
    ("some", "word"),
    [
        (draws(), ""),
        (draws(lifted=1), ""),  # one of ten is at the limit
        (draws(lifted=2), "lifts the minimum"),
        (draws(mode=0.099), ""),
        (draws(mode=0.101), "to one value"),
        (draws(shift=0.24), ""),
        (draws(shift=-0.26), "moves the mean"),
    ],
)
def test_augmentation_may_vary_but_not_shift(some: list[Draw], word: str) -> None:
    found = augmentation_findings(some, LIMITS)
    assert [word in finding.what for finding in found] == ([True] if word else [])


def test_a_dropped_modality_is_no_shift() -> None:
    dropped = [Draw("a", "t1", (-2.0, 0.0), (-0.9, 0.0), (0.25, 1.0), 1.0)] * 5
    assert not augmentation_findings(draws() + dropped, LIMITS)


def test_padding_is_the_background() -> None:
    background, share = {"t1": -3.0}, {"t1": 0.01}
    assert padding_findings(background, {"t1": 0.0}, share, 1e-3)
    assert not padding_findings(background, {"t1": -3.0}, share, 1e-3)
    assert not padding_findings(background, {"t1": 0.0}, {"t1": 0.0}, 1e-3)  # nothing came in from outside


@pytest.mark.parametrize(
    ("steps", "fires"),
    [
        ([AdjustContrastd("image", gamma=0.8), NormalizeIntensityd("image")], False),
        ([NormalizeIntensityd("image"), AdjustContrastd("image", gamma=0.8)], True),
        ([NormalizeIntensityd("image"), Lambdad("image", func=np.log1p)], True),
        ([NormalizeIntensityd("image"), RandLambdad("image", func=lambda x: torch.sqrt(x))], True),
        ([NormalizeIntensityd("image"), Lambdad("image", func=lambda x: x * 2)], False),
        ([NormalizeIntensityd("image"), Lambdad("label", func=torch.sqrt)], False),
    ],
)
def test_signed_values_are_not_bent(steps: list[Any], fires: bool) -> None:
    assert bool(bending_findings(Compose(steps))) is fires


def test_the_pattern_is_told_from_its_mirror_images_and_turns() -> None:
    for shape in ((40, 40, 40), (48, 56, 9), (64, 64)):
        for number in range(4):
            pattern = pattern_of(shape, number)[None]
            assert 0.05 < pattern.mean() < 0.6
            assert not moved_findings(pattern, pattern, "label", "the network")
            for axis in range(len(shape)):
                found = moved_findings(pattern, np.flip(pattern, 1 + axis), "label", "the network")
                assert found, (shape, number, axis)
            if min(shape) > 9:  # also where interpolation has blurred the image
                blurred = np.clip(pattern.astype(np.float32), 0.01, 0.99)
                assert not moved_findings(blurred, pattern, "label", "the network")
                assert moved_findings(blurred, np.flip(pattern, 1), "label", "the network")
        other = pattern_of(shape, 1)[None]
        assert moved_findings(pattern_of(shape, 0)[None], other, "label", "the network")
    square = pattern_of((40, 40, 40))[None]
    assert moved_findings(square, np.rot90(square, axes=(1, 2)), "label", "the network")


def test_an_interpolation_within_the_border_is_no_mismatch() -> None:
    # a step at 20 in the map, blurred over 19 .. 20 in the image
    label = (np.arange(40) >= 20).astype(np.float32)[None]
    image = label.copy()
    image[0, 19:21] = 0.3, 0.4
    assert not moved_findings(image, label, "label", "the network")
    assert moved_findings(np.roll(image, 6, axis=1), label, "label", "the network")


def test_single_voxels_may_round_to_the_other_side_where_the_image_was_interpolated() -> None:
    # 40 x 40 voxels, of which about 1300 are away from borders; .5 % of them are 6. A block of 5 x 10 in the map
    # alone has 1 x 6 voxels away from its border, one of 6 x 10 has 2 x 6.
    label = np.zeros((1, 40, 40), np.float32)
    label[0, 20:] = 1
    image = np.clip(label, 0.01, 0.99)
    label[0, 5:10, 5:15] = 1
    assert not moved_findings(image, label, "label", "the network")
    assert moved_findings((image > 0.5).astype(np.float32), label, "label", "the network")  # nothing was interpolated
    label[0, 10, 5:15] = 1
    assert moved_findings(image, label, "label", "the network")


def test_another_grid_is_a_finding() -> None:
    (found,) = moved_findings(np.zeros((1, 8, 8)), np.zeros((1, 8, 6)), "mask", "the network")
    assert "shape (8, 6)" in found.measured


def test_horizontal_and_vertical_maps_of_one_cell() -> None:
    # a cell of 2 x 4 pixels: offsets along a row -1.5 -.5 .5 1.5, scaled by 1.5; along a column -.5 .5, scaled by .5
    instances = np.zeros((4, 6), int)
    instances[1:3, 1:5] = 7
    horizontal, vertical = horizontal_vertical(instances)
    assert horizontal[1, 1:5] == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert vertical[1:3, 1].tolist() == [-1, 1]
    assert horizontal[0].tolist() == [0] * 6


@pytest.mark.parametrize(("difference", "fires"), [(0.0009, False), (0.0011, True)])
def test_maps_may_differ_by_a_thousandth(difference: float, fires: bool) -> None:
    instances = np.zeros((4, 6), int)
    instances[1:3, 1:5] = 1
    maps = horizontal_vertical(instances).astype(np.float64)
    maps[0, 1, 2] += difference
    assert bool(distance_map_findings(instances, maps, {"distance_map": 1e-3})) is fires


def mirrored(image: torch.Tensor) -> torch.Tensor:
    return torch.flip(torch.as_tensor(image), dims=[1])


def brightened(image: torch.Tensor) -> torch.Tensor:
    return image * 1.3


def test_what_moves_voxels_is_known_by_what_it_does() -> None:
    sample, _ = painted({"image": torch.zeros(1, 16, 16), "label": torch.zeros(1, 16, 16, dtype=torch.uint8)})
    assert moves_voxels(RandFlipd("image"), sample)
    assert moves_voxels(Lambdad("image", func=mirrored), sample)
    assert not moves_voxels(Lambdad("image", func=brightened), sample)
    assert not moves_voxels(RandGaussianNoised("image", prob=1.0), sample)


def test_a_function_that_mirrors_the_image_alone_is_found() -> None:
    (found,) = findings(MOVES, with_more(lesion_run(), Lambdad("image", func=mirrored)))
    assert found.what == "label is not where the image is when the network takes it"
    assert not findings(MOVES, with_more(lesion_run(), Lambdad(["image", "label"], func=mirrored)))


def test_a_sample_without_maps_cannot_be_judged() -> None:
    with pytest.raises(CannotRun, match="no map"):
        painted({"image": torch.zeros(1, 4, 4), "case": "a"})
    with pytest.raises(CannotRun, match="hv"):
        check_distance_maps(lesion_run(), {})
    with pytest.raises(CannotRun, match="train"):
        check_distance_maps(Inspection("instances"), {})


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_the_planted_failure_is_found_and_the_healthy_run_is_not(proof: Proof) -> None:
    planted = proof.planted()
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert list(proof.healthy()) == []
