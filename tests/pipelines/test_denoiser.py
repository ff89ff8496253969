"""The denoiser keeps its grid at any planned depth, sees its condition voxel by voxel, and reads its time unharmed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from pipelines.networks import ConditionalDenoiser, conditional_denoiser
from pipelines.networks.denoiser import time_of
from transforms.diffusion import NoiseSchedule
from transforms.errors import BundleError

CHANNELS = (8, 16, 16)
ISOTROPIC = (1.0, 1.0, 1.0)


def small(dimensions: float = 3, **options: object) -> ConditionalDenoiser:
    torch.manual_seed(0)
    settings = {"spacing_mm": ISOTROPIC, "patch_size": (16, 16, 16), "channels": CHANNELS} | options
    return conditional_denoiser(dimensions, 2, **settings)


def awake(network: ConditionalDenoiser) -> ConditionalDenoiser:
    """Give every layer that starts at zero random weights, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def sample(*spatial: int, batch: int = 1, t: float = 0.5) -> torch.Tensor:
    x = torch.randn(batch, 4, *spatial, generator=torch.Generator().manual_seed(2))
    x[:, 3] = t
    return x


def spatial_shapes(network: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """The sizes of every feature map, in order of computation."""
    found: list[tuple[int, ...]] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: found.append(tuple(o.shape[2:])))
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dimensions", [3, 2.5, 2])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_output_is_one_channel_on_the_grid_of_the_input(dimensions: float, prediction: str) -> None:
    network = awake(small(dimensions, prediction=prediction))
    for mode in (True, False):  # no difference between training and inference
        out = network.train(mode)(sample(16, 16, 12 if dimensions == 3 else 5, batch=2))
        assert out.shape == (2, 1, 16, 16, 12 if dimensions == 3 else 5)
        assert out.dtype == torch.float32


def test_26_thick_slices_are_halved_once_and_nothing_is_cropped() -> None:
    # 1 x 1 x 5 mm: in-plane 64 -> 32 -> 16 -> 8, slices 26 -> 26 -> 26 -> 13 when 4 mm have become like 5 mm.
    network = small(spacing_mm=(1, 1, 5), patch_size=(64, 64, 26), channels=(8, 8, 8, 8))
    shapes = spatial_shapes(network, sample(64, 64, 26))
    down = [(64, 64, 26), (32, 32, 26), (16, 16, 26), (8, 8, 13)]
    assert list(dict.fromkeys(shapes)) == down
    assert shapes[0] == shapes[-1] == down[0]
    # Up again in the same sizes: no crop and no padding before a concatenation.
    assert list(dict.fromkeys(reversed(shapes))) == down
    assert min(min(shape) for shape in shapes) >= 4


def test_26_slices_in_a_stack_are_never_pooled() -> None:
    network = small(2.5, patch_size=(16, 16, 26), stack_slices=3)
    assert network(sample(16, 16, 26)).shape == (1, 1, 16, 16, 26)
    assert spatial_shapes(network, sample(16, 16, 26))[0] == (16, 16)


def test_what_cannot_be_halved_is_refused_with_sizes_that_can() -> None:
    with pytest.raises(BundleError, match="24 or 28"):
        small(patch_size=(32, 32, 26))  # 1 mm slices: 26 / 4
    with pytest.raises(BundleError, match="allows 3 stages"):
        small(channels=(8, 8, 8, 8))  # 16 -> 8 -> 4 and no further
    with pytest.raises(BundleError, match=r"axis 2.*18 voxels.*\n.*by 4\n.*16 or 20"):
        small()(sample(16, 16, 18))
    with pytest.raises(BundleError, match="to 4"):
        small()(sample(16, 16, 2))


def test_untrained_output_is_the_first_guess_for_x0_and_the_kept_image_for_v() -> None:
    x = sample(16, 16, 16, t=0.25)
    assert torch.equal(small()(x), x[:, 1:2] / 2)  # the last layer starts at zero; the guess ends the condition
    cosine = small(prediction="v")(x)
    torch.testing.assert_close(cosine, math.cos(math.pi / 8) * x[:, 2:3])
    flow = small(prediction="v", schedule="rectified_flow")(x)
    torch.testing.assert_close(flow, x[:, 2:3])


def test_v_is_turned_into_x0_by_the_schedule() -> None:
    """A backbone that knows v exactly gives x0 back, at different times in one batch, and at both ends."""
    x0, noise = torch.randn(2, 3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.0, 0.3, 1.0]).reshape(3, 1, 1, 1, 1)
    for name in ("cosine", "rectified_flow"):
        schedule = NoiseSchedule(name)
        velocity = schedule.velocity(x0, noise, t)

        class Known(nn.Module):
            def forward(self, x: torch.Tensor, known: torch.Tensor = velocity) -> torch.Tensor:
                return known

        x = torch.cat([torch.zeros(3, 2, 4, 4, 4), schedule.add_noise(x0, noise, t), t.expand_as(x0)], 1)
        result = ConditionalDenoiser(Known(), name, "v")(x)
        torch.testing.assert_close(result, x0, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_each_sample_is_denoised_at_its_own_time(dimensions: float) -> None:
    network = awake(small(dimensions)).eval()
    early, late = sample(16, 16, 8, t=0.1), sample(16, 16, 8, t=0.9)
    both = network(torch.cat([early, late]))
    torch.testing.assert_close(both, torch.cat([network(early), network(late)]), atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3  # only the time differs


def test_time_survives_the_zeros_that_a_window_pads_with() -> None:
    network = awake(small()).eval()
    seen: list[float] = []
    network.backbone.unet.time_embed.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0][0].sum().item()))
    network(sample(16, 16, 16, t=0.75))
    image = sample(12, 12, 12, t=0.75)  # smaller than the window on every side
    result = SlidingWindowInferer((16, 16, 16), sw_batch_size=1)(image, network)
    assert result.shape == (1, 1, 12, 12, 12)
    assert seen[1] == seen[0]
    # Planted failure: the corner of the padded window says t = 0.
    padded = nn.functional.pad(image, (2, 2) * 3)
    assert float(padded[0, 3, 0, 0, 0]) == 0
    assert time_of(padded[:, 3:]).tolist() == [0.75]


def train_briefly(network: ConditionalDenoiser, conditions: torch.Tensor) -> None:
    """Teach it that the clean image is the second channel of the condition."""
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        t = torch.rand(len(conditions), 1, 1, 1, 1, generator=generator)
        x0 = conditions[:, 1:2]
        noise = torch.randn(x0.shape, generator=generator)
        x = torch.cat([conditions, network.schedule.add_noise(x0, noise, t), t.expand_as(x0)], 1)
        optimizer.zero_grad()
        ((network(x) - x0) ** 2).mean().backward()
        optimizer.step()


def test_condition_decides_the_output_voxel_by_voxel() -> None:
    network = small(2, patch_size=(16, 16, 2), channels=(8, 8, 8), prediction="x0")
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(4, 2, 4, 4, 2, generator=generator)
    conditions = nn.functional.interpolate(coarse, (16, 16, 2), mode="trilinear")
    train_briefly(network, conditions)
    network.eval()

    def fused(condition: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(1, 1, 16, 16, 2, generator=torch.Generator().manual_seed(6))
        with torch.no_grad():
            return network(torch.cat([condition, noise, torch.ones(1, 1, 16, 16, 2)], 1))

    own, other = fused(conditions[:1]), fused(conditions[1:2])
    assert (own - other).norm() > 0.5 * own.norm()  # swapped: far more than the 1 % at which it would be inert
    shifted = fused(conditions[:1].roll(8, 2))
    inner = slice(10, 14)  # away from both seams of the shift
    moved, still = (own.roll(8, 2) - shifted)[:, :, inner], (own - shifted)[:, :, inner]
    assert moved.norm() < 0.5 * still.norm()  # the output moves along with the condition
    # Planted failure: a condition pooled to one number per channel cannot be moved.
    pooled = conditions[:1].mean((2, 3, 4), keepdim=True).expand_as(conditions[:1])
    assert torch.equal(fused(pooled), fused(pooled.roll(8, 2)))


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_every_input_channel_reaches_the_output_and_every_weight_learns(dimensions: float) -> None:
    network = awake(small(dimensions, attention=(False, False, True)))
    x = sample(16, 16, 4 if dimensions == 2.5 else 16).requires_grad_()
    network(x).square().mean().backward()
    assert x.grad is not None
    assert bool((x.grad.flatten(2).norm(dim=2) > 0).all())
    idle = [name for name, p in network.named_parameters() if p.grad is None]
    assert not idle


def test_attention_is_in_the_stages_that_ask_for_it() -> None:
    def names(**options: object) -> list[str]:
        return [name for name, _ in small(2.5, **options).named_parameters() if ".attn" in name]

    assert not names()
    assert not any("middle_block" in name for name in names(attention=(False, True, False)))
    assert any("middle_block" in name for name in names(attention=(False, False, True)))


def test_stack_sees_its_neighbours_and_a_single_slice_does_not() -> None:
    x = sample(16, 16, 5)
    changed = x.clone()
    changed[:, 0, ..., 0] += 1  # the condition of the first slice
    for dimensions, reached in ((2, [0]), (2.5, [0, 1])):
        network = awake(small(dimensions)).eval()
        moved = (network(x) - network(changed)).abs().amax((0, 1, 2, 3))
        assert moved.gt(1e-5).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_reduced_precision_metadata_and_copies(dimensions: float) -> None:
    network = awake(small(dimensions))
    network(sample(16, 16, 8)).sum().backward()
    average = copy.deepcopy(network)  # as an exponential moving average does after a step
    x = MetaTensor(sample(16, 16, 8), meta={"name": "case"})
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = average(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(torch.as_tensor(low), network(sample(16, 16, 8)).detach(), atol=0.1, rtol=0.1)


def test_odd_channels_have_a_norm_that_divides_them() -> None:
    assert awake(small(channels=(6, 10, 12)))(sample(16, 16, 16)).shape == (1, 1, 16, 16, 16)


def test_refusals() -> None:
    for options in (
        {"dimensions": 4},
        {"spacing_mm": (1, 1)},
        {"channels": (8, 16)},
        {"channels": (8, 0, 8)},
        {"attention": (True,)},
        {"residual_blocks": 0},
        {"schedule": "linear"},
        {"prediction": "epsilon"},
        {"schedule": "none", "prediction": "v"},
        {"dimensions": 2.5, "stack_slices": 2},
    ):
        with pytest.raises(BundleError):
            small(**options)
