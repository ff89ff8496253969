"""The whole state of a run, so that it goes on after a kill as if nothing had happened, bit for bit.

Every part that changes during training has ``state_dict`` and ``load_state_dict``; together with the random generators
they form a tree, which one file holds: tensors as tensors, everything else as JSON. At least two files are kept; one
that cannot be read is passed over with a warning, in favour of the one before.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipelines import tensorfile
from pipelines.training.checkpoints import distinct_tensors, load_tensors
from transforms.errors import BundleError

logger = logging.getLogger(__name__)

KEPT_STATES = 2


class Stateful(Protocol):
    """What has a state that a run must not lose."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: mappings, lists, tuples, tensors, numbers, texts and None."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state back."""
        ...


class NetworkState:
    """The tensors of a network, each once (MONAI's DynUNet registers every block under two names)."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name."""
        return dict(distinct_tensors(self.network))

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy them back; all must match."""
        load_tensors(self.network, state, "state of the run")


class RandomState:
    """The random generators of Python, NumPy and torch (CPU and every GPU) of this process."""

    def state_dict(self) -> dict[str, Any]:
        """Return what they will draw next."""
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "python": random.getstate(),
            "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let them go on from there."""
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


def split_tensors(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return ``tree`` as JSON-able values, and its tensors, to which the values point by name.

    Tuples, and mappings whose keys are not texts, are marked, so that ``join_tensors`` gives back what went in.

    Raises:
        TypeError: a value that is neither a tensor nor has a form in JSON.
    """
    tensors: dict[str, torch.Tensor] = {}

    def split(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            name = f"{len(tensors)}{path}"  # a path alone is not unique: the keys 1 and "1", or a key with a slash
            tensors[name] = node
            return {"$tensor": name}
        if isinstance(node, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in node):
                return {key: split(value, f"{path}/{key}") for key, value in node.items()}
            return {"$items": [[key, split(value, f"{path}/{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            parts = [split(value, f"{path}/{i}") for i, value in enumerate(node)]
            return {"$tuple": parts} if isinstance(node, tuple) else parts
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{path}: a {type(node).__name__} has no place in the state of a run")

    return split(tree, ""), tensors


def join_tensors(values: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree of which ``split_tensors`` gave ``values`` and ``tensors``."""
    if isinstance(values, Mapping):
        if "$tensor" in values:
            return tensors[values["$tensor"]]
        if "$tuple" in values:
            return tuple(join_tensors(value, tensors) for value in values["$tuple"])
        if "$items" in values:
            return {key: join_tensors(value, tensors) for key, value in values["$items"]}
        return {key: join_tensors(value, tensors) for key, value in values.items()}
    if isinstance(values, list):
        return [join_tensors(value, tensors) for value in values]
    return values


def state_files(folder: str | Path) -> list[Path]:
    """Return the state files of a run, the newest first."""
    return sorted(Path(folder).glob("state-*.safetensors"), reverse=True)


def write_state(folder: str | Path, phase: int, iteration: int, tree: Mapping[str, Any]) -> Path:
    """Write the state at ``iteration`` of a phase, then remove all but it and the one before.

    States of later steps go too: they could not be read, or the run would have gone on from them.

    Raises:
        ResourceError: it cannot be written; the states before it still stand.
    """
    values, tensors = split_tensors(tree)
    path = Path(folder) / f"state-{phase:02d}-{iteration:09d}.safetensors"
    tensorfile.write_tensors(path, tensors, {"state": values})
    others = state_files(folder)
    here = others.index(path)
    for other in [*others[:here], *others[here + KEPT_STATES :]]:
        other.unlink(missing_ok=True)
    return path


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the tree of a state file.

    Raises:
        BundleError: the file is damaged.
    """
    tensors, header = tensorfile.read_tensors(path)
    return join_tensors(header["state"], tensors)


def newest_state(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest state that can be read, or None where there is none.

    Raises:
        BundleError: there are states, and none of them can be read.
    """
    files = state_files(folder)
    for path in files:
        try:
            return path, read_state(path)
        except BundleError as damage:
            logger.warning("%s: %s; falling back to the state before it", damage.what, damage.why)
    if files:
        raise BundleError(
            f"{folder}: none of its {len(files)} states can be read", "all are damaged", "start a new run"
        )
    return None


def tree_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Return the state of every part by name."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore_parts(parts: Mapping[str, Stateful], tree: Mapping[str, Any]) -> None:
    """Give every part its state back.

    Raises:
        BundleError: the state has other parts than the run.
    """
    if set(parts) != set(tree):
        raise BundleError(
            f"state of the run: other parts ({', '.join(sorted(set(parts) ^ set(tree)))})",
            "it was written by a run that was put together differently",
            "resume with the configuration of the run",
        )
    for name, part in parts.items():
        part.load_state_dict(tree[name])
