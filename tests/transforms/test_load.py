"""A case is read whole and on one grid, or refused with file, case and key in the message."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from transforms.errors import DataError
from transforms.load import LoadCased

SHAPE = (5, 4, 3)
FLAIR = np.arange(60, dtype=np.float32).reshape(SHAPE)
Writer = Callable[..., Path]


@pytest.fixture
def item(write_nifti: Writer, oblique: np.ndarray) -> dict[str, Any]:
    """Two modalities, a label whose files call the lesion 4, a mask as a registration leaves it."""
    label = np.zeros(SHAPE, np.int16)
    label[2, 1:3, 1] = 4
    mask = np.zeros(SHAPE, np.float32)
    mask[1:4] = 0.99999997
    return {
        "case": "p01",
        "subject": "p",
        "image": [str(write_nifti("flair", FLAIR, oblique)), str(write_nifti("t1", -FLAIR, oblique))],
        "channels": [None, None],
        "label": str(write_nifti("label", label, oblique)),
        "mask": str(write_nifti("mask", mask, oblique)),
        "label_values": [[0, 0], [4, 1]],
        "digests": {"image": ["a", "b"]},
    }


def load(item: dict[str, Any], **arguments: Any) -> dict[Any, Any]:
    return LoadCased(modalities=("flair", "t1"), **arguments)(item)


def refused(item: dict[str, Any], *words: str, file: str | None = None, key: str | None = None) -> None:
    with pytest.raises(DataError) as caught:
        load(item)
    assert "case p01" in caught.value.what
    for word in (file, key and f"key {key}"):
        assert word is None or word in caught.value.what
    for word in words:
        assert word in caught.value.what + caught.value.why
    assert caught.value.fix


def test_a_sound_case(item: dict[str, Any], oblique: np.ndarray) -> None:
    before = dict(item)
    case = load(item)
    assert item == before
    assert set(case) == {"case", "subject", "image", "label", "mask"}
    assert (case["image"].shape, case["label"].shape, case["mask"].shape) == ((2, *SHAPE), (1, *SHAPE), (1, *SHAPE))
    assert (case["image"].dtype, case["label"].dtype, case["mask"].dtype) == (torch.float32, torch.uint8, torch.uint8)
    np.testing.assert_array_equal(case["image"], np.stack([FLAIR, -FLAIR]))
    assert case["label"][0, 2, 1, 1] == 1  # 4 in the file
    assert int(case["label"].sum()) == 2
    for key in ("image", "label", "mask"):
        assert isinstance(case[key], MetaTensor)
        np.testing.assert_allclose(case[key].affine, oblique, atol=1e-6)
    assert case["image"].meta["filename_or_obj"] == item["image"][0]


def test_a_mask_of_nearly_one_is_inside(item: dict[str, Any]) -> None:
    # truncated to an integer, 0.99999997 would be 0 and the whole mask empty
    assert int(load(item)["mask"].sum()) == 3 * 4 * 3


def test_labels_without_a_table_keep_their_values(item: dict[str, Any]) -> None:
    del item["label_values"]
    assert sorted(np.unique(load(item)["label"])) == [0, 4]


def test_absent_and_none_keys_are_left_out(item: dict[str, Any]) -> None:
    item["label"] = None
    del item["mask"]
    assert set(load(item)) == {"case", "subject", "image"}


def test_missing_file(item: dict[str, Any]) -> None:
    item["image"][1] = item["image"][1].replace("t1", "t2")
    refused(item, "does not exist", file="t2.nii.gz", key="t1")


@pytest.mark.parametrize("part", ["image", "label", "mask"])
def test_truncated_gzip(item: dict[str, Any], part: str) -> None:
    path = Path(item[part][1] if part == "image" else item[part])
    path.write_bytes(path.read_bytes()[:-9])
    refused(item, "truncated", file=path.name, key="t1" if part == "image" else part)


@pytest.mark.parametrize("part", ["image", "label", "mask"])
def test_another_shape(item: dict[str, Any], part: str, write_nifti: Writer, oblique: np.ndarray) -> None:
    path = str(write_nifti("cropped", np.zeros((5, 4, 2), np.float32), oblique))
    item[part] = [item["image"][0], path] if part == "image" else path
    refused(item, "(5, 4, 2)", "(5, 4, 3)", file="cropped.nii.gz", key="t1" if part == "image" else part)


@pytest.mark.parametrize("part", ["label", "mask"])
def test_another_affine(item: dict[str, Any], part: str, write_nifti: Writer, oblique: np.ndarray) -> None:
    shifted = oblique.copy()
    shifted[0, 3] += 2e-3  # a tolerance of 1e-3 mm
    item[part] = str(write_nifti("shifted", np.zeros(SHAPE, np.uint8), shifted))
    refused(item, "affine differs by 0.002", file="shifted.nii.gz", key=part)


def test_rounding_of_the_affine_is_accepted(item: dict[str, Any], write_nifti: Writer, oblique: np.ndarray) -> None:
    rounded = oblique.copy()
    rounded[0, 3] -= 4.8e-07  # what a float32 header loses
    item["label"] = str(write_nifti("rounded", np.ones(SHAPE, np.uint8) * 4, rounded))
    assert int(load(item)["label"].sum()) == 60


def test_header_spacing_zero(item: dict[str, Any]) -> None:
    path = Path(item["label"])
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", content, 80, 0.0)  # pixdim[1]
    path.write_bytes(gzip.compress(bytes(content)))
    refused(item, "spacing", file="label.nii.gz", key="label")


def test_nan_voxels(item: dict[str, Any], write_nifti: Writer, oblique: np.ndarray) -> None:
    voxels = FLAIR.copy()
    voxels[1, 2, 0] = np.nan
    item["image"][1] = str(write_nifti("holes", voxels, oblique))
    refused(item, "1 of 60 voxels are NaN", "(1, 2, 0)", file="holes.nii.gz", key="t1")


def test_label_values_outside_the_table(item: dict[str, Any], write_nifti: Writer, oblique: np.ndarray) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[0, :2, 0] = 3
    item["label"] = str(write_nifti("unknown", label, oblique))
    refused(item, "3 (2 voxels)", file="unknown.nii.gz", key="label")


def test_an_optional_modality_is_filled_with_zeros(item: dict[str, Any]) -> None:
    item["image"][0] = None
    case = load(item, optional=("flair",))
    assert int(case["image"][0].count_nonzero()) == 0
    np.testing.assert_array_equal(case["image"][1], -FLAIR)
    assert case["image"].meta["filename_or_obj"] == item["image"][1]


def test_a_required_modality_is_refused(item: dict[str, Any]) -> None:
    item["image"][1] = None
    refused(item, "modality t1 is missing", "optional: none")


def test_a_case_without_any_modality_is_refused(item: dict[str, Any]) -> None:
    item["image"] = [None, None]
    with pytest.raises(DataError, match="case p01: modality flair is missing"):
        load(item, optional=("flair", "t1"))


def test_another_number_of_images_is_refused(item: dict[str, Any]) -> None:
    item["image"] = item["image"][:1]
    refused(item, "1 images for 2 modalities")


def test_a_channel_of_a_four_dimensional_file(item: dict[str, Any], write_nifti: Writer, oblique: np.ndarray) -> None:
    path = str(write_nifti("both", np.stack([FLAIR, 2 * FLAIR, 3 * FLAIR], axis=-1), oblique))
    item |= {"image": [path, path], "channels": [2, 0]}
    np.testing.assert_array_equal(load(item)["image"], np.stack([3 * FLAIR, FLAIR]))
    item["channels"] = [2, 3]
    refused(item, "channel 3", file="both.nii.gz", key="t1")
    item["channels"] = [None, 0]
    refused(item, "3 channels", file="both.nii.gz", key="flair")
