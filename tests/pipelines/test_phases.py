"""What learns in a phase, at which rate; every contradiction is refused by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.training.phases import EVERYTHING, Phase, optimizer_for, parameter_groups, plan_phases
from transforms.errors import BundleError

COMMON: dict[str, Any] = {"max_epochs": 10, "steps_per_epoch": 5, "batch_size": 2, "loss": "dice_ce"}


def network() -> nn.Module:
    """Parameters encoder.weight, encoder.bias, norm.weight, norm.bias, head.weight, head.bias."""
    layers = nn.Sequential()
    layers.add_module("encoder", nn.Conv3d(1, 4, 3))
    layers.add_module("norm", nn.InstanceNorm3d(4, affine=True))
    layers.add_module("head", nn.Conv3d(4, 2, 1))
    return layers


def phase(**changes: Any) -> Phase:
    return Phase(**{"name": "p", "rates": {EVERYTHING: 0.1}, **COMMON, **changes})


def learning(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_without_phases_there_is_one_with_everything_at_the_runs_rate() -> None:
    for given in (None, []):
        (only,) = plan_phases(given, 0.2, **COMMON, patience=3)
        assert only == Phase(name="train", rates={".*": 0.2}, **COMMON, patience=3)


def test_a_phase_says_what_differs_and_inherits_the_rest() -> None:
    head, everything = plan_phases(
        [
            {"name": "head", "rates": {"^head": 0.1}, "max_epochs": 3},
            {"name": "all", "learning_rate": 0.01, "loss": "dice_focal"},
        ],
        0.2,
        **COMMON,
    )
    assert (head.rates, head.max_epochs, head.loss, head.steps_per_epoch) == ({"^head": 0.1}, 3, "dice_ce", 5)
    assert (everything.rates, everything.max_epochs, everything.loss) == ({".*": 0.01}, 10, "dice_focal")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"name": "a", "max_epoch": 3}], r"number 1: unknown key 'max_epoch'[\s\S]*max_epochs"),
        ([{"name": "a"}, {"name": "b", "leaning_rate": 3}], r"number 2: unknown key[\s\S]*fix: .*learning_rate"),
        ([{"max_epochs": 3}], "number 1: no name"),
        ([{"name": "a"}, {"name": "a"}], "expected different plain words"),
        ([{"name": "a/b"}], "plain words"),
        ([{"name": "../a"}], "plain words"),
        ([{"name": ""}], "plain words"),
        ([{"name": "a", "rates": {}}], "learning rates {}"),
        ([{"name": "a", "rates": {".*": 0.0}}], "all positive"),
        ([{"name": "a", "learning_rate": -1.0}], "all positive"),
        ([{"name": "a", "learning_rate": float("nan")}], "all positive"),
        ([{"name": "a", "max_epochs": 0}], "phase a: max_epochs 0"),
        ([{"name": "a", "steps_per_epoch": 0}], "phase a: steps_per_epoch 0"),
        ([{"name": "a", "batch_size": 0}], "phase a: batch_size 0"),
        ([{"name": "a", "accumulation_steps": 0}], "phase a: accumulation_steps 0"),
    ],
)
def test_what_a_phase_cannot_be_is_refused(given: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        plan_phases(given, 0.1, **COMMON)


@pytest.mark.parametrize(("steps", "accumulation", "expected"), [(5, 1, 5), (5, 2, 3), (6, 2, 3), (5, 7, 1)])
def test_optimizer_steps_in_an_epoch(steps: int, accumulation: int, expected: int) -> None:
    given = phase(steps_per_epoch=steps, accumulation_steps=accumulation)
    assert given.optimizer_steps_per_epoch == expected


def test_every_parameter_is_in_the_group_that_names_it_or_stands_still() -> None:
    net = network()
    groups = parameter_groups(net, phase(rates={"^head": 0.1, r"encoder\.weight": 0.01}))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert [(group["lr"], [names[id(p)] for p in group["params"]]) for group in groups] == [
        (0.1, ["head.weight", "head.bias"]),
        (0.01, ["encoder.weight"]),
    ]
    assert learning(net) == {"head.weight", "head.bias", "encoder.weight"}


def test_what_was_frozen_learns_again_when_it_is_named() -> None:
    net = network()
    parameter_groups(net, phase(rates={"head": 0.1}))
    assert learning(net) == {"head.weight", "head.bias"}
    (group,) = parameter_groups(net, phase())
    assert len(group["params"]) == 6
    assert len(learning(net)) == 6


def test_two_rates_for_one_parameter_are_refused_by_its_name() -> None:
    with pytest.raises(BundleError, match=r"parameter head\.weight has 2 rates") as caught:
        parameter_groups(network(), phase(rates={"^head": 0.1, "head.weight$": 0.01, "encoder": 0.2}))
    assert "^head and head.weight$" in caught.value.why


def test_an_expression_that_finds_nothing_is_refused() -> None:
    with pytest.raises(BundleError, match=r"no parameter's name matches 'decoder'") as caught:
        parameter_groups(network(), phase(rates={"head": 0.1, "decoder": 0.1}))
    assert "6 parameters, encoder.weight to head.bias" in caught.value.why


def test_frozen_statistics_of_batches_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Conv3d(2, 2, 1))
    with pytest.raises(BundleError, match="1 is frozen but has running statistics"):
        parameter_groups(net, phase(rates={"^2": 0.1}))
    # sound: it learns; or it keeps no statistics
    parameter_groups(net, phase(rates={"^[12]": 0.1}))
    without = nn.Sequential(nn.BatchNorm3d(2, track_running_stats=False), nn.Conv3d(2, 2, 1))
    parameter_groups(without, phase(rates={"^1": 0.1}))
    parameter_groups(nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.Conv3d(2, 2, 1)), phase(rates={"^1": 0.1}))


def test_statistics_of_one_patch_or_of_one_process_of_several_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    without = nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, affine=True))
    parameter_groups(net, phase(batch_size=2))
    parameter_groups(without, phase(batch_size=1))
    with pytest.raises(BundleError, match="batch normalisation with batch_size 1"):
        parameter_groups(net, phase(batch_size=1))
    monkeypatch.setattr("pipelines.training.phases.world_size", lambda: 2)
    parameter_groups(without, phase(batch_size=2))
    with pytest.raises(BundleError, match="batch normalisation in 2 processes"):
        parameter_groups(net, phase(batch_size=2))


def test_the_optimizer_takes_every_rate_as_given() -> None:
    groups = parameter_groups(network(), phase(rates={"^head": 0.1, "encoder": 0.01}))
    optimizer = optimizer_for(partial(torch.optim.AdamW, weight_decay=0.5), groups)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.5), (0.01, 0.5)]
    # a rate of the optimiser itself is not inherited by any group
    optimizer = optimizer_for(partial(torch.optim.SGD, lr=7.0), parameter_groups(network(), phase()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_an_optimizer_that_changes_the_rates_is_refused() -> None:
    def careless(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=0.3)

    with pytest.raises(BundleError, match=r"learning rates \[0.3\]"):
        optimizer_for(careless, parameter_groups(network(), phase(rates={"^head": 0.1, "encoder": 0.01})))


def test_no_optimizer_knows_of_what_is_frozen() -> None:
    net = network()
    optimizer = optimizer_for(torch.optim.AdamW, parameter_groups(net, phase(rates={"^head": 0.1})))
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert known == {id(parameter) for name, parameter in net.named_parameters() if name.startswith("head")}
