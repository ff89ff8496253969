"""Losses by hand, against MONAI, at the edges of floating point, and with most of the image ignored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from torch.nn import functional as F

from pipelines.losses import (
    SEGMENTATION_LOSSES,
    CompositeLoss,
    DeepSupervisionLoss,
    cross_entropy_loss,
    focal_loss,
    log_cosh,
    log_cosh_dice_loss,
    prepare_voxels,
    segmentation_loss,
    soft_dice_loss,
)
from transforms.errors import BundleError, DataError

NAMES = sorted(SEGMENTATION_LOSSES)
TINY = 1e-9  # a smoothing that leaves hand-computed values alone


def random_case(classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, 4, 5, 6, generator=generator)
    return logits, torch.randint(0, max(2, classes), (2, 1, 4, 5, 6), generator=generator)


def perfect_logits(target: torch.Tensor, classes: int = 2) -> torch.Tensor:
    return 80.0 * F.one_hot(target[:, 0].clamp(0, classes - 1), classes).movedim(-1, 1) - 40.0


# ---------------------------------------------------------------------------------------------------------- by hand


def test_dice_of_four_voxels() -> None:
    # probability of the lesion  .9  .6 | .2  .5      sum(p y) = .9 + .2 = 1.1, sum(p) = 2.2, sum(y) = 2
    # truth                       1   0 |  1   0      Dice = 2.2 / 4.2
    p = torch.tensor([0.9, 0.6, 0.2, 0.5])
    logits = torch.stack([(1 - p).log(), p.log()]).view(1, 2, 2, 2)
    target = torch.tensor([1, 0, 1, 0]).view(1, 1, 2, 2)
    voxels = prepare_voxels(logits, target)
    assert soft_dice_loss(voxels, smooth=TINY).item() == pytest.approx(1 - 2.2 / 4.2, abs=1e-6)
    # background: sum(q y) = .4 + .5 = .9, sum(q) = 1.8, sum(y) = 2
    both = soft_dice_loss(voxels, smooth=TINY, include_background=True).item()
    assert both == pytest.approx(1 - (2.2 / 4.2 + 1.8 / 3.8) / 2, abs=1e-6)
    assert cross_entropy_loss(voxels).item() == pytest.approx(-math.log(0.9 * 0.4 * 0.2 * 0.5) / 4, abs=1e-6)
    # the second column ignored: sum(p y) = 1.1, sum(p) = 1.1, sum(y) = 2
    mask = torch.tensor([1, 0, 1, 0]).view(1, 1, 2, 2)
    assert soft_dice_loss(prepare_voxels(logits, target, mask), smooth=TINY).item() == pytest.approx(
        1 - 2.2 / 3.1, abs=1e-6
    )


def test_focal_of_one_voxel() -> None:
    # p(true) = .8, gamma 2, alpha .25, foreground: .25 * .2^2 * -log .8; background: .75 * ...
    logits = torch.tensor([0.0, math.log(4)]).view(1, 2, 1, 1)
    for class_id, p, weight in ((1, 0.8, 0.25), (0, 0.2, 0.75)):
        voxels = prepare_voxels(logits, torch.full((1, 1, 1, 1), class_id))
        value = focal_loss(voxels, alpha=0.25, gamma=2).item()
        assert value == pytest.approx(-weight * (1 - p) ** 2 * math.log(p), abs=1e-7)


def test_dice_per_sample_and_over_the_batch() -> None:
    # sample 0: p = 1 1, y = 1 0 -> overlap 1, size 3; sample 1: p = 0 1, y = 0 0 -> overlap 0, size 1
    target = torch.tensor([[1, 0], [0, 0]]).view(2, 1, 2, 1)
    logits = perfect_logits(torch.tensor([[1, 1], [0, 1]]).view(2, 1, 2, 1))
    voxels = prepare_voxels(logits, target)
    assert soft_dice_loss(voxels, batch=False, smooth=TINY).item() == pytest.approx((1 / 3 + 1) / 2, abs=1e-6)
    assert soft_dice_loss(voxels, batch=True, smooth=TINY).item() == pytest.approx(1 - 2 / 4, abs=1e-6)
    # sample 1 ignored altogether: it is no sample, not a perfect one
    mask = torch.tensor([1, 0]).view(2, 1, 1, 1).expand(2, 1, 2, 1)
    alone = soft_dice_loss(prepare_voxels(logits, target, mask), batch=False, smooth=TINY)
    assert alone.item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("x", [0.0, 1e-4, 0.3, 1.0, -1.0, 20.0, -20.0, 300.0])
def test_log_cosh(x: float) -> None:
    value = torch.tensor(x, requires_grad=True)
    out = log_cosh(value)
    out.backward()
    assert out.item() == pytest.approx(math.log(math.cosh(x)), abs=1e-6, rel=1e-6)
    assert value.grad.item() == pytest.approx(math.tanh(x), abs=1e-6)


def test_log_cosh_overflows_nowhere() -> None:
    assert log_cosh(torch.tensor(1e4)).item() == pytest.approx(1e4 - math.log(2))  # cosh(1e4) is infinite


def test_origin_loss_is_the_sum_of_its_terms() -> None:
    logits, target = random_case(2)
    loss = segmentation_loss("log_cosh_dice_focal")
    voxels = prepare_voxels(logits, target)
    expected = 0.7 * math.log(math.cosh(soft_dice_loss(voxels).item())) + 0.3 * focal_loss(voxels, alpha=0.25).item()
    assert loss(logits, target).item() == pytest.approx(expected, abs=1e-6)
    assert loss.last_terms["log_cosh_dice"].item() == pytest.approx(log_cosh_dice_loss(voxels).item())
    assert set(loss.last_terms) == {"log_cosh_dice", "focal"}
    assert not any(value.requires_grad for value in loss.last_terms.values())


# ------------------------------------------------------------------------------------------------------ against MONAI


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
def test_dice_and_dice_ce_equal_monai(batch: bool, include_background: bool, classes: int) -> None:
    logits, target = random_case(classes)
    options = {"include_background": include_background, "batch": batch}
    monai_options = {**options, "to_onehot_y": True, "softmax": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    dice = soft_dice_loss(prepare_voxels(logits, target), **options)
    torch.testing.assert_close(dice, DiceLoss(**monai_options)(logits, target), atol=1e-6, rtol=0)
    ours = segmentation_loss("dice_ce", **options)(logits, target)
    torch.testing.assert_close(ours, DiceCELoss(**monai_options)(logits, target), atol=1e-6, rtol=0)


def test_sigmoid_dice_ce_equals_monai() -> None:
    logits, target = random_case(1)
    ours = segmentation_loss("dice_ce", activation="sigmoid")(logits, target)
    torch.testing.assert_close(ours, DiceCELoss(sigmoid=True, batch=True)(logits, target), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("alpha", "gamma"), [(None, 2.0), (0.25, 2.0), (0.25, 0.0), (0.9, 1.5)])
def test_focal_equals_monai(alpha: float | None, gamma: float) -> None:
    logits, target = random_case(1)
    ours = focal_loss(prepare_voxels(logits, target, activation="sigmoid"), alpha=alpha, gamma=gamma)
    torch.testing.assert_close(ours, FocalLoss(gamma=gamma, alpha=alpha)(logits, target), atol=1e-6, rtol=0)
    # MONAI's softmax form averages over voxels times classes; ours, like Lin et al., over voxels.
    logits, target = random_case(3)
    ours = focal_loss(prepare_voxels(logits, target), alpha=alpha, gamma=gamma)
    theirs = 3 * FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma, alpha=alpha)(logits, target)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sigmoid_equals_softmax_over_two_classes(name: str) -> None:
    logit, target = random_case(1)
    two = torch.cat([torch.zeros_like(logit), logit], 1)
    sigmoid = segmentation_loss(name, activation="sigmoid")(logit, target)
    torch.testing.assert_close(sigmoid, segmentation_loss(name)(two, target), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------- ignored voxels


@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("how", ["ignore_index", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_perfect_prediction_has_no_loss_however_much_is_ignored(name: str, how: str, ignored: float) -> None:
    _, target = random_case(2)
    removed = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < ignored
    logits = torch.where(removed, -1.0, 1.0) * perfect_logits(
        target
    )  # wrong, with certainty, wherever it does not count
    for batch in (True, False):
        if how == "mask":
            loss = segmentation_loss(name, batch=batch)(logits, target, ~removed)
        else:
            loss = segmentation_loss(name, batch=batch, ignore_index=255)(logits, target.masked_fill(removed, 255))
        assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_the_image_without_the_ignored_voxels(name: str) -> None:
    logits, target = random_case(3)
    mask = torch.ones_like(target)
    mask[..., 4:] = 0  # the last columns are cut off, once by the mask and once with scissors
    loss = segmentation_loss(name)
    torch.testing.assert_close(loss(logits, target, mask), loss(logits[..., :4], target[..., :4]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(NAMES),
    value=st.sampled_from([0.0, 40.0, -1e30, math.nan, math.inf]),
)
def test_logits_at_ignored_voxels_never_matter(seed: int, name: str, value: float) -> None:
    logits, target = random_case(3, seed)
    removed = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    loss = segmentation_loss(name, ignore_index=255)
    ignoring = target.masked_fill(removed, 255)
    other = torch.where(removed, value, logits).requires_grad_()
    out = loss(other, ignoring)
    assert out.item() == loss(logits, ignoring).item()
    out.backward()
    assert torch.equal(other.grad[removed.expand_as(other)], torch.zeros(int(removed.sum()) * 3))
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(NAMES), batch=st.booleans())
def test_order_of_voxels_does_not_matter(seed: int, name: str, batch: bool) -> None:
    logits, target = random_case(3, seed)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    shuffled, relabelled = (t.flatten(2)[..., order].view_as(t) for t in (logits, target))
    loss = segmentation_loss(name, batch=batch)
    assert loss(shuffled, relabelled).item() == pytest.approx(loss(logits, target).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------- edges of floating point


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_finite_at_the_edges(name: str, activation: str, dtype: torch.dtype) -> None:
    # logits of p = 0, 1e-8, .5, 1 - 1e-8, 1, against an empty, a full, a mixed and an ignored target
    row = torch.tensor([-40.0, -18.4, 0.0, 18.4, 40.0]).view(1, 1, 5, 1)
    values = row if activation == "sigmoid" else torch.cat([-row / 2, row / 2], 1)
    targets = [torch.full((1, 1, 5, 1), v) for v in (0, 1, 255)] + [torch.tensor([0, 1, 1, 1, 0]).view(1, 1, 5, 1)]
    for options in ({}, {"gamma": 0.5}) if "focal" in name else ({},):
        loss = segmentation_loss(name, activation=activation, ignore_index=255, **options)
        for target in targets:
            logits = values.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
                out = loss(logits, target)
            out.backward()
            assert out.dtype == torch.float32
            assert out.isfinite()
            assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_confident_mistake_keeps_its_gradient(name: str) -> None:
    # p(true) = 1e-17: a clamp on the probability would cut this gradient, half precision would make it infinite
    logits = torch.tensor([20.0, -20.0]).view(1, 2, 1, 1).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = segmentation_loss(name)(logits, torch.ones(1, 1, 1, 1, dtype=torch.long))
    out.backward()
    assert 0.01 < logits.grad.abs().max() < 10


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_from_is_zero_with_zero_gradient(name: str, batch: bool) -> None:
    logits, target = random_case(3)
    logits.requires_grad_()
    out = segmentation_loss(name, batch=batch)(logits, target, torch.zeros_like(target))
    out.backward()
    assert out.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_autocast_changes_nothing() -> None:
    logits, target = random_case(3)
    loss = segmentation_loss("dice_focal")
    plain = loss(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(logits, target).item() == plain.item()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [3.0, -1.0, 255.0, 1.6, math.nan])
def test_a_value_that_is_no_class_is_refused_unless_removed(bad: float) -> None:
    logits, target = random_case(3)
    broken = target.float()
    broken[0, 0, 0, 0, 0] = bad
    loss = segmentation_loss("dice_ce")
    with pytest.raises(DataError, match="1 voxel"):
        loss(logits, broken)
    mask = torch.ones_like(target)
    mask[0, 0, 0, 0, 0] = 0
    assert loss(logits, broken, mask).item() == loss(logits, target, mask).item()


def test_label_dtype_does_not_matter() -> None:
    logits, target = random_case(2)
    loss = segmentation_loss("dice_ce", ignore_index=-100)  # -100 is 156 in uint8
    expected = loss(logits, target).item()
    for dtype in (torch.uint8, torch.bool, torch.int32, torch.float32):
        assert loss(logits, target.to(dtype)).item() == expected
    mixed = loss(MetaTensor(logits), MetaTensor(target))
    assert mixed.item() == expected
    assert not isinstance(mixed, MetaTensor)


def test_shapes_and_activation_must_match() -> None:
    logits, target = random_case(3)
    with pytest.raises(BundleError, match="target of shape"):
        segmentation_loss("dice_ce")(logits, target[:, 0])
    with pytest.raises(BundleError, match="mask of shape"):
        segmentation_loss("dice_ce")(logits, target, target[:1])
    with pytest.raises(BundleError, match=r"softmax on 1 channel"):
        segmentation_loss("dice_ce")(logits[:, :1], target)
    with pytest.raises(BundleError, match=r"sigmoid on 3 channel"):
        segmentation_loss("dice_ce", activation="sigmoid")(logits, target)
    with pytest.raises(BundleError, match="valid: softmax, sigmoid"):
        segmentation_loss("dice_ce", activation="tanh")(logits, target)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(BundleError, match="did you mean 'dice_focal'"):
        segmentation_loss("dice_focl")
    with pytest.raises(BundleError, match="did you mean 'gamma'"):
        segmentation_loss("dice_focal", gama=1.0)
    with pytest.raises(BundleError, match=r"valid: .*log_cosh_dice_focal"):
        segmentation_loss("xyz")


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_dead_or_absurd_weights_are_refused(weight: float) -> None:
    with pytest.raises(BundleError, match="term 'ce' has weight"):
        segmentation_loss("dice_ce", ce_weight=weight)
    with pytest.raises(BundleError, match="no terms"):
        CompositeLoss({})


@pytest.mark.parametrize("options", [{"alpha": 25}, {"alpha": -0.1}, {"gamma": -1.0}, {"smooth": 0.0}])
def test_parameters_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BundleError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        segmentation_loss("dice_focal", **options)(*random_case(2))


# ---------------------------------------------------------------------------------------------------- deep supervision


def three_heads() -> tuple[list[torch.Tensor], torch.Tensor]:
    logits, target = random_case(3)
    return [logits, 0.5 * logits, -logits], target


def test_heads_are_weighted_by_halves() -> None:
    heads, target = three_heads()
    single = segmentation_loss("dice_ce")
    values = [single(head, target).item() for head in heads]
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce"))
    expected = (4 * values[0] + 2 * values[1] + values[2]) / 7
    assert loss(heads, target).item() == pytest.approx(expected, abs=1e-6)
    assert loss(torch.stack(heads, 1), target).item() == pytest.approx(expected, abs=1e-6)
    assert loss.head_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    weighted = DeepSupervisionLoss(single, weights=[2, 2, 1])(heads, target).item()
    assert weighted == pytest.approx((2 * values[0] + 2 * values[1] + values[2]) / 5, abs=1e-6)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_a_single_output_takes_the_whole_weight(weights: list[float] | None) -> None:
    logits, target = random_case(3)
    single = segmentation_loss("dice_ce")
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce"), weights)
    assert loss(logits, target).item() == pytest.approx(single(logits, target).item())


def test_last_terms_tell_the_mean_and_the_main_head() -> None:
    heads, target = three_heads()
    single = segmentation_loss("dice_ce")
    dice = [single.terms(head, target)["dice"].item() for head in heads]
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce"))
    loss(heads, target)
    assert set(loss.last_terms) == {"dice", "ce", "main_head/dice", "main_head/ce"}
    assert loss.last_terms["main_head/dice"].item() == pytest.approx(dice[0])
    assert loss.last_terms["dice"].item() == pytest.approx((4 * dice[0] + 2 * dice[1] + dice[2]) / 7, abs=1e-6)
    assert copy.deepcopy(loss).last_terms.keys() == loss.last_terms.keys()


def test_a_coarse_head_sees_a_coarse_target() -> None:
    # blocks of 2 x 2: the coarse head is perfect, though it has a quarter of the pixels; the mask shrinks with it
    coarse = torch.tensor([[0, 1], [1, 255]]).view(1, 1, 2, 2)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for ignore_index, mask in ((255, None), (None, (fine != 255).to(torch.uint8))):
        loss = DeepSupervisionLoss(segmentation_loss("dice_ce", ignore_index=ignore_index))
        assert loss([perfect_logits(fine), perfect_logits(coarse)], fine, mask).item() == pytest.approx(0, abs=1e-6)
        assert loss([perfect_logits(fine), -perfect_logits(coarse)], fine, mask).item() > 1


@pytest.mark.parametrize("weights", [[0.125, 0.25, 1.0], [1.0, 0.0], [1.0, -1.0], [], [math.nan], [1.0, 0.5, 0.6]])
def test_reversed_or_absurd_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(BundleError, match="never grow"):
        DeepSupervisionLoss(segmentation_loss("dice_ce"), weights)


def test_number_of_heads_and_weights_must_agree() -> None:
    heads, target = three_heads()
    for weights in ([1.0, 0.5], [1.0, 0.5, 0.25, 0.125]):
        with pytest.raises(BundleError, match="for 3 heads"):
            DeepSupervisionLoss(segmentation_loss("dice_ce"), weights)(heads, target)
    with pytest.raises(BundleError, match="no heads"):
        DeepSupervisionLoss(segmentation_loss("dice_ce"))([], target)


@pytest.mark.parametrize("term", [soft_dice_loss, log_cosh_dice_loss, cross_entropy_loss, focal_loss])
def test_gradients_agree_with_finite_differences(term: Callable[..., torch.Tensor]) -> None:
    logits, target = random_case(3)
    logits, target = logits[..., :2, :2, :2].clone().requires_grad_(), target[..., :2, :2, :2]
    term(prepare_voxels(logits, target)).backward()
    step = torch.zeros_like(logits)
    for index in ((0, 0, 0, 0, 0), (1, 2, 1, 0, 1)):
        step.zero_()[index] = 1e-2
        with torch.no_grad():
            up, down = (term(prepare_voxels(logits + s * step, target)).item() for s in (1, -1))
        assert logits.grad[index].item() == pytest.approx((up - down) / 2e-2, abs=2e-4)
