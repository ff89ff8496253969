"""What the network sees: a function of seed, epoch and index, balanced as declared, image and label never apart."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, RandAffined, RandFlipd, Transform

from pipelines.manifests import Manifest, case_items
from pipelines.training.datasets import (
    MAXIMUM_CENTRES,
    PatchCentres,
    PatchDataset,
    VolumeDataset,
    collate_batch,
    crop_window,
    crop_with_margin,
)
from pipelines.training.loaders import patch_loader
from transforms import (
    CropToForegroundd,
    ForegroundMaskd,
    LoadCased,
    MeasureIntensityInMaskd,
    NormalizeIntensityInMaskd,
    RandGammaBeforeNormalized,
    ToRASd,
)
from transforms.errors import BundleError, DataError

NORMALISE = NormalizeIntensityInMaskd("image", statistics_key="intensity_statistics")
SAMPLES = 12
AFFINE = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))


def preparation() -> Compose:
    return Compose(
        [
            LoadCased(modalities=("flair", "t1")),
            ToRASd(["image", "label", "mask"]),
            ForegroundMaskd("image"),
            CropToForegroundd(["image", "label", "mask", "foreground"], margin=1),
            MeasureIntensityInMaskd("image"),
        ]
    )


def augmentation(size: Sequence[int], prob: float = 0.5) -> Compose:
    """A random chain as in the bundle, in small."""
    return Compose(
        [
            RandGammaBeforeNormalized("image", prob=prob, gamma=(0.7, 1.5), mask_key="foreground"),
            NORMALISE,
            _turned(size, prob),
            RandFlipd(["image", "label"], spatial_axis=0, prob=prob),
        ]
    )


def _turned(size: Sequence[int], prob: float) -> RandAffined:
    return RandAffined(
        ["image", "label"],
        prob=prob,
        spatial_size=size,
        rotate_range=[0.26] * 3,
        scale_range=[0.15] * 3,
        mode=["bilinear", "nearest"],
        padding_mode="zeros",
    )


def dataset(cohort: Manifest, cache: Path, **changes: Any) -> PatchDataset:
    arguments: dict[str, Any] = {
        "data": case_items(cohort, "train"),
        "preparation": preparation(),
        "transform": augmentation((8, 8, 8)),
        "cache_dir": str(cache),
        "label_ids": [1],
        "crop_size": crop_with_margin((8, 8, 8), 1.2),
        "seed": 3,
    }
    return PatchDataset(**{**arguments, **changes})


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def batches(data: PatchDataset, workers: int) -> list[dict[str, Any]]:
    return list(patch_loader(data, 3, 2, workers))


def test_a_sample_is_a_function_of_seed_epoch_and_index(tiny_cohort: Manifest, cache: Path) -> None:
    data = dataset(tiny_cohort, cache)
    data.set_epoch(1)
    here, there = batches(data, 0), batches(data, 2)
    for one, two in zip(here, there, strict=True):
        assert one["case"] == two["case"]
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["label"], two["label"])
    again = dataset(tiny_cohort, cache)
    again.set_epoch(1)
    assert torch.equal(collate_batch([again[5]])["image"], collate_batch([data[5]])["image"])  # in any order
    data.set_epoch(2)
    assert not torch.equal(batches(data, 0)[0]["image"], here[0]["image"])
    other = dataset(tiny_cohort, cache, seed=4)
    other.set_epoch(1)
    assert not torch.equal(batches(other, 0)[0]["image"], here[0]["image"])
    again.set_epoch(1, phase=1)  # epoch 1 of the second phase is not that of the first
    assert not torch.equal(batches(again, 0)[0]["image"], here[0]["image"])


def test_samples_of_an_epoch_differ_and_visit_every_case(tiny_cohort: Manifest, cache: Path) -> None:
    data = dataset(tiny_cohort, cache)
    samples = [data[index] for index in range(40)]
    assert {sample["case"] for sample in samples} == {"s0", "s1", "s2"}
    assert len({float(np.asarray(sample["image"]).sum()) for sample in samples}) == 40


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_share_of_foreground_centres(tiny_cohort: Manifest, cache: Path, probability: float) -> None:
    # A crop of one voxel is the centre. One that is not meant for the lesion can still hit it, with the lesion's share
    # of the foreground. 400 draws, within four standard errors.
    data = dataset(
        tiny_cohort,
        cache,
        transform=Compose([]),
        crop_size=(1, 1, 1),
        foreground_probability=probability,
    )
    by_chance = np.mean([len(case.array("centres_1")) / len(case.array("centres_0")) for case in data.cases])
    expected = probability + (1 - probability) * by_chance
    hits = [int(data[index]["label"]) == 1 for index in range(400)]
    assert abs(np.mean(hits) - expected) <= 4 * np.sqrt(expected * (1 - expected) / 400)
    assert all(int(data[index]["foreground"]) == 1 for index in range(50))


class Scene(Transform):
    """A case of 12 x 10 x 8 voxels: channels say x, y, z, the fourth is 1 off the rim; labels in 2-voxel cubes."""

    def __init__(self, labels: int = 4) -> None:
        self.labels = labels

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        x, y, z = np.meshgrid(np.arange(12), np.arange(10), np.arange(8), indexing="ij")
        image = np.stack([x, y, z, np.zeros_like(x)]).astype(np.float32)
        image[3, 1:-1, 1:-1, 1:-1] = 1
        return {
            "case": item["case"],
            "image": MetaTensor(torch.as_tensor(image), affine=AFFINE),
            "label": MetaTensor(torch.as_tensor(pattern(x, y, z, self.labels))[None], affine=AFFINE),
            "foreground": MetaTensor(torch.ones(1, 12, 10, 8, dtype=torch.uint8), affine=AFFINE),
        }


def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, labels: int = 4) -> np.ndarray:
    return ((x // 2 + 3 * (y // 2) + 5 * (z // 2)) % labels).astype(np.uint8)


SCENES = [{"case": f"p{i}", "label": "file", "digests": {"label": str(i)}} for i in range(2)]


def scenes(cache: Path, transform: Compose, patch: Sequence[int], **changes: Any) -> PatchDataset:
    arguments = {"data": SCENES, "label_ids": [1, 2, 3], "crop_size": crop_with_margin(patch, 1.2), **changes}
    return PatchDataset(preparation=Scene(), transform=transform, cache_dir=str(cache), **arguments)


@pytest.mark.parametrize("patch", [(6, 6, 6), (5, 4, 3)])
def test_image_and_label_stay_together_through_the_random_chain(cache: Path, patch: tuple[int, ...]) -> None:
    # Linear interpolation of coordinates is exact, so a patch says where each of its voxels comes from; the label there
    # is that of the nearest voxel. Voxels between two, or mixed with padding, are left out (rule R08).
    chain = Compose([_turned(patch, 1.0), RandFlipd(["image", "label"], spatial_axis=[0, 2], prob=0.5)])
    data = scenes(cache, chain, patch, patch_size=patch)
    checked = 0
    for index in range(SAMPLES):
        sample = data[index]
        image, label = np.asarray(sample["image"]), np.asarray(sample["label"])[0]
        assert image.shape == (4, *patch)
        places = np.rint(image[:3]).astype(int)
        sure = (image[3] > 0.999) & (np.abs(np.abs(image[:3] - places) - 0.5) > 0.02).all(axis=0)
        np.testing.assert_array_equal(label[sure], pattern(*places)[sure])
        checked += int(sure.sum())
    assert checked > 0.2 * SAMPLES * np.prod(patch)


@pytest.mark.parametrize("patch", [(4, 4, 4), (5, 6, 7), (3, 8, 2)])
@pytest.mark.parametrize("inside", [True, False])
def test_without_augmentation_a_patch_is_a_window_of_the_case(
    cache: Path, patch: tuple[int, ...], inside: bool
) -> None:
    # Were the crop larger than the patch by an odd number, every voxel would lie between two of the case: blurred.
    data = scenes(cache, Compose([_turned(patch, 0.0)]), patch, patch_size=patch if inside else None)
    for index in range(SAMPLES):
        image, label = np.asarray(data[index]["image"]), np.asarray(data[index]["label"])[0]
        places = np.rint(image[:3]).astype(int)
        np.testing.assert_allclose(image[:3], places, atol=1e-3)
        np.testing.assert_array_equal(label, pattern(*places))


def test_every_voxel_of_a_case_can_be_in_a_patch_even_at_its_rim(cache: Path) -> None:
    patch = (6, 6, 6)
    seen = {True: np.zeros((12, 10, 8), int), False: np.zeros((12, 10, 8), int)}
    for inside, count in seen.items():
        data = scenes(cache, Compose([_turned(patch, 0.0)]), patch, patch_size=patch if inside else None)
        for index in range(400):
            count[tuple(np.rint(np.asarray(data[index]["image"])[:3]).astype(int))] += 1
    assert (seen[True] > 0).all()
    assert (seen[False] == 0).any()  # what patch_size is for


@pytest.mark.parametrize("patch_size", [None, (16, 12, 10)])
def test_a_case_smaller_than_the_patch_is_padded_to_it(cache: Path, patch_size: tuple[int, ...] | None) -> None:
    data = scenes(cache, Compose([_turned((16, 12, 10), 0.0)]), (16, 12, 10), patch_size=patch_size)
    image, label = np.asarray(data[0]["image"]), np.asarray(data[0]["label"])[0]
    assert image.shape == (4, 16, 12, 10)
    assert label.shape == (16, 12, 10)
    # 12 x 10 x 8 in the middle of 16 x 12 x 10; around it, air and background
    case = image[:, 2:14, 1:11, 1:9]
    np.testing.assert_allclose(case[0], np.arange(12)[:, None, None] * np.ones((1, 10, 8)), atol=1e-3)
    np.testing.assert_array_equal(label[2:14, 1:11, 1:9], pattern(*np.rint(case[:3]).astype(int)))
    around = np.ones((16, 12, 10), bool)
    around[2:14, 1:11, 1:9] = False
    assert not label[around].any()
    assert np.abs(image[0][around]).max() == 0  # the lowest x of the case


def test_padding_is_background_after_the_normalisation(tiny_cohort: Manifest, cache: Path) -> None:
    data = dataset(tiny_cohort, cache, transform=augmentation((32, 32, 32), 0.0), crop_size=(32, 32, 32))
    image = np.asarray(data[0]["image"])
    assert image.shape == (2, 32, 32, 32)
    assert not image[:, :3].any()
    assert abs(image[image != 0].mean()) < 0.05  # a z-score inside the mask


@pytest.mark.parametrize(
    ("centre", "margin", "expected"),
    [
        # |0 1 2 3 4 5 6 7 8 9|, a window of 4; a margin of 1 may hang over either end
        (5, 0, (3, 7)),
        (0, 0, (0, 4)),
        (9, 0, (6, 10)),
        (2, 0, (0, 4)),
        (3, 0, (1, 5)),
        (0, 1, (-1, 3)),
        (9, 1, (7, 11)),
        (5, 1, (3, 7)),
    ],
)
def test_windows_by_hand(centre: int, margin: int, expected: tuple[int, int]) -> None:
    assert crop_window(np.array([centre]), [4], [10], [margin]) == (slice(*expected),)


def test_a_short_axis_stands_in_the_middle_of_the_window() -> None:
    assert crop_window(np.array([2, 0]), [6, 4], [3, 10]) == (slice(-1, 5), slice(0, 4))
    assert crop_window(np.array([2]), [6], [3], [1]) == (slice(-1, 5),)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 30), st.integers(0, 4))
def test_a_window_has_its_size_its_centre_and_lies_inside(data: Any, length: int, kept: int, margin: int) -> None:
    centre = data.draw(st.integers(0, length - 1))
    size = kept + 2 * margin
    (window,) = crop_window(np.array([centre]), [size], [length], [margin])
    assert window.stop - window.start == size
    assert window.start + margin <= centre < window.stop - margin
    if length >= kept:
        assert window.start >= -margin
        assert window.stop <= length + margin
    else:
        assert abs((window.start + window.stop) - length) <= 1  # in the middle


@pytest.mark.parametrize(
    ("patch", "factor", "expected"),
    [
        ([64, 48, 8], 1.2, [78, 58, 10]),  # 6.4, 4.8 and 0.8 voxels a side, rounded up
        ([10, 10, 1], 1.2, [12, 12, 1]),  # 1 voxel a side, exactly; a single slice is left alone
        ([32], 1.0, [32]),
    ],
)
def test_crop_with_margin_by_hand(patch: list[int], factor: float, expected: list[int]) -> None:
    assert crop_with_margin(patch, factor) == expected


def test_centres_are_the_voxels_of_each_class_and_few_enough() -> None:
    label = np.zeros((1, 40, 40, 40), np.uint8)
    label[0, 3, 4, 5] = 2
    data = {"label": label, "foreground": np.ones_like(label)}
    centres = PatchCentres([1, 2])(data)
    assert centres["centres_2"].tolist() == [[3, 4, 5]]
    assert centres["centres_1"].shape == (0, 3)
    assert 0.4 * MAXIMUM_CENTRES < len(centres["centres_0"]) <= MAXIMUM_CENTRES
    assert centres["centres_0"][:, 0].max() >= 38  # spread over the volume, not its beginning
    assert set(data) == {"label", "foreground"}


def test_no_foreground_is_refused() -> None:
    empty = np.zeros((1, 2, 2, 2), np.uint8)
    with pytest.raises(DataError, match="case p9: key foreground is empty"):
        PatchCentres([1])({"case": "p9", "label": empty, "foreground": empty})


def test_an_empty_split_is_refused(tiny_cohort: Manifest, cache: Path) -> None:
    with pytest.raises(DataError, match="split training is empty"):
        dataset(tiny_cohort, cache, data=[])


def test_a_case_without_label_is_refused(tiny_cohort: Manifest, cache: Path) -> None:
    items = case_items(tiny_cohort, "train")
    del items[1]["label"]
    with pytest.raises(DataError, match="case s1: key label is missing in split training"):
        dataset(tiny_cohort, cache, data=items)
    with pytest.raises(DataError, match="case s1: key label is missing in split validation"):
        VolumeDataset(items, preparation(), NORMALISE, str(cache), [1])


def test_gamma_after_the_normalisation_is_refused(tiny_cohort: Manifest, cache: Path) -> None:
    wrong = Compose([NORMALISE, RandGammaBeforeNormalized("image", gamma=(0.7, 1.5), mask_key="foreground")])
    with pytest.raises(BundleError, match="RandGammaBeforeNormalized comes after"):
        dataset(tiny_cohort, cache, transform=wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"foreground_probability": 1.5}, "foreground_probability 1.5"),
        ({"on_bad_case": "ignore"}, "on_bad_case 'ignore'"),
        ({"patch_size": (9, 8, 8)}, "patch_size"),  # crops of 10: the middle would lie between two voxels
        ({"patch_size": (12, 8, 8)}, "patch_size"),
        ({"patch_size": (8, 8)}, "patch_size"),
    ],
)
def test_contradictions_are_refused(tiny_cohort: Manifest, cache: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        dataset(tiny_cohort, cache, **change)


def damaged(cache: Path, cases: Sequence[int], **changes: Any) -> PatchDataset:
    """Of four cases, the arrays of ``cases`` are torn after the run has started, as by a failing disk."""
    items = [{"case": f"p{i}", "label": "file", "digests": {"label": str(i)}} for i in range(4)]
    data = scenes(cache, Compose([]), (4, 4, 4), data=items, **changes)
    for case in cases:
        path = data.cases[case].folder / "image.npy"
        path.write_bytes(path.read_bytes()[:100])
    return data


def test_a_case_that_fails_in_the_middle_of_an_epoch_is_named(tmp_path: Path) -> None:
    data = damaged(tmp_path, [2])
    with pytest.raises(DataError, match="case p2: no patch can be made of it") as caught:
        [data[index] for index in range(40)]
    assert "ValueError" in caught.value.why
    assert "on_bad_case" in caught.value.fix
    seen = {}
    for index in range(40):  # the others are not harmed
        with contextlib.suppress(DataError):
            seen[index] = data[index]["case"]
    assert set(seen.values()) == {"p0", "p1", "p3"}


def test_skipping_is_a_choice_takes_another_case_and_counts(tmp_path: Path) -> None:
    data = damaged(tmp_path, [2], on_bad_case="skip")
    samples = [data[index] for index in range(40)]
    assert {sample["case"] for sample in samples} == {"p0", "p1", "p3"}
    bad = [sample["bad_cases"] for sample in samples]
    assert 5 <= sum(map(bool, bad)) <= 20  # about a quarter of the samples meet it
    assert {case for pairs in bad for case, _ in pairs} == {"p2"}
    assert all("ValueError" in reason for pairs in bad for _, reason in pairs)
    again = [data[index] for index in reversed(range(40))]  # what is taken instead is a function of the index, too
    for one, two in zip(samples, reversed(again), strict=True):
        assert one["bad_cases"] == two["bad_cases"]
        assert torch.equal(torch.as_tensor(one["image"]), torch.as_tensor(two["image"]))


def test_skipping_ends_where_every_case_fails(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no patch can be made of it"):
        damaged(tmp_path, [0, 1, 2, 3], on_bad_case="skip")[0]


def test_a_refusal_of_a_transform_comes_through_with_its_own_words(tmp_path: Path) -> None:
    def refuse(item: dict[str, Any]) -> dict[str, Any]:
        raise DataError("planted", "measured", "fix")

    with pytest.raises(DataError, match="planted"):
        scenes(tmp_path, Compose([refuse]), (4, 4, 4))[0]
    bad = Compose([lambda item: refuse(item) if item["case"] == "p0" else item])
    samples = [scenes(tmp_path, bad, (4, 4, 4), on_bad_case="skip")[index] for index in range(8)]
    assert {sample["case"] for sample in samples} == {"p1"}
    assert any("planted" in reason for sample in samples for _, reason in sample["bad_cases"])


def test_volumes_are_whole_cases_from_the_same_entries(tiny_cohort: Manifest, cache: Path) -> None:
    patches = dataset(tiny_cohort, cache)
    volumes = VolumeDataset(patches.data, preparation(), NORMALISE, str(cache), [1])
    assert [case.folder for case in volumes.cases] == [case.folder for case in patches.cases]
    sample = volumes[0]
    assert len(volumes) == 3
    assert sample["image"].shape[1:] == sample["label"].shape[1:]
    assert not [key for key in sample if key.startswith("centres_")]
    assert len(VolumeDataset([], preparation(), NORMALISE, str(cache), [1])) == 0


def test_a_batch_is_plain_tensors_and_case_names() -> None:
    samples = [{"image": MetaTensor(torch.ones(1, 2)), "label": torch.zeros(1, 2), "case": c, "x": 1} for c in "ab"]
    batch = collate_batch(samples)
    assert set(batch) == {"image", "label", "case", "bad_cases"}
    assert batch["bad_cases"] == []
    samples[1]["bad_cases"] = [("c", "torn"), ("d", "torn")]
    assert collate_batch(samples)["bad_cases"] == [("c", "torn"), ("d", "torn")]
    assert type(batch["image"]) is torch.Tensor
    assert batch["image"].shape == (2, 1, 2)
    assert batch["case"] == ["a", "b"]
