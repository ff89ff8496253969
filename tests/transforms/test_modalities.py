"""Dropping a modality gives what a missing one gives at inference, at the stated rate, and never an empty image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from transforms.errors import BundleError
from transforms.modalities import RandDropModalityd

NAMES = ("flair", "t1", "t2")


def image(channels: int = 3) -> MetaTensor:
    values = torch.arange(1, channels + 1.0)[:, None, None, None].expand(channels, 2, 2, 2).clone()
    return MetaTensor(values, affine=torch.diag(torch.tensor([0.5, 1, 3, 1.0])))


def kept(optional: tuple[str, ...], prob: float, n: int, data: MetaTensor | None = None) -> np.ndarray:
    """Return which channels survived (n draws, channels)."""
    transform = RandDropModalityd("image", NAMES, optional, prob).set_random_state(0)
    data = image() if data is None else data
    return np.array([[bool(c.any()) for c in transform({"image": data})["image"]] for _ in range(n)])


def test_the_dropped_channel_is_background_and_the_input_is_not_changed() -> None:
    transform = RandDropModalityd("image", NAMES, ("t1",), prob=1.0, background=-3.0)
    data = {"image": image(), "case": "p"}
    result = transform(data)
    assert [float(c.mean()) for c in result["image"]] == [1.0, -3.0, 3.0]
    assert [float(c.mean()) for c in data["image"]] == [1.0, 2.0, 3.0]
    assert isinstance(result["image"], MetaTensor)
    torch.testing.assert_close(result["image"].affine, data["image"].affine)


def test_each_optional_channel_is_dropped_at_the_rate() -> None:
    share = 1 - kept(("t1", "t2"), 0.2, 1000).mean(axis=0)
    assert share[0] == 0  # required
    assert np.all(np.abs(share[1:] - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 1000))  # four standard errors


def test_no_optional_modality_does_nothing() -> None:
    assert kept((), 1.0, 5).all()


def test_one_channel_always_stays_and_each_has_its_turn() -> None:
    survivors = kept(NAMES, 1.0, 300)
    assert (survivors.sum(axis=1) == 1).all()
    assert (np.abs(survivors.mean(axis=0) - 1 / 3) < 4 * np.sqrt(2 / 9 / 300)).all()


def test_a_modality_that_the_case_lacks_does_not_count_as_the_one_that_stays() -> None:
    data = image()
    data[0] = 0.0  # flair was never there
    survivors = kept(("t1", "t2"), 0.9, 50, data)
    assert (survivors.sum(axis=1) >= 1).all()


def test_it_is_a_function_of_the_random_state() -> None:
    np.testing.assert_array_equal(kept(NAMES, 0.5, 30), kept(NAMES, 0.5, 30))
    assert len(np.unique(kept(NAMES, 0.5, 30), axis=0)) > 1


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(BundleError, match="t1c is not a modality"):
        RandDropModalityd("image", NAMES, ("t1c",))
