"""Diffusion in continuous time: how an image becomes noise, and how a training sample gets its noise.

Time t runs from 0 (image) to 1 (noise): x_t = a(t) x0 + s(t) eps. The noise of a sample is drawn in the random chain,
like every augmentation, so that a batch can be replayed. Nothing here divides by a(t), which is 0 at t = 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTransform

from transforms.errors import BundleError, DataError
from transforms.masks import as_numpy, case_name, like

Time = TypeVar("Time", float, np.ndarray, torch.Tensor)

SCHEDULES = ("cosine", "rectified_flow", "none")
PREDICTIONS = ("x0", "v")
WEIGHTINGS = ("min_snr", "uniform")
LABEL_CHANNELS = ("x0", "mri_display", "ct_display", "brain", "bone", "lesion", "weight")
FIRST_TIME = 1e-3  # below it, x_t is x0 to three digits and there is nothing to learn


class NoiseSchedule:
    """The share of image and of noise at each time, and what follows from it.

    - ``cosine``: a = cos(pi t / 2), s = sin(pi t / 2), variance preserving; v = a eps - s x0 (Salimans and Ho,
      Progressive distillation for fast sampling of diffusion models, ICLR 2022, appendix D).
    - ``rectified_flow``: a = 1 - t, s = t; v = eps - x0 (Liu et al., Flow straight and fast, ICLR 2023; there, and in
      MONAI, with the opposite sign).
    - ``none``: a = s = 0, no noise and no image: a network that regresses in one pass, at t = 1.

    Args:
        name: one of ``SCHEDULES``.

    Raises:
        BundleError: there is no such schedule.
    """

    def __init__(self, name: str) -> None:
        require_name("noise schedule", name, SCHEDULES)
        self.name = name

    def alpha(self, t: Time) -> Time:
        """Return the share of the image at times in [0, 1]: a float for a float, else an array of the same kind.

        Exactly 1 at t = 0 and exactly 0 at t = 1, in any precision.
        """
        if self.name == "cosine":
            return _sin_quarter(1 - t)
        return 1 - t if self.name == "rectified_flow" else 0 * t

    def sigma(self, t: Time) -> Time:
        """Return the share of the noise at times in [0, 1]: exactly 0 at t = 0 and exactly 1 at t = 1."""
        if self.name == "cosine":
            return _sin_quarter(t)
        return t if self.name == "rectified_flow" else 0 * t

    def add_noise(self, x0: Any, noise: Any, t: Any) -> Any:
        """Return x_t = a(t) x0 + s(t) noise; ``t`` is a number, or broadcasts against the images."""
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def velocity(self, x0: Any, noise: Any, t: Any) -> Any:
        """Return v, the derivative of x_t along the path (for ``cosine``, by the angle pi t / 2).

        Raises:
            BundleError: the schedule is ``none``.
        """
        self.require_prediction("v")
        if self.name == "cosine":
            return self.alpha(t) * noise - self.sigma(t) * x0
        return noise - x0

    def clean_from(self, output: Any, x_t: Any, t: Any, prediction: str) -> Any:
        """Return the estimate of x0 that a network's output stands for.

        ``x0``: the output. ``v``: a x_t - s v (cosine), x_t - s v (rectified flow).

        Raises:
            BundleError: no such prediction, or v without noise.
        """
        self.require_prediction(prediction)
        if prediction == "x0":
            return output
        kept = self.alpha(t) * x_t if self.name == "cosine" else x_t
        return kept - self.sigma(t) * output

    def require_prediction(self, prediction: str) -> None:
        """Raise ``BundleError`` unless a network of this schedule can predict ``prediction``."""
        require_name("prediction", prediction, PREDICTIONS)
        if self.name == "none" and prediction == "v":
            raise BundleError(
                "prediction v with the schedule none",
                "v mixes image and noise, and this schedule has no noise",
                "set prediction to x0, or choose cosine or rectified_flow",
            )


def min_snr_weight(schedule: NoiseSchedule, t: Time, gamma: float = 5.0) -> Time:
    """Return the weight of (x0_hat - x0)^2 at time ``t``: clip(SNR, 1, gamma) over its mean for uniform t.

    SNR = a^2 / s^2. Hang et al. (Efficient diffusion training via Min-SNR weighting strategy, ICCV 2023) give the
    squared error of x0 the weight min(SNR, gamma). That vanishes for small a^2, where a conditional sampler with few
    steps takes its first and largest ones, so the weight has a floor: 1, as in the truncated SNR of Salimans and Ho
    (ICLR 2022, section 4). A network that predicts v has the error of v times s as its error of x0: one formula serves
    both.

    min(SNR, gamma) is computed as a^2 / max(s^2, a^2 / gamma): nothing is infinite or 0 / 0 at t = 0 and t = 1.
    The schedule ``none`` has weight 1.
    """
    if schedule.name == "none":
        return 0 * t + 1
    return _clipped_snr(schedule, t, gamma) / _mean_clipped_snr(schedule.name, gamma)


def noisy_sample(
    image: np.ndarray, label: np.ndarray, noise: np.ndarray, t: float, schedule: NoiseSchedule, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample with its noise: the image with the channels x_t and t, the label with the channel of the weight.

    Args:
        image: (C, *spatial), the condition.
        label: (6, *spatial), the first six of ``LABEL_CHANNELS``; channel 0 is x0.
        noise: (*spatial), standard normal.
        t: time in [0, 1].
        schedule: of the noise.
        weight: of the sample's diffusion term.

    Returns:
        (C + 2, *spatial) and (7, *spatial), float32.
    """
    x_t = schedule.add_noise(label[0], noise, t)
    with_noise = np.stack([*image, x_t, np.full_like(x_t, t)], dtype=np.float32)
    return with_noise, np.stack([*label, np.full_like(x_t, weight)], dtype=np.float32)


class AddDiffusionNoised(RandomizableTransform, MapTransform):
    """Draw a time and noise for a sample: appends x_t and t to the image, and the weight of its loss to the label.

    t is uniform in [0.001, 1], the noise standard normal. With the schedule ``none``, x_t = 0, t = 1 and the weight is
    1. It belongs behind every transform that moves or changes voxels. What the network predicts makes no difference
    here: the loss is always on x0 (see ``min_snr_weight``).

    Args:
        keys: the image (C, *spatial) and the label (6, *spatial), see ``LABEL_CHANNELS``.
        schedule: one of ``SCHEDULES``.
        weighting: of the squared error of x0: ``min_snr`` (see ``min_snr_weight``) or ``uniform``.
        gamma: upper bound of the signal-to-noise ratio in ``min_snr``, 1 or more.

    Raises:
        BundleError: not two keys, or a schedule, weighting or gamma that does not exist.
        DataError: the label has another number of channels, or another grid than the image.
    """

    def __init__(
        self,
        keys: Sequence[str] = ("image", "label"),
        schedule: str = "cosine",
        weighting: str = "min_snr",
        gamma: float = 5.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self)
        if len(self.keys) != 2:
            raise BundleError(f"AddDiffusionNoised: keys {list(self.keys)}", "expected two", "give image and label")
        require_name("weighting", weighting, WEIGHTINGS)
        if not (math.isfinite(gamma) and gamma >= 1):
            raise BundleError(f"AddDiffusionNoised: gamma {gamma}", "expected 1 or more", "leave it out for 5")
        self.schedule = NoiseSchedule(schedule)
        self.weighting = weighting
        self.gamma = gamma
        self.time = 1.0
        self.noise = np.zeros(0, np.float32)

    def randomize(self, data: Any = None) -> None:
        """Draw the time and the noise for a grid, given as its shape."""
        if self.schedule.name == "none":
            self.time, self.noise = 1.0, np.zeros(data, np.float32)
            return
        self.time = float(self.R.uniform(FIRST_TIME, 1))
        self.noise = self.R.standard_normal(data).astype(np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with both changed; unchanged where a key is missing and may be."""
        output = dict(data)
        keys = list(self.key_iterator(output))
        if len(keys) < 2:
            return output
        image, label = (as_numpy(output[key]) for key in keys)
        _require_label(label, image, case_name(output, keys[1]))
        self.randomize(label.shape[1:])
        weight = min_snr_weight(self.schedule, self.time, self.gamma) if self.weighting == "min_snr" else 1.0
        changed = noisy_sample(image, label, self.noise, self.time, self.schedule, weight)
        for key, values in zip(keys, changed, strict=True):
            output[key] = like(values, output[key])
        return output


def require_name(kind: str, name: str, valid: Sequence[str]) -> None:
    """Raise ``BundleError`` unless ``name`` is one of ``valid``."""
    if name not in valid:
        raise BundleError(f"{kind} {name!r} does not exist", f"valid: {', '.join(valid)}", "choose one of them")


def _sin_quarter(u: Any) -> Any:
    """Return sin(pi u / 2); the cosine is taken from here as well, because cos(pi / 2) is not 0 in floating point."""
    angle = u * (math.pi / 2)
    if isinstance(angle, torch.Tensor):
        return torch.sin(angle)
    return np.sin(angle) if isinstance(angle, np.ndarray) else math.sin(angle)


def _clipped_snr(schedule: NoiseSchedule, t: Any, gamma: float) -> Any:
    signal, noise = schedule.alpha(t) ** 2, schedule.sigma(t) ** 2
    if isinstance(t, torch.Tensor):
        return (signal / torch.maximum(noise, signal / gamma)).clamp(min=1)
    ratio = np.maximum(signal / np.maximum(noise, signal / gamma), 1)
    return ratio if isinstance(t, np.ndarray) else float(ratio)


@cache
def _mean_clipped_snr(name: str, gamma: float) -> float:
    middles = (np.arange(10_000) + 0.5) / 10_000
    return float(_clipped_snr(NoiseSchedule(name), middles, gamma).mean())


def _require_label(label: np.ndarray, image: np.ndarray, where: str) -> None:
    expected = len(LABEL_CHANNELS) - 1
    if len(label) != expected or label.shape[1:] != image.shape[1:]:
        raise DataError(
            where,
            f"shape {label.shape} beside an image of shape {image.shape}; expected {expected} channels on its grid",
            f"give the label the channels {', '.join(LABEL_CHANNELS[:-1])}",
        )
