"""SSIM against the metric, the terms by hand, and the conditions under which losses of this kind died before."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy import ndimage
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

from pipelines import metrics
from pipelines.losses import FUSION_PRESETS, FusionLoss, boundary_loss, fusion_loss, masked_mean, ssim_map
from transforms import NoiseSchedule
from transforms.diffusion import LABEL_CHANNELS, min_snr_weight
from transforms.errors import BundleError, DataError

GRID = (12, 10, 8)


class BrightIsLesion(nn.Module):
    """A lesion head with one weight: logit = 8 (display - threshold), with dropout that only training switches on."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)
        self.classes = classes

    def forward(self, display: torch.Tensor) -> torch.Tensor:
        logit = 8 * (self.dropout(display) - self.threshold)
        return logit if self.classes == 1 else torch.cat([-logit / 2, logit / 2], 1)


def label_of(batch: int = 2, seed: int = 0, **channels: torch.Tensor | float) -> torch.Tensor:
    """Random references in display units; brain is the left half, bone the right one, the lesion a block in the brain.

    The target is the MRI in the brain and the CT elsewhere, and so consistent with both.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(batch, 7, *GRID)
    label[:, 1:3] = 0.1 + 0.2 * torch.rand(batch, 2, *GRID, generator=generator)
    label[:, 3, :6] = 1
    label[:, 4, 6:] = 1
    label[:, 5, 1:4, 2:6, 2:5] = 1
    label[:, 1][label[:, 5] > 0] += 0.6
    label[:, 6] = 1
    label[:, 0] = 2 * torch.where(label[:, 3] > 0, label[:, 1], label[:, 2]) - 1
    for name, value in channels.items():
        label[:, LABEL_CHANNELS.index(name)] = value
    return label


def noise(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# SSIM


@pytest.mark.parametrize("shape", [(24, 20, 16), (24, 20, 9), (30, 26, 1), (30, 26), (7, 12, 4)])
@pytest.mark.parametrize("data_range", [1.0, 2000.0])
def test_ssim_is_that_of_the_metrics(shape: tuple[int, ...], data_range: float) -> None:
    generator = np.random.default_rng(0)
    clean = ndimage.gaussian_filter(generator.normal(size=shape), 1)
    x = data_range * (0.5 + 0.2 * clean / clean.std())
    y = x + 0.1 * data_range * generator.normal(size=shape)
    ours = ssim_map(torch.from_numpy(x)[None, None].float(), torch.from_numpy(y)[None, None].float(), data_range)
    theirs = metrics.ssim_map(x, y, data_range, border="reflect")
    np.testing.assert_allclose(ours[0, 0], theirs, atol=1e-6)
    inner = metrics.ssim_map(x, y, data_range)  # NaN where the window reaches beyond the image
    chosen = np.isfinite(inner)
    np.testing.assert_allclose(ours[0, 0].numpy()[chosen], inner[chosen], atol=1e-6)
    roi = generator.random(shape) < 0.3
    expected = metrics.ssim(x, y, data_range, roi=roi, border="reflect")
    assert float(masked_mean(ours, torch.from_numpy(roi)[None, None])) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(9, 8, 7), (13, 1, 5), (6, 5)]), st.floats(0.01, 1.5))
def test_ssim_is_symmetric_bounded_and_one_for_equal_images(seed: int, shape: tuple[int, ...], scale: float) -> None:
    x, y = 0.5 + scale * noise(2, 2, 1, *shape, seed=seed)
    forward = ssim_map(x, y, 1.0)
    torch.testing.assert_close(forward, ssim_map(y, x, 1.0))
    assert float(forward.abs().max()) <= 1 + 1e-5
    torch.testing.assert_close(ssim_map(x, x, 1.0), torch.ones_like(x), atol=1e-5, rtol=0)


def test_ssim_of_constants_by_hand() -> None:
    # No variance: (2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4) everywhere, at the faces as well.
    value = ssim_map(torch.full((1, 1, 7, 6, 5), 0.2), torch.full((1, 1, 7, 6, 5), 0.8), 1.0)
    torch.testing.assert_close(value, torch.full_like(value, 0.3201 / 0.6801))


def test_ssim_gradient_is_right_and_alive_below_zero() -> None:
    reference = 0.5 + 0.2 * noise(1, 1, *GRID)
    inverted = (1 - reference).requires_grad_()  # anticorrelated
    value = ssim_map(inverted, reference, 1.0).mean()
    assert float(value.detach()) < -0.5
    (gradient,) = torch.autograd.grad(value, inverted)
    # Along its own gradient SSIM rises by what the gradient says.
    step = 1e-3 * gradient / gradient.norm()
    rise = ssim_map(inverted + step, reference, 1.0).mean() - ssim_map(inverted - step, reference, 1.0).mean()
    assert float(rise.detach()) == pytest.approx(2e-3 * float(gradient.norm()), rel=0.02)
    # Planted failure: a clamp to [0, 1] kills it.
    (dead,) = torch.autograd.grad(ssim_map(inverted, reference, 1.0).clamp(0, 1).mean(), inverted)
    assert dead.norm() < gradient.norm() / 10


def test_autocast_does_not_reach_ssim() -> None:
    x, y = (0.9 + 0.01 * noise(1, 1, *GRID, seed=seed) for seed in (1, 2))
    expected = ssim_map(x, y, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim_map(x, y, 1.0), expected)
    assert ssim_map(x.bfloat16(), y, 1.0).dtype == torch.float32


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 30.0]])
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert float(masked_mean(values, mask)) == 3.5  # the second sample does not count
    empty = values.clone().requires_grad_()
    nothing = masked_mean(empty, torch.zeros_like(mask))
    nothing.backward()
    assert float(nothing) == 0
    assert empty.grad is not None
    assert not empty.grad.any()
    values[1, 1] = torch.nan
    assert masked_mean(values, mask).isnan()  # not hidden by the mask


# The boundary


def test_boundary_loss_by_hand() -> None:
    # 2 mm x 1 mm; columns of 1 mm, two voxels of lesion in the middle of a row of 30, which is one voxel high:
    #   distance to the boundary  ... 2.5 1.5 0.5 | 0.5 0.5 | 0.5 1.5 2.5 ... 9.5, and 10.5 is out of the band.
    truth = torch.zeros(1, 1, 1, 30)
    truth[..., 14:16] = 1
    probability = torch.zeros(1, 1, 1, 30)
    # Both missed: 2 * 0.05 over 2 + 2 * 10 voxels.
    assert float(boundary_loss(probability, truth, (2.0, 1.0))) == pytest.approx(2 * 0.05 / 22)
    probability[..., 14:16] = 1
    assert float(boundary_loss(probability, truth, (2.0, 1.0))) == 0
    probability[..., 17] = 0.5  # half a false alarm, 1.5 mm out
    assert float(boundary_loss(probability, truth, (2.0, 1.0))) == pytest.approx(0.5 * 0.15 / 22)
    probability[..., 0] = 1  # a far one is left to Dice
    assert float(boundary_loss(probability, truth, (2.0, 1.0))) == pytest.approx(0.5 * 0.15 / 22)


def test_boundary_loss_grows_with_the_shift_in_mm_and_has_the_gradient_of_the_signed_distance() -> None:
    truth = torch.zeros(1, 1, 20, 20, 8)
    truth[..., 8:12, 8:12, 3:5] = 1
    spacing = (1.0, 1.0, 3.0)
    in_plane = [float(boundary_loss(truth.roll(n, 2), truth, spacing)) for n in range(4)]
    assert in_plane[0] == 0
    assert in_plane == sorted(in_plane)
    assert float(boundary_loss(truth.roll(1, 4), truth, spacing)) > in_plane[1]  # a thick slice is a longer way
    p = torch.full_like(truth, 0.3).requires_grad_()
    boundary_loss(p, truth, spacing).backward()
    assert p.grad is not None
    signed = ndimage.distance_transform_edt(truth[0, 0] == 0, spacing) - ndimage.distance_transform_edt(
        truth[0, 0], spacing
    )
    near = np.abs(signed) < 9
    found = p.grad[0, 0].numpy()[near]
    assert np.corrcoef(found, signed[near])[0, 1] > 0.99  # Kervadec's phi, but for the half voxel
    assert bool((np.sign(found) == np.sign(signed[near])).all())


def test_samples_without_lesion_have_no_boundary() -> None:
    truth = torch.zeros(2, 1, 6, 6)
    probability = torch.full_like(truth, 0.5).requires_grad_()
    loss = boundary_loss(probability, truth, (1.0, 1.0))
    loss.backward()
    assert float(loss) == 0
    assert not probability.grad.any()
    truth[0] = 1  # the lesion fills the whole patch: every voxel is inside
    assert float(boundary_loss(probability.detach(), truth, (1.0, 1.0))) == 0.5


# The whole


def test_terms_and_their_sum_by_hand() -> None:
    label, head = label_of(weight=3.0), BrightIsLesion()
    x0_hat = label[:, :1] + 0.1  # diffusion: 3 * 0.1^2
    loss = FusionLoss(1.5, 0.5, 2.0, 0.25, roi_weight=0.1, lesion_head=head, spacing_mm=(1, 2, 3))
    total = loss(x0_hat, label)
    terms = {name: float(value) for name, value in loss.last_terms.items()}
    assert terms["diffusion"] == pytest.approx(0.03, rel=1e-5)
    display = ((x0_hat + 1) / 2)[:, 0].numpy()
    for name, reference in (("brain", 1), ("bone", 2)):
        mask = label[:, LABEL_CHANNELS.index(name)].numpy()
        # Around the region stands the reference itself.
        inside = np.where(mask > 0, display, label[:, reference].numpy())
        expected = [
            metrics.ssim(inside[i], label[i, reference].numpy(), 1.0, roi=mask[i], border="reflect") for i in range(2)
        ]
        assert terms[name] == pytest.approx(1 - np.mean(expected), abs=1e-5)
    p, y = torch.sigmoid(8 * (torch.from_numpy(display)[:, None] - 0.5)), label[:, 5:6]
    dice = (2 * (p * y).sum() + 1e-5) / ((p + y).sum() + 1e-5)
    boundary = boundary_loss(p, y, (1, 2, 3))
    assert terms["lesion"] == pytest.approx(float(1 - dice + 0.25 * boundary), rel=1e-5)
    by_hand = terms["diffusion"] + 0.1 * (1.5 * terms["brain"] + 0.5 * terms["bone"] + 2 * terms["lesion"])
    assert float(total) == pytest.approx(by_hand, rel=1e-5)
    assert not any(value.requires_grad for value in loss.last_terms.values())


def test_target_is_perfect_for_every_region_up_to_their_border() -> None:
    label = label_of()
    loss = fusion_loss("stroke")
    assert float(loss(label[:, :1], label)) == pytest.approx(0, abs=1e-6)
    assert set(loss.last_terms) == {"diffusion", "brain", "bone"}
    # Planted failure: a window that sees the CT beyond the brain calls the perfect image wrong at its border.
    display = (label[:, :1] + 1) / 2
    assert float(masked_mean(1 - ssim_map(display, label[:, 1:2], 1.0), label[:, 3:4])) > 0.03


def test_one_class_and_two_classes_of_the_head_are_the_same_loss() -> None:
    label, x0_hat = label_of(), noise(2, 1, *GRID)
    values = []
    for classes in (1, 2):
        loss = fusion_loss("default", BrightIsLesion(classes))
        loss(x0_hat, label)
        values.append(float(loss.last_terms["lesion"]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_gradient_goes_through_the_frozen_head_to_the_image() -> None:
    head = BrightIsLesion()
    loss = FusionLoss(0, 0, 2, lesion_head=head).train()
    assert not head.training  # or dropout would change the score from step to step
    x0_hat = noise(2, 1, *GRID).requires_grad_()
    label = label_of(weight=0.0)  # the lesion term alone
    total = loss(x0_hat, label)
    total.backward()
    assert x0_hat.grad is not None
    assert float(x0_hat.grad.norm()) > 0
    assert head.threshold.grad is None
    assert not head.threshold.requires_grad
    assert torch.equal(loss(x0_hat, label), total)
    # It points the right way: brighter in the lesion, darker elsewhere.
    step = x0_hat.detach() - 0.5 * x0_hat.grad / x0_hat.grad.abs().max()
    assert float(loss(step, label)) < float(total)


def test_a_region_pulls_at_its_own_voxels_only() -> None:
    x0_hat = noise(2, 1, *GRID).requires_grad_()
    for name, own in (("brain", slice(0, 6)), ("bone", slice(6, 12))):
        loss = FusionLoss(float(name == "brain"), float(name == "bone"), 0)
        (gradient,) = torch.autograd.grad(loss(x0_hat, label_of(weight=0.0)), x0_hat)
        other = slice(6, 12) if name == "brain" else slice(0, 6)
        assert float(gradient[:, :, own].norm()) > 0
        assert not gradient[:, :, other].any()


@pytest.mark.parametrize("name", ["brain", "bone", "lesion"])
def test_empty_region_has_no_value_and_no_gradient(name: str) -> None:
    options = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
    options[{"brain": "alpha", "bone": "beta", "lesion": "gamma"}[name]] = 1.0
    loss = FusionLoss(**options, lesion_head=BrightIsLesion() if name == "lesion" else None)
    x0_hat = noise(2, 1, *GRID).requires_grad_()
    total = loss(x0_hat, label_of(**{name: 0.0, "weight": 0.0}))
    total.backward()
    assert float(total) == 0
    assert float(loss.last_terms[name]) == 0
    assert not x0_hat.grad.any()
    # With one sample that has the region, the loss is that of this sample alone.
    half = label_of(weight=0.0)
    half[1, LABEL_CHANNELS.index(name)] = 0
    assert float(loss(x0_hat, half)) == pytest.approx(float(loss(x0_hat[:1], half[:1])), rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_finite_at_both_ends_of_time(schedule: str, dtype: torch.dtype) -> None:
    noises = NoiseSchedule(schedule)
    for t in (0.0, 1.0):
        label = label_of(weight=min_snr_weight(noises, t))
        x_t = noises.add_noise(label[:, :1], noise(2, 1, *GRID), t)
        weight = torch.zeros((), requires_grad=True)
        loss = fusion_loss("default", BrightIsLesion(), watch_every=1)
        with torch.autocast("cpu", dtype=dtype):
            output = (x_t * (1 + weight)).to(dtype)  # what a network in reduced precision returns
            x0_hat = noises.clean_from(output, x_t, t, "v")
            total = loss(x0_hat, label)
        total.backward()
        assert total.dtype == torch.float32
        assert math.isfinite(float(total))
        assert math.isfinite(float(weight.grad))
        assert all(bool(torch.isfinite(value)) for value in loss.last_terms.values())


def test_extreme_images_have_finite_gradients() -> None:
    for value in (-1.0, 1.0, 1e3):  # black, white (no variance at all), and an output that went astray
        x0_hat = torch.full((2, 1, *GRID), value).requires_grad_()
        fusion_loss("default", BrightIsLesion())(x0_hat, label_of()).backward()
        assert bool(torch.isfinite(x0_hat.grad).all())


@pytest.mark.parametrize(("channel", "term"), [("x0", "diffusion"), ("mri_display", "brain"), ("ct_display", "bone")])
def test_nan_in_a_target_is_named_by_its_term(channel: str, term: str) -> None:
    label = label_of()
    label[1, LABEL_CHANNELS.index(channel), 0, 0, 0] = torch.nan  # a corner: outside of the bone
    loss = fusion_loss("default", BrightIsLesion())
    assert loss(noise(2, 1, *GRID), label).isnan()
    assert [name for name, value in loss.last_terms.items() if not torch.isfinite(value)] == [term]


def test_mask_that_is_no_mask_is_named_by_value() -> None:
    loss = fusion_loss("default", BrightIsLesion())
    for value in (torch.nan, 0.5, 2.0):
        label = label_of()
        label[0, 5, 0, 0, 0] = value
        with pytest.raises(DataError, match=str(value)):
            loss(noise(2, 1, *GRID), label)
    label = label_of()
    label[0, 3, 0, 0, 0] = torch.nan
    assert loss(noise(2, 1, *GRID), label).isnan()


def test_gradient_norms_are_those_of_the_weighted_terms() -> None:
    label, head = label_of(), BrightIsLesion()
    x0_hat = noise(2, 1, *GRID).requires_grad_()
    loss = FusionLoss(1.5, 0.5, 2.0, roi_weight=0.1, lesion_head=head, watch_every=2)
    loss(x0_hat, label).backward()
    found = {name.removeprefix("gradient/"): float(v) for name, v in loss.last_terms.items() if "/" in name}
    for name, options in (
        ("diffusion", {}),
        ("brain", {"alpha": 0.15}),
        ("bone", {"beta": 0.05}),
        ("lesion", {"gamma": 0.2, "lesion_head": head}),
    ):
        alone = FusionLoss(**{"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "roi_weight": 1.0, **options})
        only = label_of(weight=float(name == "diffusion"))
        (gradient,) = torch.autograd.grad(alone(x0_hat, only), x0_hat)
        assert found[name] == pytest.approx(float(gradient.norm()), rel=1e-4)
    # Every second time; in between the last ones stay, so that a mean over an epoch has no gaps.
    other = (x0_hat.detach() + 1).requires_grad_()
    loss(other, label)
    assert float(loss.last_terms["gradient/brain"]) == found["brain"]
    loss(other, label)
    assert float(loss.last_terms["gradient/brain"]) != found["brain"]
    # A term that nothing moves any more shows: a saturated head.
    saturated = FusionLoss(0, 0, 1, lesion_head=head, watch_every=1)
    saturated(torch.full_like(x0_hat, -100.0).requires_grad_(), label)
    assert float(saturated.last_terms["gradient/lesion"]) < 1e-8
    with torch.no_grad():  # nothing to watch in a validation
        loss(x0_hat, label)


def test_presets_are_the_published_weights() -> None:
    assert FUSION_PRESETS["default"] == (1, 1, 2)
    for name, (alpha, beta, gamma) in FUSION_PRESETS.items():
        loss = fusion_loss(name, BrightIsLesion(), roi_weight=0.5)
        assert loss.weights == {"diffusion": 1, "brain": alpha / 2, "bone": beta / 2, "lesion": gamma / 2}
        assert "lesion" not in fusion_loss(name).weights
    assert fusion_loss("default", beta=3.0, roi_weight=1.0).weights["bone"] == 3


def test_refusals() -> None:
    with pytest.raises(BundleError, match="did you mean 'stroke'"):
        fusion_loss("stoke")
    with pytest.raises(BundleError, match="did you mean 'alpha'"):
        fusion_loss("stroke", alfa=1.0)
    with pytest.raises(BundleError, match="without a lesion head"):
        FusionLoss(1, 1, 2)
    with pytest.raises(BundleError, match="with a lesion head"):
        FusionLoss(1, 1, 0, lesion_head=BrightIsLesion())
    for options in ({"alpha": -1.0}, {"roi_weight": math.nan}, {"spacing_mm": (1.0,)}, {"spacing_mm": (1.0, 0.0)}):
        with pytest.raises(BundleError):
            fusion_loss("default", **options)
    loss = fusion_loss("default")
    for x0_hat, label in (
        (noise(2, 2, *GRID), label_of()),
        (noise(2, 1, *GRID), label_of()[:, :6]),
        (noise(2, 1, 12, 10, 4), label_of()),
    ):
        with pytest.raises(BundleError, match="fusion loss"):
            loss(x0_hat, label)
    with pytest.raises(BundleError, match="data range"):
        ssim_map(noise(1, 1, 4, 4), noise(1, 1, 4, 4), 0.0)


def test_images_with_metadata_and_flat_images() -> None:
    label, x0_hat = label_of(), noise(2, 1, *GRID)
    expected = fusion_loss("default")(x0_hat, label)
    result = fusion_loss("default")(MetaTensor(x0_hat), MetaTensor(label))
    assert not isinstance(result, MetaTensor)
    assert torch.equal(result, expected)
    flat = fusion_loss("default", BrightIsLesion(), spacing_mm=(1, 1))(x0_hat[..., 3], label[..., 3])
    assert math.isfinite(float(flat))


# Several processes


def shared_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four samples with very different regions; the first two have no lesion at all."""
    label = label_of(batch=4)
    label[:2, 5] = 0
    label[1, 3] = 0
    label[3, 4, 8:] = 0
    return noise(4, 1, *GRID), label


def terms_and_gradient(part: slice) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x0_hat, label = (each[part] for each in shared_batch())
    scale = torch.ones((), requires_grad=True)
    loss = fusion_loss("stroke", BrightIsLesion(), watch_every=1)
    loss(scale * x0_hat, label).backward()
    assert scale.grad is not None
    return loss.last_terms, scale.grad


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(terms_and_gradient(slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    terms, gradient = terms_and_gradient(slice(None))
    shared = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found, _ in shared:
        for name, value in terms.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    assert float(shared[0][1] + shared[1][1]) / 2 == pytest.approx(float(gradient), rel=1e-4)  # as DDP averages
    # Planted failure: the mean of what each half finds alone.
    halves = [terms_and_gradient(slice(2 * r, 2 * r + 2))[0] for r in range(2)]
    assert abs(float(halves[0]["brain"] + halves[1]["brain"]) / 2 - float(terms["brain"])) > 1e-4
