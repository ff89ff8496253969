"""Several weights as one network: their contracts must say the same, and no case is measured by who trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training import common_contract, load_members, refuse_seen_cases, save_weights
from transforms.errors import BundleError, UsageError

CONTRACT = {
    "modalities": ["flair"],
    "labels": [{"name": "background", "colour": "#000000"}, {"name": "lesion", "colour": "#ff0000"}],
    "spacing": [1.0, 1.0, 1.0],
    "landmarks": None,
}


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Conv2d(1, 2, 3)


def saved(folder: Path, seed: int, **changes: Any) -> Path:
    path = folder / f"{seed}.safetensors"
    save_weights(network(seed), {"contract": {**CONTRACT, **changes}, "epoch": 1}, path)
    return path


def test_one_file_is_the_network_itself(tmp_path: Path) -> None:
    built = network(9)
    assert load_members(built, [saved(tmp_path, 1)]) is built
    assert torch.equal(built.weight, network(1).weight)


def test_several_files_are_members_in_their_order(tmp_path: Path) -> None:
    members = load_members(network(9), [saved(tmp_path, seed) for seed in (2, 1, 3)])
    assert isinstance(members, torch.nn.ModuleList)
    for member, seed in zip(members, (2, 1, 3), strict=True):
        assert torch.equal(member.weight, network(seed).weight)
    assert not members.eval()[2].training  # an evaluator's eval() reaches each of them


def test_a_member_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="another architecture"):
        load_members(torch.nn.Conv2d(1, 3, 3), [saved(tmp_path, 1), saved(tmp_path, 2)])


def test_a_colour_does_not_matter(tmp_path: Path) -> None:
    blue = [{**label, "colour": "#0000ff"} for label in CONTRACT["labels"]]
    contract = common_contract([saved(tmp_path, 1), saved(tmp_path, 2, labels=blue)])
    assert contract["labels"] == CONTRACT["labels"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modalities", ["t1"]),
        ("labels", [{"name": "background"}, {"name": "tumour"}]),
        ("spacing", [1.0, 1.0, 2.0]),
        ("landmarks", {"flair": [0.0, 1.0]}),
        ("filters", [8, 16]),  # one contract has it, the others have not
    ],
)
def test_contracts_that_differ_are_refused_by_key_and_file(tmp_path: Path, key: str, value: Any) -> None:
    weights = [saved(tmp_path, 1), saved(tmp_path, 2), saved(tmp_path, 3, **{key: value})]
    with pytest.raises(BundleError, match=rf"3.safetensors: other {key} than .*1.safetensors"):
        common_contract(weights)


def test_an_ensemble_is_measured_on_test_cases_only() -> None:
    for split in ("train", "validation"):
        refuse_seen_cases(split, "a")
        refuse_seen_cases(split, ["a"])
        for networks in ({"checkpoint": ["a", "b"]}, {"ensemble": "cv"}):
            with pytest.raises(UsageError, match=f"split {split} with an ensemble"):
                refuse_seen_cases(split, **networks)  # type: ignore[arg-type]
    refuse_seen_cases("test", ["a", "b"])
    refuse_seen_cases("test", ensemble="cv")
