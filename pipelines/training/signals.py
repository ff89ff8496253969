"""Being asked to stop: a cluster sends SIGTERM, or SIGUSR1 some minutes before the time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

ASK_TO_STOP = ("SIGTERM", "SIGUSR1")


@dataclass
class Asked:
    """Whether somebody has asked this process to stop.

    Attributes:
        name: of the signal, or None.
    """

    name: str | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Asked]:
    """Note the signals that ask to stop, instead of dying of them; outside, they do what they did before.

    Only the main thread of a process can do this; in another one, and for signals that the system does not know
    (SIGUSR1 on Windows), nothing changes.
    """
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        asked.name = signal.Signals(number).name

    known = [getattr(signal, name) for name in ASK_TO_STOP if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in known}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
