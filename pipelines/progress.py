"""Progress of long work: a bar on a terminal, plain lines elsewhere (a log, a cluster's output file)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty()


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield ``items`` one by one, showing how far we are; silent for work that ends within a few seconds."""
    if on_terminal():
        yield from tqdm(items, desc=description, unit="case", leave=False, file=sys.stderr, delay=1.0)
        return
    last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            logger.info("%s: %d of %d", description, number, len(items))
            last = time.monotonic()
