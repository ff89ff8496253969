"""Fused images as samples for a lesion head: every rule comes up, the target is exact, the label is the lesion."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from numpy.testing import assert_allclose, assert_array_equal

from transforms import FUSION_RULES, FusionReferenced, RandFuseByRuled
from transforms.errors import BundleError
from transforms.fusion import REFERENCE_CHANNELS, ct_display, mri_display

SCALE = np.array([0, 400], np.float32)
SHAPE = (10, 9, 7)


def case() -> dict[str, Any]:
    """A ball of brain in a shell of bone, with a lesion; after ``FusionReferenced``."""
    draw = np.random.default_rng(5)
    radius = np.linalg.norm(np.indices(SHAPE).T - (np.array(SHAPE) - 1) / 2, axis=-1).T
    brain, bone = radius < 2.5, (radius >= 2.5) & (radius < 3.6)
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[4:6, 4:6, 3] = 1
    mri = np.where(brain, 200 + 100 * lesion, 30) + draw.normal(0, 5, SHAPE)
    ct = np.select([brain, bone], [35, 900], -1000) + draw.normal(0, 5, SHAPE)
    pair = MetaTensor(np.stack([mri, ct]).astype(np.float32), affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    masks = {"mask": brain[None], "bone": bone[None], "label": lesion[None]}
    return dict(FusionReferenced()({"case": "p1", "image": pair, "mri_scale": SCALE, **masks}))


def fuse(seed: int, probability: float = 0.34) -> tuple[dict[str, Any], str | None]:
    transform = RandFuseByRuled(target_probability=probability).set_random_state(seed=seed)
    return transform(case()), transform.rule


def test_the_target_is_that_of_the_reference_and_draws_nothing() -> None:
    transform = RandFuseByRuled(target_probability=1.0).set_random_state(seed=1)
    before = transform.R.get_state()[1].copy()
    whole = case()
    fused = transform(whole)
    assert_allclose(fused["image"][0], (whole["label"][0] + 1) / 2, atol=1e-6)
    assert_array_equal(transform.R.get_state()[1], before)
    assert transform.rule is None


def test_every_rule_gives_its_own_image() -> None:
    pair = np.asarray(case()["image"])
    seen = set()
    for seed in range(40):
        fused, rule = fuse(seed, probability=0.0)
        assert rule is not None
        expected = FUSION_RULES[rule](mri_display(pair[0], SCALE), ct_display(pair[1]), pair[1])
        assert_array_equal(np.asarray(fused["image"])[0], expected)
        seen.add(rule)
    assert seen == set(FUSION_RULES)


# 2000 draws: 0.34 +- 0.03 (three standard deviations are 0.032) of the target, each of six rules 0.11 +- 0.021.
def test_shares_are_those_asked_for() -> None:
    transform = RandFuseByRuled().set_random_state(seed=0)
    counts: Counter[str | None] = Counter()
    for _ in range(2000):
        transform.randomize()
        counts[transform.rule] += 1
    assert counts[None] / 2000 == pytest.approx(0.34, abs=0.032)
    for rule in FUSION_RULES:
        assert counts[rule] / 2000 == pytest.approx(0.66 / len(FUSION_RULES), abs=0.021)


def test_a_seed_gives_the_same_sample_again() -> None:
    (one, rule), (two, again), others = fuse(7), fuse(7), [fuse(seed)[1] for seed in range(20)]
    assert rule == again
    assert_array_equal(np.asarray(one["image"]), np.asarray(two["image"]))
    assert len(set(others)) > 3


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_label_is_the_lesion_and_the_container_stays(probability: float) -> None:
    whole = case()
    pair, reference = (np.asarray(whole[key]).copy() for key in ("image", "label"))
    fused = RandFuseByRuled(target_probability=probability)(whole)
    assert fused["image"].shape == (1, *SHAPE)
    assert fused["image"].dtype == torch.float32
    assert fused["label"].dtype == torch.uint8
    assert_array_equal(np.asarray(fused["label"])[0], reference[REFERENCE_CHANNELS.index("lesion")])
    assert np.asarray(fused["label"]).sum() == 4
    for key in ("image", "label"):
        assert isinstance(fused[key], MetaTensor)
        assert_array_equal(fused[key].affine, whole["image"].affine)
    assert_array_equal(np.asarray(whole["image"]), pair)
    assert_array_equal(np.asarray(whole["label"]), reference)


def test_an_image_after_the_condition_is_no_pair() -> None:
    wrong = {**case(), "image": np.zeros((4, *SHAPE), np.float32)}
    with pytest.raises(BundleError, match="4 channels, expected a pair"):
        RandFuseByRuled(target_probability=0.0)(wrong)


@pytest.mark.parametrize(("missing", "maker"), [("label", "FusionReferenced"), ("mri_scale", "MeasurePaird")])
def test_what_is_missing_is_named(missing: str, maker: str) -> None:
    with pytest.raises(BundleError, match=maker):
        RandFuseByRuled(target_probability=0.0)({key: v for key, v in case().items() if key != missing})


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_is_one(probability: float) -> None:
    with pytest.raises(BundleError, match="expected 0 to 1"):
        RandFuseByRuled(target_probability=probability)
