"""A cache of preprocessed cases that can never be stale.

The key of an entry is a digest of everything that decides its content: the sha256 of every file of the case, the label
table, and the deterministic chain (classes, arguments, source code and library versions). Change one, and another
entry is made; nothing is ever compared by name or time. Arrays are stored as plain ``.npy`` and read by memory map, so
that a random patch costs only its own voxels.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Randomizable

from transforms.errors import BundleError, DataError, ResourceError

_LIBRARIES = ("monai", "nibabel", "numpy", "scipy", "scikit-image", "SimpleITK", "torch")
_LIBRARY_MODULES = {*_LIBRARIES, "skimage"}
_UNSEEN_ATTRIBUTES = {"R"}  # random states of transforms that are not used as random ones


def chain_digest(chain: Any) -> str:
    """Return the sha256 of a deterministic transform chain: classes, state, source code and the libraries' versions.

    Raises:
        BundleError: the chain draws random numbers, or holds a value that cannot be described.
    """
    return _sha256({"chain": _describe(chain), "libraries": {name: version(name) for name in _LIBRARIES}})


def item_digest(item: Mapping[str, Any]) -> str:
    """Return the sha256 of what a case contributes: all of the item, its files by their digests, never by path or date.

    Raises:
        DataError: the item has no digests.
    """
    if not item.get("digests"):
        raise DataError(
            f"case {item.get('case', '')}: no file digests",
            "the cache is keyed by content and the item carries none",
            "load the case from a manifest made by `fiducial manifest import`",
        )
    files = {key: digest for key, digest in item["digests"].items() if item.get(key) is not None}
    return _sha256({**{key: value for key, value in item.items() if key not in files}, "digests": files})


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk: arrays by memory map, everything else in memory."""

    folder: Path
    values: dict[str, Any]
    arrays: dict[str, dict[str, Any]]

    def array(self, key: str) -> np.ndarray:
        """Return a read-only memory map of one array (C, *spatial)."""
        return np.load(self.folder / f"{key}.npy", mmap_mode="r")

    def affine(self, key: str) -> torch.Tensor | None:
        """Return the affine (4, 4) of one array, or None if it has none."""
        affine = self.arrays[key]["affine"]
        return None if affine is None else torch.tensor(affine, dtype=torch.float64)

    def whole(self) -> dict[str, Any]:
        """Return the case as the chain returned it: every array in memory, with its affine."""
        return {**self.values, **{key: self.crop(key, None) for key in self.arrays}}

    def crop(self, key: str, window: tuple[slice, ...] | None) -> torch.Tensor:
        """Return a copy of one array, or of a window of it, as a tensor with its affine (that of the window).

        Args:
            key: name of the array.
            window: one slice per spatial axis, with start and stop; None = the whole. What lies outside the array is
                air: the lowest value inside, channel by channel, in arrays of floats, else 0.
        """
        source = self.array(key)
        values = torch.from_numpy(np.array(source) if window is None else _cut(source, window))
        affine = self.affine(key)
        if affine is None:
            return values
        if window is not None:
            affine = affine.clone()
            affine[:3, 3] += affine[:3, :3] @ torch.tensor([float(s.start) for s in window], dtype=torch.float64)
        return MetaTensor(values, affine=affine)


def _cut(source: np.ndarray, window: tuple[slice, ...]) -> np.ndarray:
    sizes = source.shape[1:]
    inside = tuple(slice(max(s.start, 0), min(s.stop, size)) for s, size in zip(window, sizes, strict=True))
    values = np.array(source[(slice(None), *inside)])
    around = [(max(-s.start, 0), max(s.stop - size, 0)) for s, size in zip(window, sizes, strict=True)]
    if not np.any(around):
        return values
    floating = np.issubdtype(values.dtype, np.floating)
    return np.stack([np.pad(c, around, constant_values=c.min() if floating else 0) for c in values])


class CaseCache:
    """Preprocess cases once, keep them by content.

    Args:
        folder: where entries lie; shared by any number of runs and processes (an entry appears complete or not at all).
        chain: the deterministic transforms, from paths to arrays.
        finish: called once on the chain's result, to add arrays that readers need (for instance centres of patches).
    """

    def __init__(self, folder: str | Path, chain: Callable, finish: Callable[[dict], dict] | None = None) -> None:
        self.folder = Path(folder)
        self.chain = chain
        self.finish = finish
        self.digest = _sha256([chain_digest(chain), _describe(finish)])

    def get(self, item: Mapping[str, Any]) -> CachedCase:
        """Return the preprocessed case, making it first if nobody has.

        Raises:
            DataError: the case cannot be read.
            ResourceError: the cache cannot be written.
        """
        entry = self.folder / _sha256([self.digest, item_digest(item)])
        damage = _damage(entry)
        if damage:
            logger.warning("cache %s: case %s is made again, %s", self.folder, item.get("case", ""), damage)
            shutil.rmtree(entry, ignore_errors=True)
        if not (entry / "entry.json").is_file():
            self._build(dict(item), entry)
        content = json.loads((entry / "entry.json").read_text())
        return CachedCase(entry, {**content["values"], "case": item["case"]}, content["arrays"])

    def _build(self, item: dict[str, Any], entry: Path) -> None:
        data = self.chain(item)
        if self.finish is not None:
            data = self.finish(data)
        working = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        try:
            working.mkdir(parents=True)
            _write_entry(data, working)
            working.replace(entry)
        except OSError as problem:
            if not (entry / "entry.json").is_file():  # otherwise another process was quicker, and its entry is ours
                raise ResourceError(
                    f"cache {self.folder}: case {item.get('case', '')} cannot be stored",
                    str(problem),
                    "free some space or choose another folder with cache_dir",
                ) from problem
        finally:
            shutil.rmtree(working, ignore_errors=True)


def _damage(entry: Path) -> str:
    """Return what is wrong with an entry, or nothing where it is whole or not there."""
    if not (entry / "entry.json").is_file():
        return ""
    try:
        arrays = json.loads((entry / "entry.json").read_text())["arrays"]
    except (ValueError, KeyError):
        return "its entry.json cannot be read"
    for key, about in arrays.items():
        file = entry / f"{key}.npy"
        size = file.stat().st_size if file.is_file() else 0
        if size != about.get("bytes"):
            return f"{file.name} has {size} bytes instead of {about.get('bytes')}"
    return ""


def _write_entry(data: Mapping[str, Any], folder: Path) -> None:
    arrays: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, (torch.Tensor, np.ndarray)):
            affine = value.affine.tolist() if isinstance(value, MetaTensor) else None
            plain = value.as_tensor() if isinstance(value, MetaTensor) else value
            np.save(folder / f"{key}.npy", np.asarray(plain, order="C"))
            arrays[key] = {"affine": affine, "bytes": (folder / f"{key}.npy").stat().st_size}
        elif _is_plain(value):
            values[key] = value
    (folder / "entry.json").write_text(json.dumps({"arrays": arrays, "values": values}))


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _describe(value: Any) -> Any:
    """Return a JSON-able description of a transform or an argument, equal exactly where behaviour is equal."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, Enum):
        return [type(value).__qualname__, str(value.value)]
    if isinstance(value, Mapping):
        return {"map": sorted(([_describe(k), _describe(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((_describe(v) for v in value), key=json.dumps)}
    if isinstance(value, Sequence):
        return [_describe(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return {"array": np.asarray(value).tolist(), "dtype": str(value.dtype)}
    if isinstance(value, (torch.dtype, torch.device, np.dtype, Path)):
        return str(value)
    if isinstance(value, partial):
        return {"partial": [_describe(value.func), _describe(value.args), _describe(value.keywords)]}
    if isinstance(value, type) or inspect.isroutine(value):
        return _describe_callable(value)
    return _describe_object(value)


def _describe_callable(value: Any) -> Any:
    """Describe a class or function by name and source; a function also by its code and what it has captured."""
    owner = getattr(value, "__self__", None)
    function = getattr(value, "__func__", value)
    described = {
        "name": f"{getattr(value, '__module__', None)}.{value.__qualname__}",
        "source": _source_digest(inspect.getmodule(value)),
        "owner": None if owner is None or inspect.ismodule(owner) else _describe(owner),
    }
    if inspect.isfunction(function):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        described["code"] = _describe_code(function.__code__)
        described["captured"] = _describe([cells, function.__defaults__, function.__kwdefaults__])
    return described


def _describe_code(code: CodeType) -> list[Any]:
    return [code.co_code.hex(), code.co_names, [_describe_constant(constant) for constant in code.co_consts]]


def _describe_constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _describe_code(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _describe_object(value: Any) -> Any:
    if isinstance(value, Randomizable) and type(value) is not Compose:  # MONAI's Compose is one, OneOf really draws
        raise BundleError(
            f"{type(value).__name__} stands in the deterministic chain",
            "it draws random numbers, so its result cannot be cached",
            "move it to the random transforms of training",
        )
    if not hasattr(value, "__dict__"):
        raise BundleError(
            f"{type(value).__name__} in the deterministic chain cannot be described",
            "its state decides the cached values and cannot be read",
            "use a class with plain attributes",
        )
    state = {
        k: _describe(v) for k, v in vars(value).items() if k not in _UNSEEN_ATTRIBUTES and not _is_method(v, value)
    }
    kind = type(value)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "source": _source_digest(inspect.getmodule(kind)),
        "state": sorted(state.items()),
    }


def _is_method(value: Any, owner: Any) -> bool:
    return getattr(value, "__self__", None) is owner


@cache
def _source_digest(module: Any) -> str | None:
    """Return the digest of the module's package (what a module imports is most often beside it), or of its lone file.

    Libraries are known by their version.
    """
    name = getattr(module, "__name__", "").split(".")[0]
    file = getattr(module, "__file__", None)
    if file is None or name in _LIBRARY_MODULES or name in sys.stdlib_module_names:
        return None
    folder = Path(file).parent
    files = sorted(folder.rglob("*.py")) if getattr(module, "__package__", "") else [Path(file)]
    return _sha256([[f.relative_to(folder).as_posix(), hashlib.sha256(f.read_bytes()).hexdigest()] for f in files])
