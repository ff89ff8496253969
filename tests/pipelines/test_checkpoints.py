"""Weights come back bit for bit with their contract, or are refused with a reason."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipelines.networks import segmentation_network
from pipelines.training.checkpoints import (
    distinct_tensors,
    load_weights,
    read_contract,
    read_header,
    save_weights,
    start_from,
)
from transforms.errors import BundleError, ResourceError

HEADER = {"contract": {"modalities": ["flair"], "spacing": [1.0, 1.0, 1.0]}, "epoch": 3, "metric": 0.5}


def network(seed: int, channels: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, channels, 3), nn.BatchNorm3d(channels), nn.Conv3d(channels, 2, 1))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    save_weights(network(0), HEADER, path)
    return path


def test_the_round_trip_is_bitwise(weights: Path) -> None:
    loaded = load_weights(network(1), weights)
    for name, tensor in network(0).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert read_header(weights) == HEADER
    assert read_contract(weights) == HEADER["contract"]


def test_the_network_of_the_bundle_round_trips_in_training_and_in_evaluation(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "dimensions": 3,
        "in_channels": 1,
        "out_channels": 2,
        "spacing_mm": [1.0, 1.0, 1.0],
        "patch_size": [16, 16, 16],
        "filters": [4, 8, 8],
    }
    torch.manual_seed(0)
    trained = segmentation_network(**arguments)
    image = torch.randn(1, 1, 16, 16, 16)
    trained.train()(image)
    save_weights(trained, HEADER, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    other = load_weights(segmentation_network(**arguments), tmp_path / "w.safetensors").eval()
    assert torch.equal(other(image), trained.eval()(image))


def test_a_tensor_under_two_names_is_stored_once() -> None:
    shared = nn.Linear(2, 2)
    assert list(distinct_tensors(nn.ModuleDict({"a": shared, "b": shared}))) == ["a.weight", "a.bias"]


def test_equal_weights_are_equal_bytes(weights: Path, tmp_path: Path) -> None:
    save_weights(network(0), dict(reversed(HEADER.items())), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()


def test_another_width_is_refused_with_counts(weights: Path) -> None:
    # 7 parameters and buffers depend on the width or follow it: conv weight and bias, the norm's weight, bias, mean and
    # variance, and the last conv's weight; the norm's counter and the last conv's bias match
    target = network(1, channels=5)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(BundleError, match=r"first mismatch: 0.weight") as caught:
        load_weights(target, weights)
    assert "2 of 9 tensors match, 0 missing, 0 unexpected, 7 of another shape" in caught.value.why
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_missing_and_unexpected_tensors_are_counted(weights: Path) -> None:
    renamed = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Identity(), nn.BatchNorm3d(4))
    with pytest.raises(BundleError) as caught:
        load_weights(renamed, weights)
    # ours: 0.weight, 0.bias and five of 2.*; theirs: 0.*, five of 1.*, 2.weight and 2.bias
    assert "first mismatch: 2.running_mean" in caught.value.what
    assert "3 missing, 5 unexpected" in caught.value.why


def test_a_truncated_file_is_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-7])
    for read in (read_header, lambda path: load_weights(network(1), path)):
        with pytest.raises(BundleError, match=r"best.safetensors: unreadable"):
            read(weights)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="unreadable"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"fiducial": "{}"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"0.weight": torch.zeros(1)}, str(tmp_path / "x.safetensors"), metadata)
    with pytest.raises(BundleError, match="no contract"):
        load_weights(network(0), tmp_path / "x.safetensors")


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("position", [-1, 200])
def test_a_flipped_bit_is_refused_and_the_network_left_alone(weights: Path, position: int) -> None:
    content = bytearray(weights.read_bytes())
    content[position] ^= 4
    weights.write_bytes(bytes(content))
    target = network(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(BundleError, match=r"best\.safetensors"):
        load_weights(target, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


CONTRACT = {"modalities": ["flair"], "labels": [], "foreground": "mask", "dimensions": 3}


def test_fine_tuning_refuses_what_was_never_trained(tmp_path: Path) -> None:
    for epoch in (0, 1):
        save_weights(network(0), {"contract": CONTRACT, "epoch": epoch}, tmp_path / f"{epoch}.safetensors")
    with pytest.raises(BundleError, match="untrained"):
        start_from(network(1), tmp_path / "0.safetensors", CONTRACT)
    started = start_from(network(1), tmp_path / "1.safetensors", CONTRACT)
    assert all(torch.equal(a, b) for a, b in zip(started.parameters(), network(0).parameters(), strict=True))


def test_a_full_disk_leaves_the_weights_of_before(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = weights.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_weights(network(1), HEADER, weights)
    assert weights.read_bytes() == before
    assert list(weights.parent.iterdir()) == [weights]
