"""Is this bundle what its maker signed, and does it run nothing but what a bundle may? Answered before anything runs.

In this order: the archive's own bytes, the signature over the list of digests, every digest, and only then what the
configurations say. Nothing of the bundle is imported, unpacked to disk or parsed before its digest has been checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.export.archive import Budget, check_names, read_archive
from pipelines.export.scan import scan_files
from pipelines.export.signature import SIGNATURE, SUMS, check_signature, digests_of
from transforms.errors import DataError


@dataclass(frozen=True)
class Verified:
    """A bundle that has passed: its files by name, and who signed them (empty = nobody)."""

    files: Mapping[str, bytes]
    signer: str


def verify(
    bundle: str | Path, allowed_signers: str | Path | None = None, unsigned: bool = False, budget: Budget | None = None
) -> Verified:
    """Return the files of an exported bundle, all of them checked.

    Args:
        bundle: the archive, or the folder that was unpacked from it.
        allowed_signers: OpenSSH's list of who may sign; None = any valid signature.
        unsigned: accept a bundle without signature.
        budget: largest size.

    Raises:
        DataError: the first thing that is wrong.
    """
    bundle, budget = Path(bundle), budget or Budget()
    where = f"bundle {bundle.name}"
    files = _read_folder(bundle, budget, where) if bundle.is_dir() else read_archive(bundle, budget)
    if SUMS not in files:
        raise _refused(where, f"it has no {SUMS}")
    signer = _signer(files, allowed_signers, unsigned, where)
    _check_digests(files, where)
    scan_files(files, where)
    return Verified(files, signer)


def _signer(files: Mapping[str, bytes], allowed_signers: str | Path | None, unsigned: bool, where: str) -> str:
    if SIGNATURE in files:
        return check_signature(files[SUMS], files[SIGNATURE], allowed_signers, where)
    if not unsigned or allowed_signers is not None:
        raise _refused(where, "it is not signed")
    return ""


def _check_digests(files: Mapping[str, bytes], where: str) -> None:
    listed = digests_of(files[SUMS], where)
    present = set(files) - {SUMS, SIGNATURE}
    for name in sorted(present ^ set(listed)):
        raise _refused(where, f"{name!r} is " + ("not listed" if name in present else "missing"))
    for name, digest in listed.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise _refused(where, f"{name!r} is not the file that was exported")


def _read_folder(folder: Path, budget: Budget, where: str) -> dict[str, bytes]:
    """Return the files of a folder; links, sockets and whatever else is no file are refused, and none is followed."""
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in [*folders, *names]:
            path = Path(parent) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise _refused(where, f"{path.relative_to(folder).as_posix()!r} is a link or no file")
        paths += [Path(parent) / name for name in names]
        if len(paths) > budget.files:
            raise _refused(where, f"it has more than {budget.files} files")
    if sum(path.stat().st_size for path in paths) > budget.total_bytes:
        raise _refused(where, f"it has more than {budget.total_bytes} bytes")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    check_names(list(files), where)
    return {name: path.read_bytes() for name, path in files.items()}


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: refused", why, "fetch it again from its maker; do not run it")
