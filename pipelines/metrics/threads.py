"""Work shared by threads: compiled kernels release the interpreter's lock, so plain threads are enough.

Numba's own parallel loops are not used: their thread pools do not survive a fork, and data loaders fork.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
    """Return ``task(item)`` of every item in order, computed by so many threads."""
    items = list(items)
    if threads == 1 or len(items) < 2:
        return [task(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(task, items))
