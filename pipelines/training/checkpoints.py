"""Weights on disk: safetensors that say in their own header what they are.

A file holds the network's tensors and, as JSON in the header, its *contract*: modalities, labels, spacing, patch, and
every other value with which alone the weights are valid. Evaluation and inference read the contract from the weights,
so a network can never be run with another preprocessing than it was trained with. Loading executes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines import tensorfile
from transforms.errors import BundleError

MUST_MEAN_THE_SAME = ("modalities", "labels", "foreground", "dimensions")


def save_weights(network: torch.nn.Module, header: Mapping[str, Any], path: str | Path) -> None:
    """Write the network's weights with ``header`` (JSON-able; must hold ``contract``), completely or not at all.

    Raises:
        ResourceError: the disk is full or the folder read-only.
    """
    tensorfile.write_tensors(path, distinct_tensors(network), header)


def distinct_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, each once: MONAI's DynUNet registers every block under two names."""
    found: dict[int, str] = {}
    state = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        found.setdefault(id(tensor), name)
    return {name: state[name] for name in found.values()}


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a weights file: ``contract``, epoch, metric, manifest digest.

    Raises:
        BundleError: the file is missing, damaged, or was not written by Fiducial.
    """
    if not Path(path).is_file():
        raise BundleError(
            f"checkpoint {path}: no such file",
            "there are no trained weights here",
            "train first, or name the weights with --checkpoint",
        )
    header = tensorfile.read_header(path)
    if "contract" not in header:
        raise BundleError(
            f"checkpoint {path}: no contract",
            "the file does not say for which modalities, labels and spacing it holds",
            "use weights written by a Fiducial training run",
        )
    return header


def read_contract(path: str | Path) -> dict[str, Any]:
    """Return the contract of a weights file: the hyper-parameters with which alone the weights are valid."""
    return read_header(path)["contract"]


def start_from(network: torch.nn.Module, path: str | Path, contract: Mapping[str, Any]) -> torch.nn.Module:
    """Load the weights to fine-tune from, if any, and return the network.

    Args:
        network: freshly built for ``contract``.
        path: weights of an earlier run, or an empty text: the network keeps its random weights.
        contract: of the run that starts. The spacing may be another; channels and labels must mean the same.

    Raises:
        BundleError: other modalities, labels, foreground or dimensions, or another architecture.
    """
    if not path:
        return network
    header = read_header(path)
    if header.get("epoch", 1) < 1:
        raise BundleError(f"initial_weights {path}: untrained", "its header says epoch 0", "name trained weights")
    earlier = header["contract"]
    for key in MUST_MEAN_THE_SAME:
        before, now = (meaning(each[key]) for each in (earlier, contract))
        if before != now:
            raise BundleError(
                f"initial_weights {path}: other {key}",
                f"they were trained with {before}, this run has {now}",
                f"start from weights with the same {key}, or from none",
            )
    return load_weights(network, path)


def meaning(value: Any) -> Any:
    """Return a contract's value without what may differ: a label's colour and its numbers in the files."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [label["name"] for label in value]
    return value


def load_weights(network: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """Load weights in place and return the network; every tensor must match by name and shape, none may be left over.

    Raises:
        BundleError: another architecture; the message counts what matches and names the first tensor that does not.
    """
    read_header(path)
    stored, _ = tensorfile.read_tensors(path)
    load_tensors(network, stored, f"checkpoint {path}")
    return network


def load_tensors(network: torch.nn.Module, stored: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy ``stored`` into the network's tensors, all of them.

    Raises:
        BundleError: another architecture, see ``load_weights``.
    """
    expected = distinct_tensors(network)
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    reshaped = [n for n in expected if n in stored and stored[n].shape != expected[n].shape]
    if missing or unexpected or reshaped:
        first = (missing + unexpected + reshaped)[0]
        matched = len(expected) - len(missing) - len(reshaped)
        raise BundleError(
            f"{source}: another architecture (first mismatch: {first})",
            f"{matched} of {len(expected)} tensors match, {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(reshaped)} of another shape; all must match",
            "use the configuration with which the weights were trained",
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])
