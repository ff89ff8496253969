"""A file of tensors proves itself: what comes back is what went in, and no changed byte goes unnoticed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipelines.tensorfile import read_header, read_tensors, write_tensors
from transforms.errors import BundleError, ResourceError

HEADER = {"epoch": 3, "metric": 0.1, "name": "Läsion\n2", "nested": {"list": [1, None, True, "x"]}, "small": 1e-05}
TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, HEADER)
    return path


def refused(path: Path) -> bool:
    try:
        read_tensors(path)
    except BundleError:
        return True
    return False


def test_what_comes_back_is_what_went_in(file: Path) -> None:
    tensors, header = read_tensors(file)
    assert header == HEADER
    assert read_header(file) == HEADER
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)
    assert load_file(file).keys() == TENSORS.keys()  # any other program reads it too
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


def test_views_and_tensors_with_gradients_are_written_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    write_tensors(tmp_path / "x", {"turned": base.T, "column": base[:, 1], "all": base}, {})
    tensors, header = read_tensors(tmp_path / "x")
    assert header == {}
    assert torch.equal(tensors["turned"], base.detach().T)
    assert tensors["column"].tolist() == [1.0, 5.0, 9.0]
    assert torch.equal(tensors["all"], base.detach())


def test_tensors_in_one_storage_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {"all": base, "again": base, "flat": base.view(12), "rows": base[1:], "first": base[:2], "none": base[:0]}
    write_tensors(tmp_path / "x", views, {})
    tensors, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(tensors[name], view) for name, view in views.items())
    tensors["all"].zero_()
    assert torch.equal(tensors["again"], base)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.text(), max_size=4))
def test_every_header_comes_back(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    write_tensors(path, {"x": torch.ones(1)}, header)
    assert read_tensors(path)[1] == header


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    written = set()
    for number in range(8):  # an order at random would show
        write_tensors(tmp_path / str(number), dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
        written.add((tmp_path / str(number)).read_bytes())
    assert len(written) == 1


def test_every_changed_byte_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    header_ends = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - header_ends > 30  # there are tensors behind the header
    draw = np.random.default_rng(0)
    missed = []
    for position in range(len(whole)):
        for pattern in {0xFF, 1 << int(draw.integers(8))}:  # the byte inverted, and one of its bits
            changed = bytearray(whole)
            changed[position] ^= pattern
            file.write_bytes(bytes(changed))
            if not refused(file):
                missed.append((position, pattern))
    assert missed == []
    assert len(whole) >= 300
    file.write_bytes(whole)
    assert not refused(file)


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_truncated_file_is_refused(file: Path, lost: int) -> None:
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(BundleError, match=r"x.safetensors: unreadable"):
        read_tensors(file)
    with pytest.raises(BundleError, match=r"x.safetensors: unreadable"):
        read_header(file)


def test_bytes_behind_the_end_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    assert refused(file)


@pytest.mark.parametrize("change", ["name", "type", "shape", "header", "missing"])
def test_the_digest_covers_more_than_the_values(file: Path, change: str) -> None:
    """A sound safetensors file with the same bytes in its tensors and the old digest, but something else is said."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])
    tensors = load_file(file)
    metadata = about["__metadata__"]
    if change == "name":
        tensors["bias"] = tensors.pop("weight")
    elif change == "type":
        tensors["weight"] = tensors["weight"].view(torch.int32)
    elif change == "shape":
        tensors["weight"] = tensors["weight"].reshape(3, 2)
    elif change == "header":
        metadata["fiducial"] = metadata["fiducial"].replace('"epoch": 3', '"epoch": 4')
    else:
        del tensors["flags"]
    save_file(tensors, file, metadata)
    with pytest.raises(BundleError, match="damaged"):
        read_tensors(file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sha256": "00"}, {"fiducial": "{}"}])
def test_a_foreign_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x", metadata)
    with pytest.raises(BundleError, match="no digest"):
        read_tensors(tmp_path / "x")
    assert read_header(tmp_path / "x") == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_the_header_is_refused_before_anything_is_written(file: Path, value: float) -> None:
    before = file.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_tensors(file, TENSORS, {"metric": value})
    assert file.read_bytes() == before


def test_loading_executes_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"x": Trap()}, tmp_path / "x")
    for read in (read_tensors, read_header):
        with pytest.raises(BundleError, match="unreadable"):
            read(tmp_path / "x")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("position", [0, 9, -1])
def test_storage_that_does_not_keep_what_is_written_is_noticed(
    file: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    before = file.read_bytes()
    real = os.fsync

    def spoil(descriptor: int) -> None:
        real(descriptor)
        (temporary,) = file.parent.glob(".*.tmp")
        content = bytearray(temporary.read_bytes())
        content[position] ^= 1
        temporary.write_bytes(bytes(content))

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(ResourceError, match="does not read back as it was written"):
        write_tensors(file, {"other": torch.zeros(3)}, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_storage_that_loses_the_end_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(descriptor: int) -> None:
        (temporary,) = file.parent.glob(".*.tmp")
        os.truncate(temporary, temporary.stat().st_size - 1)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(ResourceError, match="does not read back"):
        write_tensors(file, {"other": torch.zeros(3)}, {})
    assert read_tensors(file)[1] == HEADER
