"""Planted failures in the configuration of the lesion bundle: names, adjusted logits, early stopping, phases."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from planted import Proof
from proof_labels import found_in
from proof_network import fusion, lesion

from pipelines.preflight import Finding, Inspection
from pipelines.preflight.configuration import RULES
from pipelines.training import plan_phases


def with_config(**changes: Any) -> Inspection:
    """Return the lesion bundle's run with keys (``a__b`` = inside of a) of its configuration set."""
    config = deepcopy(dict(lesion().config))
    for name, value in changes.items():
        *path, last = name.split("__")
        owner = config
        for part in path:
            owner = owner[part]
        owner[last] = value
    return replace(lesion(), config=config)


def with_phases(*phases: Mapping[str, Any], **common: Any) -> Inspection:
    settings = {"max_epochs": 20, "steps_per_epoch": 5, "batch_size": 2, "loss": "dice_ce", **common}
    return replace(with_config(phases=list(phases)), plan=plan_phases(phases, 0.001, **settings))


def found(inspection: Inspection, rule: str) -> list[Finding]:
    return found_in(inspection, rule, rules=RULES)


def healthy(rule: str) -> list[Finding]:
    """Return what the rule says of both bundles as they are."""
    return [*found(lesion(), rule), *found(fusion(), rule)]


TEMPERED = {"_target_": "pipelines.losses.supervised_loss", "_mode_": "callable", "temperature": 2.0}
IMPATIENT = {"_target_": "EarlyStopHandler", "patience": 3, "score_function": "$None"}

PROOFS: list[Proof] = [
    Proof(
        "R24", "every key, reference, component, argument and metric of the configuration",
        "class weights accepted by a configuration and read by nobody",
        lambda: found(with_config(class_weights=[1, 50]), "R24"), lambda: healthy("R24"),
    ),
    Proof(
        "R26", "temperatures, priors and shifts of the logits in the loss against those of the inference",
        "logit-adjusted losses whose adjustment inference did not know",
        lambda: found(with_config(loss=TEMPERED), "R26"), lambda: healthy("R26"),
    ),
    Proof(
        "R37", "the epoch from which an early stop counts, and its patience",
        "early stopping in the plateau of the warm-up, learning began at epoch 22",
        lambda: found(with_config(train__handlers=[IMPATIENT]), "R37"), lambda: healthy("R37"),
    ),
    Proof(
        "R41", "optimiser steps of every phase, rates of its parameters, length of schedules",
        "a phase that was skipped without a word",
        lambda: found(with_phases({"name": "head", "rates": {"no_such_head": 0.001}}), "R41"), lambda: healthy("R41"),
    ),
]  # fmt: skip
