"""Bytes of a file, read so that nothing surprises: regular files within the size budget, gzip drained to its checksum.

What the operating system, zlib and gzip raise while a file is read becomes a ``DataError`` in three lines.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from transforms.errors import DataError, ResourceError
from transforms.ingest_budget import Budget, check_file_size

COPY_AGAIN = "copy the file again from its source, or leave the case out of the manifest"
PADDING = 512  # Zero bytes behind the voxels, which some writers add to fill a block.
_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def named(path: str | Path, case: str = "", key: str = "") -> str:
    """Return the path, with case and key where they are known, for the first line of a message."""
    owner = ", ".join(f"{name} {value}" for name, value in (("case", case), ("key", key)) if value)
    return f"{path} ({owner})" if owner else str(path)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Translate what the operating system, gzip or the memory raise while a file is read.

    Raises:
        DataError: an unreadable file, a truncated or corrupt stream.
        ResourceError: not enough memory for an image within the budget.
    """
    try:
        yield
    except EOFError as error:
        raise DataError(where, "the gzip stream is truncated: it ends before its checksum", COPY_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(where, f"the gzip stream is corrupt: {error}", COPY_AGAIN) from error
    except FileNotFoundError as error:
        raise DataError(where, "the file does not exist", "check the manifest's root and the path") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(where, f"the file cannot be read: {reason}", "check the path and its rights") from error
    except MemoryError as error:
        raise ResourceError(
            where, "there is not enough memory to read it", "use a larger machine, or crop or resample the image"
        ) from error


@contextmanager
def opened(path: str | Path, where: str, budget: Budget, *, gunzip: bool = False) -> Iterator[BinaryIO]:
    """Yield the file's bytes, inflated where ``gunzip`` is set and they are gzip.

    Raises:
        DataError: no such file, no regular file (a pipe would wait for ever), more bytes than the budget; and what
            ``reading`` translates.
    """
    with reading(where):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(where, "the file cannot be read: it is no regular file", "give the path of an image file")
        check_file_size(status.st_size, where, budget)
        with open(path, "rb") as raw:
            yield inflated(raw) if gunzip else raw


def inflated(raw: BinaryIO) -> BinaryIO:
    """Return the gzip stream that starts at the position of ``raw``, or ``raw`` itself where none does."""
    start = raw.tell()
    compressed = raw.read(2) == _GZIP_MAGIC
    raw.seek(start)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw


def read_up_to(stream: BinaryIO, count: int) -> bytearray:
    """Return the next ``count`` bytes, or fewer at the end; memory grows with what is there, not with what is asked."""
    content = bytearray()
    while len(content) < count and (chunk := stream.read(min(_CHUNK, count - len(content)))):
        content += chunk
    return content


def read_body(stream: BinaryIO, expected: int, where: str) -> bytearray:
    """Return ``expected`` bytes of voxels and read on to the end of the stream, where gzip compares its checksum.

    Raises:
        DataError: fewer bytes, or more than up to ``PADDING`` zero bytes behind them.
    """
    body = read_up_to(stream, expected)
    tail = read_up_to(stream, PADDING + 1)
    if len(body) < expected or len(tail) > PADDING or any(tail):
        found = f"{len(body)}" if len(body) < expected else f"at least {expected + len(tail)}"
        raise DataError(where, f"the file holds {found} bytes of voxels, its header declares {expected}", COPY_AGAIN)
    return body


def check_digest(files: list[Path], root: Path, sha256: str, where: str) -> None:
    """Raise a ``DataError`` unless ``content_digest`` is ``sha256``."""
    with reading(where):
        found = content_digest(files, root)
    if found != sha256.lower():
        raise DataError(
            where,
            f"the sha256 is {found}, expected {sha256}",
            "restore the recorded file; an image that was changed on purpose needs a new digest",
        )


def content_digest(files: list[Path], root: Path) -> str:
    """Return the sha256 of an image's bytes: of its one file, or of the list of the digests of several.

    The list has a line ``<sha256>  <path below root>`` for each, as ``sha256sum`` prints it, sorted by path (POSIX).
    """
    if len(files) == 1:
        return _file_digest(files[0])
    lines = sorted((path.relative_to(root).as_posix(), _file_digest(path)) for path in files)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
