"""The schedules' algebra and its ends, the weight against its definition, and samples that replay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.networks.schedulers import RFlowScheduler

from transforms import AddDiffusionNoised, NoiseSchedule
from transforms.diffusion import FIRST_TIME, min_snr_weight, noisy_sample
from transforms.errors import BundleError, DataError

NOISY = ["cosine", "rectified_flow"]
AFFINE = np.diag([0.5, 1.0, 3.0, 1.0])


def sample() -> dict[str, MetaTensor]:
    """A condition of three channels and a label of six, on a grid of 0.5 x 1 x 3 mm."""
    draw = torch.Generator().manual_seed(0)
    image = MetaTensor(torch.randn(3, 6, 5, 4, generator=draw), affine=AFFINE, meta={"name": "mri"})
    label = MetaTensor(torch.rand(6, 6, 5, 4, generator=draw), affine=AFFINE)
    return {"image": image, "label": label}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_are_exactly_image_and_exactly_noise(name: str, dtype: torch.dtype) -> None:
    schedule, ends = NoiseSchedule(name), torch.tensor([0.0, 1.0], dtype=dtype)
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.sigma(ends).tolist() == [0, 1]
    # What an obvious implementation gives: the cosine of the nearest number to pi / 2.
    assert math.cos(math.pi / 2) != 0
    x0, noise = torch.full((2,), 3.0, dtype=dtype), torch.full((2,), 5.0, dtype=dtype)
    assert schedule.add_noise(x0, noise, ends).tolist() == [3, 5]


def test_half_way_by_hand() -> None:
    cosine, flow = NoiseSchedule("cosine"), NoiseSchedule("rectified_flow")
    root = math.sqrt(0.5)
    assert cosine.alpha(0.5) == pytest.approx(root)
    assert cosine.sigma(0.5) == pytest.approx(root)
    assert cosine.add_noise(2.0, -1.0, 0.5) == pytest.approx(root)
    assert cosine.velocity(2.0, -1.0, 0.5) == pytest.approx(-3 * root)  # a eps - s x0
    assert flow.add_noise(2.0, -1.0, 0.25) == 1.25
    assert flow.velocity(2.0, -1.0, 0.25) == -3.0
    assert cosine.alpha(1 / 3) == pytest.approx(math.cos(math.pi / 6))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NOISY), st.floats(0, 1), st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(["float", "np", "pt"])
)
def test_v_and_x0_give_the_clean_image_back(name: str, t: float, x0: float, noise: float, kind: str) -> None:
    schedule = NoiseSchedule(name)
    values = [np.array([v]) if kind == "np" else torch.tensor([v], dtype=torch.float64) for v in (x0, noise, t)]
    clean, eps, time = (x0, noise, t) if kind == "float" else values
    x_t = schedule.add_noise(clean, eps, time)
    v = schedule.velocity(clean, eps, time)
    assert np.asarray(schedule.clean_from(v, x_t, time, "v")).item() == pytest.approx(x0, abs=1e-12)
    assert np.asarray(schedule.clean_from(clean, x_t, time, "x0")).item() == x0
    # v is the derivative along the path: per t for the flow, per angle for the cosine.
    step = 1e-5
    if step < t < 1 - step:
        change = schedule.add_noise(x0, noise, t + step) - schedule.add_noise(x0, noise, t - step)
        scale = math.pi / 2 if name == "cosine" else 1
        assert change / (2 * step * scale) == pytest.approx(float(schedule.velocity(x0, noise, t)), abs=1e-6)


def test_rectified_flow_is_monais() -> None:
    x0, noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1, 4, 4)
    steps = torch.tensor([0, 250, 1000])
    ours = NoiseSchedule("rectified_flow").add_noise(x0, noise, (steps / 1000).reshape(3, 1, 1, 1))
    torch.testing.assert_close(ours, RFlowScheduler().add_noise(x0, noise, steps))


@pytest.mark.parametrize("name", NOISY)
def test_weight_is_the_clipped_ratio_over_its_mean(name: str) -> None:
    schedule = NoiseSchedule(name)
    times = np.linspace(0.01, 0.99, 99)
    ratio = (schedule.alpha(times) / schedule.sigma(times)) ** 2
    weight = min_snr_weight(schedule, times)
    # Half of the time the image is weaker than the noise (SNR below 1 from t = 0.5 on): the floor.
    assert len(set(weight[times >= 0.5].round(12))) == 1
    np.testing.assert_allclose(weight / weight[-1], np.clip(ratio, 1, 5))
    assert min_snr_weight(schedule, np.linspace(0, 1, 100_001)).mean() == pytest.approx(1, abs=1e-4)
    # Without the floor, a loss at t = 0.99 would count less than a thousandth of one at t = 0.2.
    assert np.minimum(ratio, 5)[-1] / 5 < 1e-3


def test_mean_weight_by_integration() -> None:
    # Cosine: 5 up to t1 with cot(pi t1 / 2) = sqrt 5, cot^2 to t = 1/2, then 1. The integral of cot^2 is -cot u - u.
    u1, u2 = math.atan(1 / math.sqrt(5)), math.pi / 4
    mean = (5 * u1 + (math.sqrt(5) + u1 - 1 - u2)) * 2 / math.pi + 0.5
    assert min_snr_weight(NoiseSchedule("cosine"), 1.0) == pytest.approx(1 / mean, rel=1e-6)


@pytest.mark.parametrize("name", [*NOISY, "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_finite_and_positive_at_both_ends(name: str, dtype: torch.dtype) -> None:
    schedule = NoiseSchedule(name)
    weight = min_snr_weight(schedule, torch.tensor([0.0, 1.0], dtype=dtype))
    assert bool((torch.isfinite(weight) & (weight > 0)).all())
    assert [min_snr_weight(schedule, t) for t in (0.0, 1.0)] == pytest.approx(weight.tolist(), rel=0.01)
    if name != "none":
        assert float(weight[0] / weight[1]) == pytest.approx(5, rel=0.01)


def test_noisy_sample_by_hand() -> None:
    image, label = np.full((2, 1, 1), 7.0), np.arange(6.0).reshape(6, 1, 1) + 2
    flow, noise = NoiseSchedule("rectified_flow"), np.full((1, 1), -1.0)
    with_noise, with_weight = noisy_sample(image, label, noise, 0.25, flow, 3)
    assert with_noise.ravel().tolist() == [7, 7, 0.75 * 2 - 0.25, 0.25]
    assert with_weight.ravel().tolist() == [2, 3, 4, 5, 6, 7, 3]
    assert with_noise.dtype == with_weight.dtype == np.float32


@pytest.mark.parametrize("name", NOISY)
def test_transform_appends_noise_time_and_weight(name: str) -> None:
    data = sample()
    before = {key: value.clone() for key, value in data.items()}
    result = AddDiffusionNoised(schedule=name).set_random_state(3)(data)
    image, label = result["image"], result["label"]
    assert image.shape == (5, 6, 5, 4)
    assert label.shape == (7, 6, 5, 4)
    assert isinstance(image, MetaTensor)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.meta["name"] == "mri"
    torch.testing.assert_close(image[:3], before["image"])
    torch.testing.assert_close(label[:6], before["label"])
    for key in before:  # the input is left alone
        assert torch.equal(data[key], before[key])
    t = float(image[4].unique().item())
    assert float(label[6].unique().item()) == pytest.approx(min_snr_weight(NoiseSchedule(name), t), rel=1e-5)
    # x_t without its share of image is noise, of which nothing is known but its statistics.
    schedule = NoiseSchedule(name)
    noise = (image[3] - schedule.alpha(t) * label[0]) / schedule.sigma(t)
    assert abs(float(noise.mean())) < 4 / math.sqrt(120)
    assert abs(float(noise.std()) - 1) < 0.3


def test_same_state_same_sample_and_the_next_draw_differs() -> None:
    transform = AddDiffusionNoised(schedule="cosine").set_random_state(5)
    first, second = transform(sample())["image"], transform(sample())["image"]
    again = AddDiffusionNoised(schedule="cosine").set_random_state(5)(sample())["image"]
    assert torch.equal(first, again)
    assert not torch.equal(first[3], second[3])
    assert first[4, 0, 0, 0] != second[4, 0, 0, 0]


def test_times_are_uniform() -> None:
    transform = AddDiffusionNoised(schedule="cosine", weighting="uniform").set_random_state(0)
    data = {"image": np.zeros((1, 1, 1), np.float32), "label": np.zeros((6, 1, 1), np.float32)}
    results = [transform(data) for _ in range(2000)]
    times = np.array([result["image"][2].item() for result in results])
    assert times.min() >= FIRST_TIME
    assert times.max() <= 1
    counts, _ = np.histogram(times, bins=4, range=(FIRST_TIME, 1))
    assert np.abs(counts - 500).max() < 4 * math.sqrt(2000 * 0.25 * 0.75)
    assert {result["label"][6].item() for result in results} == {1.0}
    assert isinstance(results[0]["image"], np.ndarray)


def test_one_pass_sees_neither_image_nor_noise() -> None:
    result = AddDiffusionNoised(schedule="none").set_random_state(0)(sample())
    assert not result["image"][3].any()
    assert bool((result["image"][4] == 1).all())
    assert bool((result["label"][6] == 1).all())


def test_missing_key_is_allowed_on_request_only() -> None:
    data = {"image": sample()["image"]}
    with pytest.raises(KeyError):
        AddDiffusionNoised()(data)
    assert AddDiffusionNoised(allow_missing_keys=True)(data)["image"] is data["image"]


def test_refusals_name_what_is_wrong() -> None:
    for options in ({"schedule": "linear"}, {"weighting": "snr"}, {"gamma": 0.5}, {"keys": ["image"]}):
        with pytest.raises(BundleError):
            AddDiffusionNoised(**options)
    with pytest.raises(BundleError, match="no noise"):
        NoiseSchedule("none").velocity(1.0, 1.0, 0.5)
    with pytest.raises(BundleError, match="valid: x0, v"):
        NoiseSchedule("cosine").clean_from(1.0, 1.0, 0.5, "epsilon")
    data = sample()
    with pytest.raises(DataError, match="expected 6 channels"):  # noise added twice
        AddDiffusionNoised()(AddDiffusionNoised()(data))
    with pytest.raises(DataError, match="key 'label'"):
        AddDiffusionNoised()({**data, "label": data["label"][..., :2]})
