"""Tensors and JSON in one file that proves itself: safetensors with a digest over every byte that matters.

Used for weights, for the state of a run and for a batch that is kept for replay. A file appears complete or not at all,
and has been read back before it takes its name. Loading executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from pipelines.files import write_atomically
from transforms.errors import BundleError, ResourceError

HEADER_KEY = "fiducial"
DIGEST_KEY = "sha256"
_DAMAGED = "the file is damaged: take another checkpoint of the run"


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``header`` (JSON-able, no NaN), completely or not at all.

    Only values are kept: tensors that share storage (views, tied weights) come back as tensors of their own.

    Raises:
        ResourceError: the disk is full, the folder read-only, or the file does not read back as it was written.
    """
    stored = _apart(tensors)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    metadata = {HEADER_KEY: text, DIGEST_KEY: _digest(stored, text)}

    def reads_back(temporary: Path) -> None:
        try:
            read_tensors(temporary)
        except BundleError as damage:
            raise ResourceError(
                f"{path}: does not read back as it was written", damage.why, "write to another disk"
            ) from damage

    write_atomically(path, _in_order(save(stored, metadata=metadata)), check=reads_back)


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a file of ``write_tensors``; its tensors are not read, its digest is not proven.

    Raises:
        BundleError: the file is damaged or is no safetensors file. Without a header of ours, the result is empty.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata.get(HEADER_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as problem:
        raise BundleError(f"{path}: unreadable", str(problem), _DAMAGED) from problem


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors (on the CPU) and header of a file, its digest proven.

    Raises:
        BundleError: the file is damaged, even by one bit.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as problem:
        raise BundleError(f"{path}: unreadable", str(problem), _DAMAGED) from problem
    if not {HEADER_KEY, DIGEST_KEY} <= set(metadata):
        raise BundleError(f"{path}: no digest", "it was not written by this version of Fiducial", "train again with it")
    text = metadata[HEADER_KEY]
    if metadata[DIGEST_KEY] != _digest(tensors, text):
        raise BundleError(f"{path}: damaged", "its content is not what its digest says", _DAMAGED)
    return tensors, json.loads(text)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors on the CPU, no two in one storage: the library refuses those that overlap."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return apart


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library writes them at random, equal weights differ."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _digest(tensors: Mapping[str, torch.Tensor], header: str) -> str:
    """Return the SHA-256 of the header's text and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
