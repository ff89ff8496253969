"""Planted failures of weights: what decides an output and stands nowhere, parents that were never trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from planted import Proof
from proof_network import folder, found, fusion, lesion
from torch import nn

from pipelines.preflight import Inspection
from pipelines.preflight.checkpoint import RULES
from pipelines.training import save_weights

HERE = "weights come back"


def with_another_slope() -> Inspection:
    """Return the lesion bundle's run, its network changed after it was built: neither contract nor weights say so."""
    network = copy.deepcopy(lesion().network)
    for module in network.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.2
    return replace(lesion(), network=network)


def starting_from(path: Any) -> Inspection:
    return replace(lesion(), config={**lesion().config, "initial_weights": str(path)})


def parent(name: str, **header: Any) -> Inspection:
    """Return a run that starts from weights with a header of these entries."""
    path = folder() / "parents" / f"{name}.safetensors"
    save_weights(lesion().network, {"contract": dict(lesion().contract), **header}, path)
    return starting_from(path)


PROOFS = [
    Proof(
        rule="R29",
        check="a network rebuilt from contract and weights gives the same output",
        origin="adapters of the weights did not fit the network that was built",
        planted=lambda: found(RULES, "R29", with_another_slope(), HERE),
        healthy=lambda: found(RULES, "R29", lesion(), HERE) + found(RULES, "R29", fusion(), HERE),
    ),
    Proof(
        rule="R38",
        check="weights to start from are there, and trained",
        origin="the second phase started from a model that was never trained",
        planted=lambda: [
            *found(RULES, "R38", starting_from(folder() / "nowhere.safetensors")),
            *found(RULES, "R38", parent("untrained", epoch=0)),
        ],
        healthy=lambda: found(RULES, "R38", lesion()) + found(RULES, "R38", parent("trained", epoch=3)),
    ),
]
