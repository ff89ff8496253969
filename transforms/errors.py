"""Errors that tell a user, in three lines, what is wrong, why, and what to do.

Every refusal in the project is one of the four classes below. They live in the lowest layer so that a transform can
raise them; the command line (and the hook for ``python -m monai.bundle``) turns them into three lines and an exit code.
"""

from __future__ import annotations

import re
from typing import ClassVar

_THREE_LINES = re.compile(r"error: (?P<what>.*)\n +why: (?P<why>.*)\n +fix: (?P<fix>.*)")
_RELAYED = re.compile(r"\.(?P<kind>UsageError|DataError|BundleError|ResourceError): " + _THREE_LINES.pattern)


class FiducialError(Exception):
    """A refusal in three lines.

    Args:
        what: what failed, naming the file, case and key at fault.
        why: what was measured and what was expected.
        fix: what the user can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        # A DataLoader worker hands back the formatted traceback as the only argument: find our three lines in it.
        relayed = _THREE_LINES.search(what)
        if relayed:
            what, why, fix = relayed["what"], relayed["why"], relayed["fix"]
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = (" ".join(part.split()) for part in (what, why, fix))

    def __str__(self) -> str:
        return f"error: {self.what}\n  why: {self.why}\n  fix: {self.fix}"


class UsageError(FiducialError):
    """The command line asks for something that does not exist or contradicts itself (exit code 2)."""

    exit_code = 2


class DataError(FiducialError):
    """An image, a label, a mask or a manifest cannot be used (exit code 3)."""

    exit_code = 3


class BundleError(FiducialError):
    """A bundle, its configuration or its weights cannot be used (exit code 4)."""

    exit_code = 4


class ResourceError(FiducialError):
    """Disk, memory or permissions do not suffice (exit code 5)."""

    exit_code = 5


class InterruptedRun(FiducialError):  # noqa: N818 - somebody asked for it
    """A run was asked to stop, saved its state and can be resumed (exit code 75, "try again" of sysexits)."""

    exit_code = 75


def find_error(exception: BaseException | None) -> FiducialError | None:
    """Return the ``FiducialError`` at the root of ``exception``, or None.

    MONAI wraps what a transform or a constructor raises in a ``RuntimeError``: the refusal is found down the chain of
    causes, or in the traceback that a DataLoader worker hands over as text.
    """
    seen: set[int] = set()
    while exception is not None and id(exception) not in seen:
        if isinstance(exception, FiducialError):
            return exception
        relayed = _RELAYED.search(str(exception))
        if relayed:
            kinds = {kind.__name__: kind for kind in (UsageError, DataError, BundleError, ResourceError)}
            return kinds[relayed["kind"]](relayed["what"], relayed["why"], relayed["fix"])
        seen.add(id(exception))
        exception = exception.__cause__ or (None if exception.__suppress_context__ else exception.__context__)
    return None
