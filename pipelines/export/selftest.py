"""Does this copy compute what the original computed? The golden case through the whole chain, backend by backend."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.export.archive import unpack
from pipelines.export.golden import CASE, FOLDER, beyond, differences, read_golden, run_golden
from pipelines.export.verify import verify
from pipelines.inference.backends import FILE_OF, not_installed
from pipelines.names import nearest
from transforms.errors import BundleError, UsageError


@dataclass(frozen=True)
class Tested:
    """What became of a backend: ``passed``, ``failed`` or ``not run``, with the reason; figures as ``differences``."""

    backend: str
    status: str
    reason: str
    figures: Mapping[str, float]


def selftest(
    bundle: str | Path,
    backends: Sequence[str] = (),
    allowed_signers: str | Path | None = None,
    unsigned: bool = False,
) -> list[Tested]:
    """Verify a bundle, then run its golden case; nothing is downloaded.

    Args:
        bundle: the archive, or the folder that was unpacked from it.
        backends: to test; empty = every one that is installed.
        allowed_signers, unsigned: see ``verify``.

    Raises:
        DataError: the bundle does not pass ``verify``.
        UsageError: no such backend, or one that was asked for is not installed.
    """
    verified = verify(bundle, allowed_signers, unsigned)
    with tempfile.TemporaryDirectory() as scratch:
        return run_backends(unpack(verified.files, Path(scratch, "bundle")), backends)


def run_backends(folder: Path, backends: Sequence[str] = ()) -> list[Tested]:
    """Run the golden case of an unpacked bundle; see ``selftest``."""
    expected, tolerances = read_golden(folder)
    available = backends_of(folder)
    for backend in backends:
        if backend not in tolerances or backend not in available:
            valid = [name for name in available if name in tolerances]
            raise UsageError(f"backend {backend!r}", "there is no file or golden case for it", nearest(backend, valid))
        if available[backend]:
            raise UsageError(f"backend {backend}: cannot be tested", available[backend], "install it, or leave it out")
    tested = []
    for backend in backends or [name for name in tolerances if name in available]:
        if available[backend]:
            tested.append(Tested(backend, "not run", available[backend], {}))
            continue
        found = run_golden(folder, folder / FOLDER / "input" / CASE, {"backend": backend})
        figures = differences(expected, found)
        wrong = beyond(figures, expected, tolerances[backend])
        tested.append(Tested(backend, "failed" if wrong else "passed", "; ".join(wrong), figures))
    return tested


def backends_of(folder: Path) -> dict[str, str]:
    """Return the backends that a bundle has a file for, each with what is missing here (empty = nothing)."""
    exported = [name for name, file in FILE_OF.items() if (folder / "models" / file).is_file()]
    return {name: not_installed(name) for name in ("torch", *exported)}


def refuse_failed(tested: Sequence[Tested], bundle: str | Path) -> None:
    """Raise where a backend has failed.

    Raises:
        BundleError: names the backends and by how much they differ.
    """
    failed = [each for each in tested if each.status == "failed"]
    if failed:
        raise BundleError(
            f"selftest of {Path(bundle).name}: {', '.join(each.backend for each in failed)} failed",
            "; ".join(f"{each.backend}: {each.reason}" for each in failed),
            "do not use it here: install from the bundle's lock, and fetch the bundle again from its maker",
        )


def table_of(tested: Sequence[Tested]) -> str:
    """Return what became of every backend, a line each."""
    lines = []
    for each in tested:
        figures = ", ".join(f"{name} {value:.2g}" for name, value in each.figures.items())
        lines.append(f"{each.backend:12} {each.status:8} {figures or each.reason}")
    return "\n".join(lines)
