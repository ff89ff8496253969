"""What a user writes behind a command: ``--key value`` pairs for the hyper-parameters of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transforms.errors import UsageError


def overrides_of(rest: Sequence[str]) -> dict[str, Any]:
    """Return ``--key value`` and ``--key=value`` pairs, read as MONAI's own command does: Python literals, else text.

    Raises:
        UsageError: a value without a key, or a key without a value.
    """
    from fire.parser import DefaultParseValue

    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs: dict[str, Any] = {}
    for position in range(0, len(words), 2):
        key = words[position]
        if not key.startswith("--") or position + 1 == len(words):
            raise UsageError(f"argument {key!r}", "expected pairs --key value", "write --key value")
        pairs[key[2:]] = DefaultParseValue(words[position + 1])
    return pairs
