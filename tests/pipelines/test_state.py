"""The state of a run: it comes back exactly, survives damage, and takes everything or nothing."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines import tensorfile
from pipelines.training.averaging import averaged_network
from pipelines.training.state import (
    NetworkState,
    RandomState,
    join_tensors,
    newest_state,
    restore_parts,
    split_tensors,
    state_files,
    tree_of,
    write_state,
)
from transforms.errors import BundleError, ResourceError

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FLOATS | st.text()
TENSORS = st.lists(st.integers(-9, 9), max_size=3).map(torch.tensor) | FLOATS.map(
    lambda value: torch.tensor(value, dtype=torch.float64)
)
KEYS = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$items", "a/b", "0", ""])
TREES = st.recursive(
    LEAVES | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    """Equal in value and in type, all the way down."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_every_tree_is_split_and_joined(tree: Any) -> None:
    values, tensors = split_tensors(tree)
    assert same(join_tensors(values, tensors), tree)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), TREES, max_size=3))
def test_every_tree_comes_back_from_the_disk(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "trees"
    path = write_state(folder, 0, 1, tree)
    found = newest_state(folder)
    assert found is not None
    assert found[0] == path
    # JSON sorts keys; equal as mappings, not in their order
    assert same(sorted_keys(found[1]), sorted_keys(tree))


def sorted_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: sorted_keys(tree[key]) for key in sorted(tree, key=lambda key: (type(key).__name__, key))}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(sorted_keys, tree))
    return tree


def test_keys_that_look_alike_keep_their_own_tensors(tmp_path: Path) -> None:
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "n": {1: torch.ones(2), "1": torch.zeros(2)}}
    write_state(tmp_path, 0, 1, tree)
    found = newest_state(tmp_path)
    assert found is not None
    assert same(sorted_keys(found[1]), sorted_keys(tree))


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}, object(), np.int64(3), torch.float32])
def test_what_has_no_place_in_a_state_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"/parts/1: a {type(value).__name__} has no place"):
        split_tensors({"parts": [0, value]})


def test_nan_outside_a_tensor_is_refused_and_inside_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_state(tmp_path, 0, 1, {"x": math.nan})
    assert state_files(tmp_path) == []
    write_state(tmp_path, 0, 1, {"x": torch.tensor([math.nan, 1.0])})
    found = newest_state(tmp_path)
    assert found is not None
    assert torch.equal(found[1]["x"].isnan(), torch.tensor([True, False]))


def draw() -> tuple[Any, ...]:
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.random(3).tolist(),
        np.random.normal(),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        torch.nn.functional.dropout(torch.ones(20)).tolist(),
    )


@pytest.mark.parametrize("before", [0, 1, 700])  # also with half of a pair of normal numbers drawn
def test_the_generators_go_on_exactly(tmp_path: Path, before: int) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(before):
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(1)
    write_state(tmp_path, 0, 1, {"random": RandomState().state_dict()})
    expected = [draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    draw()
    found = newest_state(tmp_path)
    assert found is not None
    RandomState().load_state_dict(found[1]["random"])
    assert [draw() for _ in range(3)] == expected


def test_a_training_in_pieces_is_the_training_in_one(tmp_path: Path) -> None:
    """Network, average, optimiser with momentum and schedule, each through the disk after every step."""

    def parts() -> dict[str, Any]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW([{"params": network[0].parameters(), "lr": 0.1}, {"params": network[2].weight}])
        average = averaged_network(network, 0.9)
        return {
            "network": NetworkState(network),
            "average": NetworkState(average),
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        }

    def step(state: dict[str, Any], seed: int) -> None:
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        state["optimizer"].zero_grad()
        state["network"].network(data).square().mean().backward()
        state["optimizer"].step()
        state["average"].network.update_parameters(state["network"].network)
        state["scheduler"].step()

    whole = parts()
    for seed in range(6):
        step(whole, seed)
    pieces = parts()
    for seed in range(6):
        step(pieces, seed)
        write_state(tmp_path, 0, seed, tree_of(pieces))
        pieces = parts()
        found = newest_state(tmp_path)
        assert found is not None
        restore_parts(pieces, found[1])
    assert same(sorted_keys(tree_of(pieces)), sorted_keys(tree_of(whole)))


def test_a_network_of_another_shape_is_refused() -> None:
    with pytest.raises(BundleError, match="state of the run: another architecture"):
        NetworkState(nn.Linear(2, 3)).load_state_dict(NetworkState(nn.Linear(2, 2)).state_dict())


def test_other_parts_are_refused_by_name_before_any_is_restored() -> None:
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    tree = {"network": {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, "scaler": {}}
    with pytest.raises(BundleError, match=r"other parts \(average, scaler\)"):
        restore_parts({"network": NetworkState(network), "average": NetworkState(network)}, tree)
    assert torch.equal(network.weight, before)


def number_of(found: tuple[Path, dict[str, Any]] | None) -> int:
    assert found is not None
    return int(found[1]["number"])


def write_three(folder: Path) -> list[Path]:
    return [write_state(folder, 0, number, {"number": number, "x": torch.full((4,), number)}) for number in (1, 2, 3)]


def test_the_newest_two_are_kept_and_a_later_phase_is_newer(tmp_path: Path) -> None:
    files = write_three(tmp_path)
    assert state_files(tmp_path) == [files[2], files[1]]
    assert number_of(newest_state(tmp_path)) == 3
    later = write_state(tmp_path, 1, 1, {"number": 4})
    assert state_files(tmp_path) == [later, files[2]]
    assert number_of(newest_state(tmp_path)) == 4
    assert number_of(newest_state(tmp_path)) == 4  # reading changes nothing


def test_thousands_of_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for number in (99, 100, 1_000, 20_000_000):
        write_state(tmp_path, 0, number, {"number": number})
    assert number_of(newest_state(tmp_path)) == 20_000_000


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-1]
    elif how == "flipped":
        content[-3] ^= 0x10
    else:
        content.clear()
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_passed_over_with_a_warning_that_names_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_three(tmp_path)
    damage(files[2], how)
    with caplog.at_level(logging.WARNING):
        assert number_of(newest_state(tmp_path)) == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(files[2]) in warning
    assert "falling back" in warning


def test_after_a_fall_back_two_sound_states_are_kept_again(tmp_path: Path) -> None:
    files = write_three(tmp_path)
    damage(files[2], "flipped")
    assert number_of(newest_state(tmp_path)) == 2
    again = write_state(tmp_path, 0, 2, {"number": 5})  # the run trains these steps again
    assert state_files(tmp_path) == [again]
    last = write_state(tmp_path, 0, 3, {"number": 6})
    assert state_files(tmp_path) == [last, again]
    assert number_of(newest_state(tmp_path)) == 6


def test_when_all_are_damaged_nothing_is_made_up(tmp_path: Path) -> None:
    for path in write_three(tmp_path)[1:]:
        damage(path, "truncated")
    with pytest.raises(BundleError, match="none of its 2 states can be read"):
        newest_state(tmp_path)


def test_no_state_is_none(tmp_path: Path) -> None:
    assert newest_state(tmp_path) is None
    assert newest_state(tmp_path / "absent") is None
    (tmp_path / ".state-00-000000001.safetensors.abc.tmp").write_bytes(b"half")
    assert newest_state(tmp_path) is None


def test_a_full_disk_leaves_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = write_three(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_state(tmp_path, 0, 4, {"number": 4})
    monkeypatch.undo()
    assert state_files(tmp_path) == [files[2], files[1]]
    assert number_of(newest_state(tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_is_plain_tensors_and_json(tmp_path: Path) -> None:
    path = write_state(tmp_path, 0, 1, {"random": RandomState().state_dict(), "x": {"y": torch.ones(2)}})
    tensors, header = tensorfile.read_tensors(path)
    assert set(header) == {"state"}
    assert sorted(tensor.dtype for tensor in tensors.values() if tensor.shape == (2,)) == [torch.float32]
