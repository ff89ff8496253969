"""One archive per content: the same files give the same bytes, and every byte of an archive follows from its files.

Files are stored in the order of their names, not compressed, with one fixed time and one mode. So an export can be
repeated byte for byte, and a reader can ask more than "does it open": written again from what it holds, a genuine
archive gives itself. A bit that is flipped anywhere, also where no reader looks, shows.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from transforms.errors import DataError, ResourceError, UsageError

FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows
FILE_MODE = stat.S_IFREG | 0o644
UNIX = 3
BLOCK = 1 << 20
_FORBIDDEN = frozenset('\\:*?"<>|') | {chr(code) for code in range(32)} | {chr(127)}
_DEVICES = frozenset(["con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))])


@dataclass(frozen=True)
class Budget:
    """What an archive may ask of a machine: bytes in all, files, bytes of a name."""

    total_bytes: int = 8 << 30
    files: int = 10_000
    name_bytes: int = 240


def write_archive(files: Mapping[str, bytes | Path], target: IO[bytes]) -> None:
    """Write files as an archive.

    Args:
        files: content, or the file that holds it, by its name in the archive (POSIX, relative).
        target: a binary stream; nothing is read from it.

    Raises:
        DataError: a name that no reader should accept.
    """
    check_names(list(files), "the export")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in sorted(files):
            content = files[name]
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.create_system, entry.external_attr, entry.file_size = UNIX, FILE_MODE << 16, size
            with archive.open(entry, "w", force_zip64=size >= 1 << 31) as stored:
                for block in _blocks(content):
                    stored.write(block)


def file_digests(files: Mapping[str, bytes | Path]) -> dict[str, str]:
    """Return the sha256 of every file, by its name, sorted."""
    digests = {}
    for name in sorted(files):
        digest = hashlib.sha256()
        for block in _blocks(files[name]):
            digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def read_archive(path: str | Path, budget: Budget = Budget()) -> dict[str, bytes]:
    """Return the files of an archive that is exactly what ``write_archive`` writes of them.

    Nothing is written to disk, and nothing of the content is interpreted.

    Args:
        path: of the archive.
        budget: larger archives are refused before anything is read.

    Raises:
        DataError: no archive, beyond the budget, a name, link or mode that has no place in it, a wrong checksum, or
            bytes that do not follow from its files.
    """
    path = Path(path)
    where = f"archive {path.name}"
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"{where}: cannot be read", str(problem), "check the path") from problem
    if size > budget.total_bytes:
        raise _refused(where, f"it has {size} bytes, {budget.total_bytes} are allowed")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, where, budget, size)
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError) as problem:
        raise _refused(where, f"{type(problem).__name__}: {problem}") from problem
    except (OSError, ValueError, struct.error, UnicodeError, OverflowError) as problem:
        raise _refused(where, f"{type(problem).__name__}: {problem}") from problem
    _check_same_bytes(path, files, where)
    return files


def check_names(names: list[str], where: str) -> None:
    """Refuse names that leave the folder, mean a device somewhere, or are one file on some system and two on another.

    Raises:
        DataError: names the file.
    """
    seen: dict[str, str] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        bad = not name or name.startswith("/") or name.endswith("/") or "//" in name or name != "/".join(parts)
        for part in parts:
            stem = part.split(".")[0].lower()
            bad |= part in (".", "..") or bool(_FORBIDDEN & set(part)) or stem in _DEVICES or part[-1] in ". "
        if bad:
            raise _refused(where, f"it holds the name {name!r}, which has no place in an archive")
        folded = name.casefold()
        if folded in seen:
            raise _refused(where, f"it holds {seen[folded]!r} and {name!r}, one file on some systems")
        seen[folded] = name
    for name in seen:
        for parent in PurePosixPath(name).parents:
            if str(parent) in seen:
                raise _refused(where, f"{seen[str(parent)]!r} is a file and the folder of {seen[name]!r}")


def unpack(files: Mapping[str, bytes], folder: str | Path) -> Path:
    """Write the files of a verified bundle into a new folder, which appears complete or not at all, and return it.

    Args:
        files: as ``verify`` returns them: their names have been checked.
        folder: must not exist.

    Raises:
        UsageError: it exists.
        ResourceError: it cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists():
        raise UsageError(f"{folder} exists already", "a bundle is unpacked into a new folder", "name another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            partial = Path(scratch, "bundle")
            for name, content in files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            shutil.move(partial, folder)
    except OSError as problem:
        raise ResourceError(
            f"{folder}: cannot be written", str(problem), "free space or fix the permissions"
        ) from problem
    return folder


def _check_entries(entries: list[zipfile.ZipInfo], where: str, budget: Budget, size: int) -> None:
    if len(entries) > budget.files:
        raise _refused(where, f"it has {len(entries)} files, {budget.files} are allowed")
    total = 0
    for entry in entries:
        name = entry.filename
        if len(name.encode()) > budget.name_bytes:
            raise _refused(where, f"a name has {len(name.encode())} bytes, {budget.name_bytes} are allowed")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _refused(where, f"{name!r} is compressed; an export stores its files as they are")
        if entry.external_attr >> 16 != FILE_MODE:
            raise _refused(where, f"{name!r} is a link, a folder or an executable (mode {entry.external_attr >> 16:o})")
        total += entry.file_size
    if total > size:
        raise _refused(where, f"its files claim {total} bytes, the archive has {size}")
    check_names([entry.filename for entry in entries], where)


def _check_same_bytes(path: Path, files: Mapping[str, bytes], where: str) -> None:
    with path.open("rb") as there, tempfile.TemporaryFile() as again:
        write_archive(files, again)
        again.seek(0)
        position = 0
        while True:
            ours, theirs = again.read(BLOCK), there.read(BLOCK)
            if ours != theirs:
                raise _refused(where, f"it differs after byte {position} from what its files give")
            if not ours:
                return
            position += len(ours)


def _blocks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: refused", why, "fetch it again from its maker; do not unpack it by other means")
