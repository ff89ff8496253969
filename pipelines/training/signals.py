"""Being asked to stop: a cluster sends SIGTERM, or SIGUSR1 some minutes before the time limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
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


def heed_the_parent_alone(worker: int = 0) -> None:
    """Let a process that prepares samples outlive a signal to the whole group; the process that it works for ends it.

    ``torchrun`` and clusters signal every process of a run. The training process then finishes its step and saves,
    for which it needs its workers. For ``worker_init_fn`` of a loader; where the system does not tell the sender of a
    signal (macOS, Windows), nothing changes.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signals = {getattr(signal, name) for name in ASK_TO_STOP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def listen() -> None:
        while True:
            asked = signal.sigwaitinfo(signals)
            if asked.si_signo == signal.SIGTERM and asked.si_pid == parent.pid:
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
