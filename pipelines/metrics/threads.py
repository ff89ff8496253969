"""Work shared by threads: compiled kernels release the interpreter's lock, so plain threads are enough.

Numba's own parallel loops are not used: their thread pools do not survive a fork, and data loaders fork.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(task: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Return ``task(item)`` of every item in order, computed by so many threads."""
    items = list(items)
    if threads == 1 or len(items) < 2:
        return [task(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(task, items))
