"""Several weights as one network: their contracts say the same, and each becomes a member."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.training.checkpoints import load_weights, meaning, read_contract
from transforms.errors import BundleError, UsageError


def common_contract(weights: Sequence[str | Path]) -> dict[str, Any]:
    """Return the contract of all weights; one preprocessing must do for every member.

    Raises:
        BundleError: two contracts differ; the message names the first key that does.
    """
    first, *others = [read_contract(path) for path in weights]
    for path, contract in zip(weights[1:], others, strict=True):
        for key in sorted({*first, *contract}):
            before, now = (meaning(each.get(key)) for each in (first, contract))
            if before != now:
                raise BundleError(
                    f"checkpoint {path}: other {key} than {weights[0]}",
                    f"it was trained with {now}, the other with {before}",
                    "an ensemble needs members with one preprocessing and one architecture: leave it out",
                )
    return first


def load_members(network: torch.nn.Module, weights: Sequence[str | Path]) -> torch.nn.Module:
    """Load weights into the network and return it; of several, return a ``ModuleList`` with a network for each.

    Args:
        network: freshly built.
        weights: one file per member.

    Raises:
        BundleError: another architecture, see ``load_weights``.
    """
    if len(weights) == 1:
        return load_weights(network, weights[0])
    return torch.nn.ModuleList([load_weights(copy.deepcopy(network), path) for path in weights])


def refuse_seen_cases(split: str, checkpoint: str | Sequence[str] = "", ensemble: str = "") -> None:
    """Refuse to measure an ensemble on anything but test cases: the others trained some of its members.

    Args:
        split: to be measured.
        checkpoint, ensemble: as ``find_weights``.

    Raises:
        UsageError: several networks, and another split than test.
    """
    if split != "test" and (ensemble or (not isinstance(checkpoint, (str, Path)) and len(checkpoint) > 1)):
        raise UsageError(
            f"split {split} with an ensemble",
            "its cases were in the training of some members, so the result would be too good",
            "use --split test; for the other cases measure each fold by its own network: "
            "fiducial evaluate ... --folds N --run_name NAME",
        )
