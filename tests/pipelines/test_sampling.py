"""Samplers against a distribution whose denoiser is known exactly, and the inferer around them.

The Gaussian toy: x0 ~ N(1, 0.3^2) in every voxel. Then x_t ~ N(a, a^2 0.09 + s^2), and the best denoiser is
E[x0 | x_t] = 1 + a 0.09 / (a^2 0.09 + s^2) (x_t - a). A right sampler returns N(1, 0.3^2) again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler

from pipelines.inference import AutocastInferer, SamplingInferer, ddim_step, distance_to_guess, sampling_times
from pipelines.inference.sampling import volume_noise
from transforms.diffusion import NoiseSchedule
from transforms.errors import BundleError, DataError

NOISY = ["cosine", "rectified_flow"]
MEAN, STD = 1.0, 0.3
GRID = (48, 48, 24)
CONDITION = torch.zeros(1, 2, *GRID)


def expected_image(x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    variance = STD**2
    return MEAN + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * MEAN)


def exact_denoiser(schedule: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def denoise(x: torch.Tensor) -> torch.Tensor:
        t = float(x[0, -1].max())
        return expected_image(x[:, -2:-1], NoiseSchedule(schedule).alpha(t), NoiseSchedule(schedule).sigma(t))

    return denoise


def sampler(schedule: str = "cosine", **options: object) -> SamplingInferer:
    return SamplingInferer(SimpleInferer(), 2, schedule, **options)


def errors_of(display: torch.Tensor) -> tuple[float, float]:
    """Relative error of mean and standard deviation, on the diffusion scale."""
    x = 2 * display - 1
    return abs(float(x.mean()) / MEAN - 1), abs(float(x.std()) / STD - 1)


@pytest.mark.parametrize("schedule", NOISY)
@pytest.mark.parametrize("steps", [5, 10, 25, 100])
def test_exact_denoiser_gives_its_distribution_back(schedule: str, steps: int) -> None:
    mean, std = errors_of(sampler(schedule, steps=steps)(CONDITION, exact_denoiser(schedule)))
    assert mean < 0.01
    assert std < (0.15 if steps == 5 else 0.05)


@pytest.mark.parametrize("schedule", NOISY)
@pytest.mark.parametrize("times", ["cosine", "uniform"])
@pytest.mark.parametrize("steps", [5, 10, 25, 100])
def test_ddim_is_bounded_by_the_number_of_its_steps(schedule: str, times: str, steps: int) -> None:
    ideal = sampler(schedule, steps=steps, times=times, order=1)
    x = 2 * ideal(CONDITION, exact_denoiser(schedule)) - 1
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    # The product of the cosines of the angles between the directions (0.3 a, s), see SamplingInferer.
    directions = [
        math.atan2(NoiseSchedule(schedule).sigma(t), STD * NoiseSchedule(schedule).alpha(t)) for t in ideal.times
    ]
    kept = math.prod(math.cos(a - b) for a, b in itertools.pairwise(directions))
    start = float(volume_noise(GRID, 0, 0).std())
    assert float(x.std()) == pytest.approx(STD * kept * start, rel=1e-4)
    assert kept <= math.cos(math.pi / 2 / steps) ** steps + 1e-12
    if steps == 5:  # so no spacing of five first-order steps meets 15 %
        assert kept < 0.78


@pytest.mark.parametrize("schedule", NOISY)
def test_short_last_steps_and_the_second_order_each_help(schedule: str) -> None:
    def loss(**options: object) -> float:
        return errors_of(sampler(schedule, steps=10, **options)(CONDITION, exact_denoiser(schedule)))[1]

    assert loss(order=1, times="cosine") < 0.15 < loss(order=1, times="uniform")
    assert loss(order=2, times="cosine") < loss(order=1, times="cosine") / 4


def test_one_step_coefficients_with_strides_are_caught() -> None:
    """Planted failure: the ancestral step of one of 1000 times, taken while most of them are skipped."""
    scheduler = DDIMScheduler(1000, schedule="cosine")
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(GRID, generator=generator, dtype=torch.float64)
    for time in scheduler.timesteps.tolist():
        own, alpha = float(scheduler.alphas[time]), math.sqrt(float(scheduler.alphas_cumprod[time]))
        sigma = math.sqrt(1 - alpha**2)
        noise = (x - alpha * expected_image(x, alpha, sigma)) / sigma
        x = (x - (1 - own) / sigma * noise) / math.sqrt(own)
        x = x + (time > 0) * math.sqrt(1 - own) * torch.randn(GRID, generator=generator, dtype=torch.float64)
    mean, std = errors_of((x + 1) / 2)
    assert mean > 0.85
    assert std > 2


@pytest.mark.parametrize(("steps", "least"), [(5, 0.05), (10, 0.03)])
def test_monais_ddim_returns_another_mean(steps: int, least: float) -> None:
    """Its times lie 999 / (n - 1) apart, its steps are 1000 // n long: the mean, exact for any right DDIM, is lost."""
    scheduler = DDIMScheduler(1000, schedule="cosine", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(steps)
    x = volume_noise(GRID, 0, 0)
    for time in scheduler.timesteps.tolist():
        total = float(scheduler.alphas_cumprod[time])
        x, _ = scheduler.step(expected_image(x, math.sqrt(total), math.sqrt(1 - total)), time, x)
    assert errors_of((x + 1) / 2)[0] > least
    ours = sampler(steps=steps, order=1, times="uniform")(CONDITION, exact_denoiser("cosine"))
    assert errors_of(ours)[0] < 0.01


def test_step_is_monais_for_the_same_times() -> None:
    # DDIMScheduler steps from 500 to 250 with n = 4: given the schedule's own a at both times, ours is the same.
    scheduler = DDIMScheduler(1000, schedule="cosine", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(4)
    x_t, x0_hat = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)

    class Discrete(NoiseSchedule):
        def alpha(self, t: float) -> float:
            return float(scheduler.alphas_cumprod[int(t)]) ** 0.5

        def sigma(self, t: float) -> float:
            return (1 - float(scheduler.alphas_cumprod[int(t)])) ** 0.5

    torch.testing.assert_close(
        ddim_step(Discrete("cosine"), x_t, x0_hat, 500, 250), scheduler.step(x0_hat, 500, x_t)[0]
    )


@pytest.mark.parametrize(("t", "to"), [(1000, 900), (700, 100), (300, 0)])
def test_rectified_flow_step_is_monais(t: int, to: int) -> None:
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(10)
    x_t, x0_hat = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    velocity = (x_t - x0_hat) * 1000 / t  # v = eps - x0; MONAI's has the opposite sign
    theirs, _ = scheduler.step(-velocity, t, x_t, to)
    ours = ddim_step(NoiseSchedule("rectified_flow"), x_t, x0_hat, t / 1000, to / 1000)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_times_by_hand() -> None:
    assert sampling_times(4, "uniform") == [1, 0.75, 0.5, 0.25, 0]
    # 1 - sin of 0, 30, 60 and 90 degrees
    assert sampling_times(3) == pytest.approx([1, 0.5, 1 - math.sqrt(3) / 2, 0])
    assert sampling_times(1) == [1, 0]


def test_perfect_denoiser_is_exact_for_any_number_of_steps_and_is_not_clamped() -> None:
    truth = 5 * torch.randn(1, 1, 6, 6, 4, generator=torch.Generator().manual_seed(1))  # display values far beyond 0..1
    for steps in (1, 2, 10):
        for order in (1, 2):
            result = sampler(steps=steps, order=order)(torch.zeros(1, 2, 6, 6, 4), lambda x: truth)
            torch.testing.assert_close(result, (truth + 1) / 2)
    assert float(result.min()) < -1
    assert float(result.max()) > 2


def test_seed_and_sample_decide_the_noise_and_the_batch_does_not() -> None:
    condition, denoise = torch.zeros(1, 2, 8, 8, 6), exact_denoiser("cosine")
    first = sampler(seed=3)(condition, denoise)
    assert torch.equal(first, sampler(seed=3)(condition, denoise))
    assert not torch.allclose(first, sampler(seed=4)(condition, denoise))
    two = sampler(seed=3)(condition.expand(2, -1, -1, -1, -1), denoise)
    assert torch.equal(two, first.expand(2, -1, -1, -1, -1))
    assert not torch.allclose(volume_noise((8, 8, 6), 3, 0), volume_noise((8, 8, 6), 3, 1))
    assert not torch.allclose(volume_noise((8, 8, 6), 3, 1), volume_noise((8, 8, 6), 4, 0))


def test_mean_and_spread_of_samples() -> None:
    condition, denoise = torch.zeros(1, 2, 8, 8, 6), exact_denoiser("cosine")
    result = sampler(samples=3)(condition, denoise)
    single = torch.cat(
        [
            (sampler()._run(lambda x, t: denoise(torch.cat([condition, x, torch.full_like(x, t)], 1)), noise) + 1) / 2
            for noise in (volume_noise((8, 8, 6), 0, sample) for sample in range(3))
        ]
    )
    torch.testing.assert_close(result[:, :1], single.mean(0, keepdim=True))
    torch.testing.assert_close(result[:, 1:], single.std(0, keepdim=True))
    assert float(result[:, 1:].min()) > 0  # uncertainty is alive in every voxel
    every = sampler(samples=3, every_sample=True)(condition, denoise)
    assert torch.equal(every, single[:, 0][None])


def test_the_distance_to_the_guess_pulls_towards_it() -> None:
    """0 where the image is the blend of the inputs; a guided pass of a network that returns nothing comes nearer."""
    draw = torch.Generator().manual_seed(4)
    guess = torch.rand(1, 1, 12, 12, 12, generator=draw)
    condition = torch.cat([torch.zeros_like(guess), 4 * guess - 2], 1)
    assert float(distance_to_guess(2 * guess - 1, condition).abs().max()) < 1e-5
    blurred = torch.nn.functional.avg_pool3d(guess, 3, 1, 1)

    def network(x: torch.Tensor) -> torch.Tensor:
        return 2 * blurred - 1

    far, near = (
        sampler("none", guidance=distance_to_guess, guidance_strength=strength)(condition, network)
        for strength in (0.0, 0.05)
    )
    assert (near - guess).square().mean() < 0.9 * (far - guess).square().mean()


def test_one_pass_has_no_spread_and_calls_the_network_once() -> None:
    calls: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x[:, :1]

    condition = torch.full((1, 2, 4, 4, 4), 0.5)
    result = sampler("none", samples=4)(condition, network)
    assert len(calls) == 1
    assert not calls[0][:, 2].any()  # x_t
    assert bool((calls[0][:, 3] == 1).all())  # t
    assert bool((result[:, :1] == 0.75).all())
    assert not result[:, 1:].any()


def test_windows_see_one_noise_and_the_whole_time() -> None:
    """A denoiser of single voxels gives the same volume in overlapping windows as at once."""
    condition = torch.randn(1, 2, 20, 14, 6, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x[:, :1] + 0.5 * x[:, -2:-1] * (1 - x[:, -1:]))

    whole = sampler(steps=4)(condition, network)
    windows = SlidingWindowInferer((8, 8, 4), sw_batch_size=3, overlap=0.5, mode="gaussian")
    pieces = SamplingInferer(AutocastInferer("fp32", windows), 2, steps=4)(condition, network)
    torch.testing.assert_close(pieces, whole)


def test_metadata_stays_and_arithmetic_is_float32() -> None:
    condition = MetaTensor(torch.zeros(1, 2, 4, 4, 4, dtype=torch.float64), meta={"name": "case"})
    result = sampler(steps=2)(condition, lambda x: x[:, -2:-1].bfloat16())
    assert isinstance(result, MetaTensor)
    assert result.meta["name"] == "case"
    assert result.dtype == torch.float32


def test_guidance_moves_along_the_gradient_by_its_strength() -> None:
    condition = torch.randn(2, 2, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    target = condition[:, :1]

    def energy(x0_hat: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return ((x0_hat - given[:, :1]) ** 2).flatten(1).sum(1)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, :1])

    with torch.no_grad():  # as evaluators do
        result = 2 * sampler("none", guidance=energy, guidance_strength=0.2)(condition, network) - 1
    # The gradient is -2 target: per case, the step is 0.2 target / std(target).
    std = target.flatten(1).std(1).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(result, 0.2 * target / std)
    # An energy that pulls everywhere alike has no direction: no step, and no 0 / 0.
    still = sampler("none", guidance=lambda x, c: x.sum())(condition, network)
    assert bool((still == 0.5).all())


def test_refusals() -> None:
    with pytest.raises(DataError, match="3 channels; the condition of this network has 2"):  # a mask came along
        sampler()(torch.zeros(1, 3, 4, 4, 4), exact_denoiser("cosine"))
    with pytest.raises(BundleError, match="returns the shape"):
        sampler()(torch.zeros(1, 2, 4, 4, 4), lambda x: x[..., ::2])
    for options in ({"steps": 0}, {"times": "linear"}, {"order": 3}, {"samples": 0}, {"seed": -1}, {"schedule": "x"}):
        with pytest.raises(BundleError):
            sampler(**options)
