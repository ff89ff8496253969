"""Lock files: every package of a hospital's installation with its version and the sha256 of its files.

``locks/cpu.txt`` and ``locks/cuda.txt`` are made by ``make locks`` and kept in the repository, for an index looks
different tomorrow. ``pip install --require-hashes -r`` installs exactly them. Beside them stands ``licences.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from pipelines.files import write_json
from transforms.errors import BundleError

LOCKS = ("cpu", "cuda")
LICENCES = "licences.json"
UNKNOWN = "not declared"
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)")
_SHORT = 80  # characters; what is longer is the text of a licence, not its name


@dataclass(frozen=True)
class Pin:
    """A package of a lock: canonical name, version, and the sha256 of every file that may be installed for it."""

    name: str
    version: str
    sha256: tuple[str, ...]


def read_lock(text: str, where: str) -> list[Pin]:
    """Return the packages of a lock file, sorted by name.

    Args:
        text: of the file; comments start with ``#``.
        where: of it, for messages.

    Raises:
        BundleError: a line that is no pin with hashes (an index address, for instance, has no place in a lock), a
            package twice, or none.
    """
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    pins: dict[str, Pin] = {}
    for line in lines:
        match = _PIN.fullmatch(line.strip())
        name = canonicalize_name(match[1]) if match else ""
        if match is None or name in pins:
            raise BundleError(
                f"lock {where}: {line.strip()[:60]!r}",
                "expected each package once, as name==version --hash=sha256:...",
                "make it again: make locks",
            )
        pins[name] = Pin(name, match[2], tuple(sorted(_HASH.findall(match[3]))))
    if not pins:
        raise BundleError(f"lock {where}: empty", "it names no package", "make it again: make locks")
    return [pins[name] for name in sorted(pins)]


def licence_of(metadata: Mapping[str, Any]) -> str:
    """Return the licence that a package declares: its SPDX expression, else its classifier, else a short name."""
    expression = metadata.get("license_expression")
    if expression:
        return str(expression)
    named = [text.rpartition(" :: ")[2] for text in metadata.get("classifier", []) if text.startswith("License ::")]
    short = str(metadata.get("license") or "").strip()
    fits = 0 < len(short) <= _SHORT and "\n" not in short
    return ", ".join(named) or (short if fits else UNKNOWN)


def licences_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Return licence by package of an installation report of pip (``--dry-run --report``), sorted by name."""
    described = [entry["metadata"] for entry in report["install"]]
    return dict(sorted((canonicalize_name(each["name"]), licence_of(each)) for each in described))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``licences.json`` from a report of pip; part of ``make locks``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args(arguments)
    write_json(given.output, licences_of(json.loads(given.report.read_text())))


if __name__ == "__main__":
    main()
