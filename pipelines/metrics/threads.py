"""Work shared by threads: compiled kernels release the interpreter's lock, so plain threads are enough.

The outermost :func:`run` starts the threads; what runs inside of it (the two sides of a label, the slabs of a search)
is offered to the same threads. So a thread that has no label left helps with the last one, and never do more threads
work than were asked for. Numba's own parallel loops are not used: their thread pools do not survive a fork, and data
loaders fork.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pipelines.metrics.jit import HAVE_NUMBA
from transforms.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(threads: int | None) -> int:
    """Return how many threads a metric uses: those asked for; None: ``NUMBA_NUM_THREADS``, or every core.

    Raises:
        UsageError: fewer than one.
    """
    if threads is None:
        if not HAVE_NUMBA:
            return 1
        from numba import config

        # Not numba.get_num_threads(): it starts Numba's own thread pool, which does not survive a fork.
        return int(vars(config)["NUMBA_NUM_THREADS"])
    if threads < 1:
        raise UsageError(f"metrics: threads = {threads}", "expected 1 or more", "leave it out to use every core")
    return int(threads)


def run(task: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Return ``task(item)`` of every item in order, computed by so many threads; inside of another run by that one's.

    The first error in the order of the items is raised, after all that had begun is done.
    """
    items = list(items)
    team = getattr(_of_this_thread, "team", None)
    if len(items) < 2 or (threads == 1 and team is None):
        return [task(item) for item in items]
    jobs = [_Job(task, item) for item in items]
    if team is not None:
        team.work(jobs)
    else:
        with _Team(threads) as team:
            team.work(jobs)
    return [job.outcome() for job in jobs]


_of_this_thread = threading.local()


class _Job:
    """One call, done by whoever takes it first."""

    def __init__(self, task: Callable[[Any], Any], item: Any) -> None:
        self.task, self.item = task, item
        self.taken, self.done = threading.Lock(), threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def take(self) -> None:
        """Do it, unless another thread has it."""
        if not self.taken.acquire(blocking=False):
            return
        try:
            self.result = self.task(self.item)
        except BaseException as error:  # raised again by outcome(), in the thread that asked
            self.error = error
        self.done.set()

    def outcome(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class _Team:
    """The thread that enters and its helpers."""

    def __init__(self, threads: int) -> None:
        self.offered: deque[_Job] = deque()
        self.change, self.closed = threading.Condition(), False
        self.helpers = [threading.Thread(target=self._help, daemon=True) for _ in range(threads - 1)]

    def __enter__(self) -> _Team:
        _of_this_thread.team = self
        for helper in self.helpers:
            helper.start()
        return self

    def __exit__(self, *error: object) -> None:
        _of_this_thread.team = None
        with self.change:
            self.closed = True
            self.offered.clear()  # not empty only after an interrupt: nobody waits for the rest
            self.change.notify_all()
        for helper in self.helpers:
            helper.join()

    def work(self, jobs: list[_Job]) -> None:
        """Do the jobs together with whoever is free; return when all are done."""
        with self.change:
            self.offered.extend(jobs)
            self.change.notify_all()
        for job in jobs:
            job.take()
        for job in jobs:
            job.done.wait()

    def _help(self) -> None:
        _of_this_thread.team = self
        while True:
            with self.change:
                while not self.offered and not self.closed:
                    self.change.wait()
                if not self.offered:
                    return
                job = self.offered.popleft()
            job.take()
