"""From noise to an image in a few passes of a denoiser, under a condition and nothing else.

Time runs down from 1 to 0. Between two times the step is DDIM's, with the coefficients of exactly these two times:
what is left of the noise, (x_t - a x0_hat) / s, is kept, and x_t' = a' x0_hat + s' of it. The whole volume has one
noise and takes each step at once, so that overlapping windows agree on what they start from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type

from pipelines.losses.image_similarity import ssim_map
from transforms.diffusion import NoiseSchedule, require_name
from transforms.errors import BundleError, DataError

SPACINGS = ("cosine", "uniform")

# (x0_hat, condition) -> energy, lower is better
Guidance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sampling_times(steps: int, spacing: str = "cosine") -> list[float]:
    """Return the times 1 = t_0 > ... > t_steps = 0, between which a sampler steps.

    ``uniform``: t_i = 1 - i / steps. ``cosine``: t_i = 1 - sin(pi i / (2 steps)), the spacing for few steps: for
    images whose standard deviation is well below that of the noise, x0_hat changes most at the end, and so the steps
    get shorter there (see :class:`SamplingInferer`).

    Raises:
        BundleError: no step, or no such spacing.
    """
    require_name("spacing of times", spacing, SPACINGS)
    if steps < 1:
        raise BundleError(f"sampling: steps {steps}", "expected 1 or more", "10 is a good start")
    shares = [i / steps for i in range(steps + 1)]
    return [1 - (math.sin(math.pi / 2 * u) if spacing == "cosine" else u) for u in shares]


def ddim_step(schedule: NoiseSchedule, x_t: torch.Tensor, x0_hat: torch.Tensor, t: float, to: float) -> torch.Tensor:
    """Return x at time ``to`` from x at time ``t`` > 0 (Song et al., DDIM, ICLR 2021, eq. 12 with sigma = 0).

    Only the ratio of the two amounts of noise occurs: nothing is divided by a(t). For the rectified flow this is
    Euler's step. MONAI 1.6.1's ``DDIMScheduler`` spaces its times by ``linspace(T - 1, 0, n)`` and steps by ``T // n``,
    which is another distance: its result is that of another time than the next pass is told.
    """
    kept = schedule.sigma(to) / schedule.sigma(t)
    return kept * x_t + (schedule.alpha(to) - kept * schedule.alpha(t)) * x0_hat


def volume_noise(spatial: tuple[int, ...], seed: int, sample: int) -> torch.Tensor:
    """Return the noise (1, 1, *spatial), float32, that sample number ``sample`` of any case on this grid starts from.

    It is drawn on the CPU: a GPU starts from the same noise.
    """
    state = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) >> 1)
    return torch.randn(1, 1, *spatial, generator=generator)


def distance_to_guess(x0_hat: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Return 1 - SSIM of the fused image and the first guess, per voxel: an energy that pulls towards the inputs.

    It needs no mask: the guess, the last channel of the condition, is the CT where there is bone and else the MRI.

    Args:
        x0_hat: (B, 1, *spatial), diffusion scale (-1 .. 1).
        condition: (B, C, *spatial), -2 .. 2.
    """
    return 1 - ssim_map((x0_hat + 1) / 2, (condition[:, -1:] + 2) / 4, data_range=1.0)


class SamplingInferer(Inferer):
    """Sample fused images for a condition: (B, C, *spatial) in, display units (x + 1) / 2 out, without any clamp.

    The network is called with the condition, x_t and t as channels (B, C + 2, *spatial), and returns x0_hat (B, 1,
    *spatial) on the diffusion scale. Ground truth has no way in: an input with other channels than the condition is
    refused.

    Order 1 is DDIM. For a Gaussian of standard deviation d and the exact denoiser it returns exactly the mean, and d
    times the product of the cosines of the n angles that the direction (d a, s) turns by between the times. They add
    up to a right angle, so n steps return at most cos(pi / 2n)^n of d, however they are spaced: 78 % for 5, 88 % for
    10, 99 % for 100. Order 2 extrapolates x0_hat linearly to the middle of each step from the last two passes
    (Adams-Bashforth; as DPM-Solver++(2M), Lu et al. 2022, does in log SNR, which is infinite at both ends): 5 steps
    then return 88 %, 10 steps 97 %, at no further cost. What few steps of order 1 lack in spread they lack in error as
    well: nearer to the mean of all plausible images, they score higher in SSIM, and are no samples.

    Args:
        inferer: runs the network on (B, C + 2, *spatial), in windows and in the precision of the run.
        condition_channels: C.
        schedule: the noise schedule the network was trained with. With ``none``: one pass on x_t = 0, t = 1.
        steps: passes of the network per sample.
        times: spacing of the steps, see :func:`sampling_times`.
        order: 1 or 2.
        samples: samples to average; of several, the standard deviation is returned as well.
        seed: the noise follows from it, the number of the sample and the grid. Every case of a batch has the same.
        guidance: energy of (x0_hat, condition), lower is better: a tensor of any shape, summed. Each pass then moves
            x0_hat against its gradient g: x0_hat - guidance_strength * g / std(g), per case.
        guidance_strength: eta.
        every_sample: return all samples instead of their mean and standard deviation.

    Returns:
        (B, 1, *spatial) float32, or with ``samples`` > 1 (B, 2, *spatial): mean and standard deviation (with n - 1).
        With ``every_sample``: (B, samples, *spatial).

    Raises:
        BundleError: an option is not valid, or the network returns another shape.
        DataError: the input has another number of channels than the condition.
    """

    def __init__(
        self,
        inferer: Inferer,
        condition_channels: int,
        schedule: str = "cosine",
        steps: int = 10,
        times: str = "cosine",
        order: int = 2,
        samples: int = 1,
        seed: int = 0,
        guidance: Guidance | None = None,
        guidance_strength: float = 0.2,
        every_sample: bool = False,
    ) -> None:
        super().__init__()
        for name, value, valid in (
            ("condition_channels", condition_channels, condition_channels >= 1),
            ("order", order, order in (1, 2)),
            ("samples", samples, samples >= 1),
            ("seed", seed, seed >= 0),
            ("guidance_strength", guidance_strength, math.isfinite(guidance_strength)),
        ):
            if not valid:
                raise BundleError(
                    f"sampling: {name} {value}",
                    "expected condition_channels and samples from 1, order 1 or 2, seed from 0, a finite strength",
                    f"correct {name}",
                )
        self.inferer = inferer
        self.condition_channels = condition_channels
        self.schedule = NoiseSchedule(schedule)
        self.times = sampling_times(steps, times)
        self.order = order
        self.samples = samples
        self.seed = seed
        self.guidance = guidance
        self.guidance_strength = guidance_strength
        self.every_sample = every_sample

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        if inputs.shape[1] != self.condition_channels:
            raise DataError(
                f"sampling: input of shape {tuple(inputs.shape)}",
                f"{inputs.shape[1]} channels; the condition of this network has {self.condition_channels}",
                "give the condition alone: no noise, no masks, no target",
            )
        condition = _plain(inputs).float()

        def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
            network_input = torch.cat([condition, x_t, torch.full_like(x_t, t)], 1)
            x0_hat = _plain(self.inferer(network_input, network, *args, **kwargs)).float()
            if x0_hat.shape != x_t.shape:
                raise BundleError(
                    f"sampling: the network returns the shape {tuple(x0_hat.shape)}",
                    f"expected {tuple(x_t.shape)}",
                    "use a network that returns one channel at the resolution of its input",
                )
            return x0_hat if self.guidance is None else self._guide(x0_hat, condition)

        result = self._combined(self._drawn(denoise, condition))
        return convert_to_dst_type(result, inputs, dtype=result.dtype)[0] if isinstance(inputs, MetaTensor) else result

    def _drawn(
        self, denoise: Callable[[torch.Tensor, float], torch.Tensor], condition: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Yield every sample (B, 1, *spatial) in display units; a network that knows no noise has one."""
        start = torch.zeros_like(condition[:, :1])
        if self.schedule.name == "none":
            yield (denoise(start, 1.0) + 1) / 2
            return
        for sample in range(self.samples):
            noise = volume_noise(tuple(condition.shape[2:]), self.seed, sample).to(condition.device)
            yield (self._run(denoise, noise.expand_as(start)) + 1) / 2

    def _combined(self, samples: Iterator[torch.Tensor]) -> torch.Tensor:
        if self.every_sample:
            return torch.cat(list(samples), 1)
        mean = squares = torch.zeros(())
        for number, sample in enumerate(samples, start=1):
            difference = sample - mean  # Welford: the sum of squares would lose a small spread to rounding
            mean = mean + difference / number
            squares = squares + difference * (sample - mean)
        return mean if self.samples == 1 else torch.cat([mean, (squares / max(1, self.samples - 1)).sqrt()], 1)

    def _run(self, denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the image that the noise ``x`` becomes."""
        before: tuple[torch.Tensor, float] | None = None
        for t, to in itertools.pairwise(self.times):
            x0_hat = denoise(x, t)
            towards = x0_hat
            if self.order == 2 and before is not None:
                x0_before, t_before = before
                towards = x0_hat + (t - to) / (2 * (t_before - t)) * (x0_hat - x0_before)
            before = (x0_hat, t)
            x = ddim_step(self.schedule, x, towards, t, to)
        return x

    def _guide(self, x0_hat: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert self.guidance is not None
        with torch.enable_grad():
            free = x0_hat.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.guidance(free, condition).sum(), free)
        scale = gradient.std(dim=tuple(range(1, gradient.ndim)), keepdim=True)
        step = torch.where(scale > 0, gradient / scale, 0.0)  # a constant gradient has no direction in space
        return x0_hat - self.guidance_strength * step


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
