"""An error as a user sees it: three lines and an exit code, under our command and under MONAI's.

Needs neither torch nor MONAI: a mistake in the arguments is answered at once.
"""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

from transforms.errors import FiducialError, find_error


def explain_errors() -> None:
    """Print an uncaught error as three lines and exit with its code, whoever started this process."""
    sys.excepthook = _three_lines_and_code


def _three_lines_and_code(kind: type[BaseException], exception: BaseException, trace: TracebackType | None) -> None:
    sys.exit(report(exception, debug="--debug" in sys.argv))


def report(exception: BaseException, debug: bool = False) -> int:
    """Print an error in three lines to standard error, with a traceback only where asked, and return the exit code."""
    if debug:
        traceback.print_exception(exception)
    error = find_error(exception)
    if error is None:
        if isinstance(exception, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return 130
        root = _root_cause(exception)
        error = FiducialError(
            f"{type(root).__name__}: {str(root) or 'no message'}",
            "nothing in Fiducial expected this",
            "run `fiducial --debug ...` for the traceback, and report it if the input is sound",
        )
    print(error, file=sys.stderr)
    return error.exit_code


def _root_cause(exception: BaseException) -> BaseException:
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return exception
