"""A zip file unpacked under running numbers, within a budget: neither its names nor its size can do harm."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from transforms.errors import DataError
from transforms.ingest_budget import Budget, check_file_size, variable

STUDY_FILES = 2**16
COMPRESSION_LIMIT = 200  # of a member: slices compress by 2 to 10, a bomb by 1000


def file_limit(budget: Budget) -> int:
    """Return how many files a study may have."""
    return min(budget.files, STUDY_FILES)


def unpacked(archive: Path, folder: Path, budget: Budget) -> Iterator[Path]:
    """Unpack a zip file into ``folder`` under running numbers; yield the files.

    Raises:
        DataError: no zip file, encrypted, damaged (CRC), more files or bytes than the budget, inflating too much.
    """
    where, again = "input: the zip file", "send the archive again"
    check_file_size(archive.stat().st_size, where, budget)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if len(members) > file_limit(budget) or total > budget.file_bytes:
                raise DataError(
                    where,
                    f"{len(members)} files and {total} bytes, more than the budget of "
                    f"{file_limit(budget)} files and {budget.file_bytes} bytes",
                    f"give one study at a time, or raise {variable('file_bytes')}",
                )
            for number, member in enumerate(members, start=1):
                if member.flag_bits & 1:
                    raise DataError(f"{where}, member {number}", "it is encrypted", "unpack it first")
                if member.file_size > COMPRESSION_LIMIT * max(member.compress_size, 1):
                    ratio = member.file_size / max(member.compress_size, 1)
                    raise DataError(f"{where}, member {number}", f"it inflates {ratio:.0f} times", "unpack it first")
                path = folder / f"{number:06d}.dcm"
                with opened.open(member) as packed, path.open("wb") as file:
                    while block := packed.read(2**20):  # never more than the size declared, and its CRC is compared
                        file.write(block)
                yield path
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zipfile.LargeZipFile) as problem:
        raise DataError(where, f"it is damaged or of an unknown kind ({type(problem).__name__})", again) from None
    except Exception as problem:
        if isinstance(problem, (DataError, OSError)):
            raise
        raise DataError(where, f"it cannot be unpacked ({type(problem).__name__})", again) from None
