"""Files appear under their final name complete, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transforms.errors import ResourceError


def write_atomically(path: str | Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Write ``content`` to a temporary file beside ``path``, sync it, move it into place, sync the folder.

    Args:
        check: called with the temporary file before it takes its name; raises where it is not as it should be.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; what stood under ``path`` before still stands.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise ResourceError(
            f"{path}: cannot be written", str(problem), "free space or fix the permissions"
        ) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sweep_temporaries(folder: str | Path) -> int:
    """Remove what killed writers left anywhere in ``folder``; return how many files. Nobody may be writing there."""
    stale = [path for path in Path(folder).rglob(".*.tmp") if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable where the system can: Windows and some network file systems cannot sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
