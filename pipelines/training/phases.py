"""What a phase of training is: which parameters learn, at which rate, for how long, with which loss.

A run is a list of phases; most have one. A parameter that learns has its rate from the phase that it learns in, by
name: none inherits a rate by accident. Parameters that no rate names are frozen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pipelines.names import nearest
from pipelines.training.distributed import world_size
from transforms.errors import BundleError

EVERYTHING = ".*"


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: also of the folder of its checkpoints and logs.
        rates: regular expression, found anywhere in a parameter's name -> learning rate after the warm-up. A parameter
            that none finds is frozen.
        max_epochs: an epoch is ``steps_per_epoch`` batches.
        steps_per_epoch: batches.
        batch_size: patches per batch, over all processes.
        accumulation_steps: batches per optimiser step.
        warmup_epochs: the rates rise linearly.
        decay_power: then they fall as (1 - progress) ** power.
        patience: epochs without improvement before the phase ends, counted after the warm-up and a quarter of the
            phase; 0 = never.
        loss: name of the loss.
    """

    name: str
    rates: Mapping[str, float]
    max_epochs: int
    steps_per_epoch: int
    batch_size: int
    loss: str
    accumulation_steps: int = 1
    warmup_epochs: int = 0
    decay_power: float = 0.9
    patience: int = 0

    def __post_init__(self) -> None:
        for key in ("max_epochs", "steps_per_epoch", "batch_size", "accumulation_steps"):
            if getattr(self, key) < 1:
                raise BundleError(
                    f"phase {self.name}: {key} {getattr(self, key)}", "nothing would be learnt", "take 1 or more"
                )
        if not self.rates or not all(rate > 0 for rate in self.rates.values()):
            raise BundleError(
                f"phase {self.name}: learning rates {dict(self.rates)}",
                "expected at least one, all positive; what shall stand still is left out",
                "correct the rates",
            )

    @property
    def optimizer_steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may stand for fewer batches."""
        return -(-self.steps_per_epoch // self.accumulation_steps)


def plan_phases(phases: Sequence[Mapping[str, Any]] | None, learning_rate: float, **common: Any) -> list[Phase]:
    """Return the phases of a run.

    Args:
        phases: per phase what differs from the run's hyper-parameters: ``name``, ``rates``, ``learning_rate`` (of every
            parameter, instead of ``rates``) and the attributes of ``Phase``. None or empty = a single phase.
        learning_rate: of a phase that says nothing else.
        common: the attributes of ``Phase`` where a phase says nothing else.

    Raises:
        BundleError: an unknown key, a name that is missing or used twice, or a value that a phase cannot have.
    """
    known = {field.name for field in fields(Phase)} | {"learning_rate"}
    planned = []
    for number, given in enumerate(phases or [{"name": "train"}]):
        unknown = sorted(set(given) - known)
        if unknown or "name" not in given:
            raise BundleError(
                f"phases, number {number + 1}: " + (f"unknown key {unknown[0]!r}" if unknown else "no name"),
                f"known are {', '.join(sorted(known))}",
                nearest(unknown[0], known) if unknown else "give it one",
            )
        settings = {**common, **given}
        rate = settings.pop("learning_rate", learning_rate)
        settings["rates"] = {str(k): float(v) for k, v in settings.get("rates", {EVERYTHING: rate}).items()}
        planned.append(Phase(**settings))
    names = [phase.name for phase in planned]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"\w[\w-]*", name) for name in names):
        raise BundleError(f"phases {names}", "expected different plain words", "rename the phases")
    return planned


def parameter_groups(network: nn.Module, phase: Phase) -> list[dict[str, Any]]:
    """Freeze what does not learn in ``phase``; return one group of parameters per rate, for an optimiser.

    Raises:
        BundleError: a parameter has two rates, an expression finds none, or a module has running statistics of batches
            and is frozen, or its batches are too small or shared among processes.
    """
    groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in phase.rates}
    for name, parameter in network.named_parameters():
        found = [pattern for pattern in phase.rates if re.search(pattern, name)]
        if len(found) > 1:
            raise BundleError(
                f"phase {phase.name}: parameter {name} has {len(found)} rates",
                f"{' and '.join(found)} both name it",
                "make the expressions exclude one another",
            )
        parameter.requires_grad_(bool(found))
        if found:
            groups[found[0]].append(parameter)
    for pattern, parameters in groups.items():
        if not parameters:
            names = [name for name, _ in network.named_parameters()]
            raise BundleError(
                f"phase {phase.name}: no parameter's name matches {pattern!r}",
                f"the network has {len(names)} parameters, {names[0]} to {names[-1]}",
                "correct the expression",
            )
    _refuse_bad_statistics(network, phase)
    return [{"params": groups[p], "lr": rate, "name": p} for p, rate in phase.rates.items()]


def _refuse_bad_statistics(network: nn.Module, phase: Phase) -> None:
    """Refuse running statistics (batch normalisation) that move while frozen, or that are not those of a batch."""
    kept = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    ]
    for name, module in kept:
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            raise BundleError(
                f"phase {phase.name}: {name} is frozen but has running statistics",
                "they would go on moving while its parameters stand still",
                "let it learn, or build the network with another normalisation",
            )
    if kept and world_size() > 1:
        raise BundleError(
            f"phase {phase.name}: batch normalisation in {world_size()} processes",
            "each would measure its own patches, and the result would not be that of one process",
            "train in one process, or with --norm instance",
        )
    if kept and phase.batch_size < 2:
        raise BundleError(
            f"phase {phase.name}: batch normalisation with batch_size {phase.batch_size}",
            "a patch would be scaled by itself in training, and by the running statistics afterwards",
            "take a batch_size of 2 or more, or --norm instance",
        )


def optimizer_for(factory: Any, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return ``factory(groups)``, sure that every group has the rate that it was given.

    Raises:
        BundleError: the optimiser gave a group another rate.
    """
    wanted = [group["lr"] for group in groups]
    optimizer = factory(list(groups))
    got = [group["lr"] for group in optimizer.param_groups]
    if got != wanted:
        raise BundleError(f"optimizer: learning rates {got}", f"expected {wanted}", "do not set lr in `optimizer`")
    return optimizer
