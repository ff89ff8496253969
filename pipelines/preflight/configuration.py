"""Lint of a bundle's configuration: an override that nobody reads is an error, by name, with the nearest valid key.

MONAI adds a misspelt override (``--max_epoch 5``) to the configuration and goes on without it. Every top-level key must
therefore be read by another item (``@key``) or be one of the ids that MONAI itself looks up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from transforms.errors import BundleError, UsageError

READ_BY_MONAI = frozenset(
    [
        "_meta_",
        "imports",
        "initialize",
        "run",
        "finalize",
        "bundle_root",
        "dataset_dir",
        "device",
        "network_def",
        "train",
        "validate",
        "val_interval",
        "dataset",
        "evaluator",
        "inferer",
        "handlers",
        "preprocessing",
        "postprocessing",
        "key_metric",
    ]
)
_REFERENCE = re.compile(r"@(?:::)?([A-Za-z_]\w*)")
_WORDS = {"true": True, "false": False, "null": None}
_STRUCTURE = frozenset(["_meta_", "imports", "initialize", "run", "finalize"])  # never meant where a key is misspelt


def referenced_keys(config: Any, inside: str = "") -> Iterator[str]:
    """Yield every top-level id that ``config`` refers to by ``@id``; a key's reference to itself does not count.

    As in MONAI, an ``@`` refers only in an expression (``$...``) or at the beginning of a text, never inside of one.
    """
    if isinstance(config, str):
        found = _REFERENCE.findall(config) if config.startswith("$") else _REFERENCE.match(config)
        names = [found[1]] if isinstance(found, re.Match) else found or []
        yield from (name for name in names if name != inside)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from referenced_keys(value, inside or str(key))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from referenced_keys(value, inside)


def refuse_unread_keys(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with a top-level key that nothing reads.

    Raises:
        UsageError: names the key and the nearest valid one (exit code 2: it is most often a misspelt option).
    """
    read = set(referenced_keys(dict(config))) | READ_BY_MONAI
    for key in config:
        if key not in read:
            valid = sorted(name for name in config if name in read and name not in _STRUCTURE)
            near = get_close_matches(str(key), valid, n=1, cutoff=0.5)
            raise UsageError(
                f"unknown key {key!r} in the configuration or on the command line",
                "nothing reads it, so its value would have no effect",
                f"did you mean --{near[0]}?" if near else f"valid keys: {', '.join(valid)}",
            )


def refuse_yaml_words(config: Mapping[str, Any]) -> None:
    """Refuse the texts ``true``, ``false`` and ``null`` at the top level: the command line reads Python, not YAML.

    Raises:
        UsageError: names the key.
    """
    for key, value in config.items():
        if isinstance(value, str) and value.strip().lower() in _WORDS:
            right = _WORDS[value.strip().lower()]
            raise UsageError(
                f"key {key!r} has the text {value!r}",
                "the command line reads Python values; this is a text, and counts as true whatever it says",
                f"write --{key} {right}",
            )


def refuse_absent_references(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that refers to an id that does not exist.

    Raises:
        BundleError: names the id and the nearest existing one.
    """
    for name in referenced_keys(dict(config)):
        if name not in config:
            near = get_close_matches(name, [str(key) for key in config], n=1)
            raise BundleError(
                f"the configuration refers to @{name}",
                "there is no such id",
                f"did you mean @{near[0]}?" if near else "add it, or remove the reference",
            )


def lint(config: Mapping[str, Any]) -> None:
    """Run every check of this module on a configuration with its macros resolved."""
    refuse_absent_references(config)
    refuse_unread_keys(config)
    refuse_yaml_words(config)
