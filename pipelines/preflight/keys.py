"""Keys of a bundle's configuration: each is read by something, each reference leads to one, each stands once.

A fault is yielded as the error that it would be: it names the key, and the nearest valid one. Macros and overrides of a
configuration are resolved, except where it says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pipelines.names import nearest
from pipelines.preflight.components import REFERENCE, SEPARATOR, blocks, items
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
# of blocks without a target, what MONAI looks up by path (monai.bundle.properties)
_NESTED_READ_BY_MONAI = frozenset(
    f"{block}::{key}"
    for block in ("train", "validate")
    for key in (
        "trainer",
        "evaluator",
        "dataset",
        "inferer",
        "handlers",
        "preprocessing",
        "postprocessing",
        "key_metric",
    )
)
# options of MONAI's own ``run``: near enough to a misspelt key to be what was meant
_OPTIONS_OF_RUN = (
    "args_file",
    "config_file",
    "final_id",
    "init_id",
    "logging_file",
    "meta_file",
    "run_id",
    "tracking",
    "workflow_type",
)
_REFERENCE = re.compile(r"@(?:::|#)?([A-Za-z_]\w*)")
_WORDS = {"true": True, "false": False, "null": None}
_STRUCTURE = frozenset(["_meta_", "imports", "initialize", "run", "finalize"])  # never meant where a key is misspelt
_METRIC_BLOCKS = ("key_metric", "key_val_metric", "key_train_metric", "additional_metrics", "metrics")
_COMPUTED_BY_THE_TRAINER = ("loss",)
_ASKED_BY_FUNCTION = re.compile(r"stopping_fn_from_metric\(\s*['\"]([^'\"]+)['\"]")


def referenced_keys(config: Any, inside: str = "") -> Iterator[str]:
    """Yield every top-level id that ``config`` refers to by ``@id``; a key's reference to itself does not count.

    As in MONAI, an ``@`` refers only in an expression (``$...``) or at the beginning of a text, never inside of one.
    """
    for owner, path in references(config, inside):
        if path[0] != owner:
            yield path[0]


def references(config: Any, inside: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield (the top-level id that refers, the parts of the id that it refers to)."""
    if isinstance(config, str):
        match = REFERENCE.match(config)
        found = REFERENCE.findall(config) if config.startswith("$") else [match[1]] if match else []
        yield from ((inside, SEPARATOR.split(name)) for name in found)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from references(value, inside or str(key))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from references(value, inside)


def unread_keys(config: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield a fault for each top-level key that nothing reads."""
    read = set(referenced_keys(dict(config))) | READ_BY_MONAI
    valid = sorted(name for name in config if name in read and name not in _STRUCTURE)
    for key in config:
        if key not in read:
            near = get_close_matches(str(key), [*valid, *_OPTIONS_OF_RUN], n=1, cutoff=0.5)
            yield UsageError(
                f"unknown key {key!r} in the configuration or on the command line",
                "nothing reads it, so its value would have no effect",
                f"did you mean --{near[0]}?" if near else f"valid keys: {', '.join(valid)}",
            )


def unread_nested_keys(config: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield a fault for each key of a top-level block without ``_target_`` that nothing reads.

    Where the block is referred to as a whole (``@contract``), everything in it may be read; a key then counts as
    misspelt only if nobody asks for it by name and it nearly is another key of the block.
    """
    paths = {tuple(path[:2]) for _, path in references(dict(config))}
    texts = " ".join(v for _, v in items(config) if isinstance(v, str) and v.startswith("$"))
    for name, block in config.items():
        if not isinstance(block, Mapping) or "_target_" in block or name == "_meta_":
            continue
        asked = {key for at, key in (p for p in paths if len(p) == 2) if at == name}
        asked |= set(re.findall(rf"@{re.escape(str(name))}\[['\"](\w+)['\"]\]", texts))
        whole = (name,) in paths
        for key in block:
            if key in asked or f"{name}::{key}" in _NESTED_READ_BY_MONAI:
                continue
            others = [str(other) for other in block if other != key]
            if not whole or get_close_matches(str(key), others, n=1, cutoff=0.85):
                yield UsageError(
                    f"unknown key '{name}::{key}' in the configuration or on the command line",
                    "nothing reads it, so its value would have no effect",
                    nearest(str(key), others),
                )


def absent_references(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each reference to an id that does not exist, with the nearest existing one."""
    for name in referenced_keys(dict(config)):
        if name not in config:
            near = get_close_matches(name, [str(key) for key in config], n=1)
            yield BundleError(
                f"the configuration refers to @{name}",
                "there is no such id",
                f"did you mean @{near[0]}?" if near else "add it, or remove the reference",
            )


def absent_parts(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each reference into a block (``@train#dataset``, ``@contract['spacing']``) that is absent."""
    for _, path in references(dict(config)):
        place, known = _first_absent(config, path)
        if place > 0:  # the first part is judged above
            yield BundleError(
                f"the configuration refers to @{'#'.join(path)}",
                f"@{'#'.join(path[:place])} has no {path[place]!r}",
                nearest(path[place], known),
            )
    for at, value in items(config):
        for name, key in re.findall(r"@(\w+)\[['\"](\w+)['\"]\]", value) if isinstance(value, str) else ():
            block = config.get(name)
            if isinstance(block, Mapping) and "_target_" not in block and key not in block:
                yield BundleError(
                    f"{at}: the configuration asks for @{name}[{key!r}]",
                    f"@{name} has no {key!r}",
                    nearest(key, [str(k) for k in block]),
                )


def _first_absent(config: Any, path: Sequence[str]) -> tuple[int, list[str]]:
    """Return the place of the first part of an id that is not there and what is there; -1 where all is, or may be."""
    here = config
    for place, part in enumerate(path):
        if isinstance(here, Mapping):
            if part not in here:
                return place, [str(key) for key in here]
            here = here[part]
        elif isinstance(here, (list, tuple)):
            if not part.isdigit() or int(part) >= len(here):
                return place, [str(index) for index in range(len(here))]
            here = here[int(part)]
        else:
            return -1, []  # an expression, a reference or a macro
    return -1, []


def yaml_words(config: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield a fault for each text ``true``, ``false`` or ``null``: the command line reads Python, not YAML."""
    for at, value in items(config):
        meant_as_text = at.rsplit("::", 1)[-1] in ("_desc_", "_disabled_")
        if isinstance(value, str) and value.strip().lower() in _WORDS and not meant_as_text:
            right = _WORDS[value.strip().lower()]
            yield UsageError(
                f"key {at!r} has the text {value!r}",
                "the command line reads Python values; this is a text, and counts as true whatever it says",
                f"write --{at} {right}",
            )


def disabled_references(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each reference to a component that is switched off: MONAI hands over None, and says nothing."""
    disabled = {at for at, block in blocks(config) if _is_true(block.get("_disabled_", False), config)}
    for owner, path in references(dict(config)):
        at = "::".join(path)
        if at in disabled and owner != path[0]:
            yield BundleError(
                f"{owner} refers to @{at}, which is disabled",
                "a disabled component is None wherever it is referred to",
                f"enable {at}, or take the reference out",
            )


def _is_true(value: Any, config: Mapping[str, Any]) -> bool:
    """Return whether ``_disabled_`` is true, where that can be told from a plain value or ``$[not] @key``."""
    if isinstance(value, str):
        match = re.fullmatch(r"\$?\s*(not\s+)?@(\w+)", value.strip())
        if match and not isinstance(config.get(match[2]), (Mapping, list)):
            plain = config.get(match[2])
            return not str(plain).startswith(("$", "@", "%")) and bool(plain) is not bool(match[1])
        return value.strip().lower() in ("true", "$true")
    return bool(value)


def metrics_nobody_computes(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each metric that a saver, a checkpoint or early stopping asks for and nothing computes."""
    computed = {*_COMPUTED_BY_THE_TRAINER}
    for at, value in items(config):
        if at.rsplit("::", 1)[-1] in _METRIC_BLOCKS and isinstance(value, Mapping) and "_target_" not in value:
            computed |= {str(name) for name in value}
    for at, name in _metrics_asked_for(config):
        if name not in computed:
            yield BundleError(
                f"{at} asks for the metric {name!r}",
                f"nothing computes it; computed are {', '.join(sorted(computed))}",
                nearest(name, computed),
            )


def _metrics_asked_for(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for at, block in blocks(config):
        wanted: list[Any] = [block.get("key_metric_name"), block.get("metric_name")]
        if block["_target_"].endswith("MetricsSaver"):
            for key in ("metrics", "metric_details"):
                value = block.get(key)
                wanted += value if isinstance(value, (list, tuple)) else [value]
        yield from ((at, n) for n in wanted if isinstance(n, str) and n and not n.startswith(("$", "@", "*")))
    for at, value in items(config):
        if isinstance(value, str):
            yield from ((at, name) for name in _ASKED_BY_FUNCTION.findall(value))


def duplicate_keys(files: Sequence[str | Path]) -> Iterator[BundleError]:
    """Yield a fault for each key that stands twice in one block of a YAML or JSON file; MONAI takes the last."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
            # JSON is YAML but for its tabs
            tree = yaml.compose(text.replace("\t", " ") if str(file).endswith(".json") else text, Loader=loader)
        except (OSError, yaml.YAMLError) as problem:
            yield BundleError(f"{file} cannot be read", " ".join(str(problem).split()), "correct the file")
            continue
        yield from _duplicates_in(tree, str(file), "")


def _duplicates_in(node: Any, file: str, at: str) -> Iterator[BundleError]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            inside = f"{at}::{name}" if at else name
            if name in lines:
                yield BundleError(
                    f"{file}: key {inside!r} stands twice",
                    f"in lines {lines[name]} and {line}; only the last counts",
                    "delete one of them",
                )
            lines[name] = line
            yield from _duplicates_in(value, file, inside)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _duplicates_in(value, file, f"{at}::{index}")


def bundle_files(config: Mapping[str, Any]) -> list[Path]:
    """Return the configuration files of the bundle whose configuration this is, from its root as working directory."""
    root = config.get("bundle_root", ".")
    folder = Path(root if isinstance(root, str) and not root.startswith(("$", "@")) else ".") / "configs"
    return sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml", ".json"))


def refuse_unknown_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse an override below the top level (``train#trainer#max_epochs``) whose place does not exist.

    A new argument of a component passes here; whether the component takes it is for the lint.

    Args:
        config: as read from the files, before any override, macros not yet resolved.
        overrides: id -> value.

    Raises:
        UsageError: names the id and the nearest one.
    """
    for name in overrides:
        path = SEPARATOR.split(str(name))
        place, known = _first_absent(config, path)
        last_of_block = place == len(path) - 1 and "_target_" in known
        if place > 0 and not last_of_block:
            raise UsageError(
                f"unknown key '{name}' on the command line",
                f"{'#'.join(path[:place])} has no {path[place]!r}",
                nearest(path[place], known),
            )
        if len(path) > 1 and place == 0:
            raise UsageError(
                f"unknown key '{name}' on the command line", f"there is no {path[0]!r}", nearest(path[0], known)
            )
        for count in range(1, len(path)):
            value = part_of(config, path[:count])
            if isinstance(value, str):
                raise UsageError(
                    f"--{name} goes into {'#'.join(path[:count])}, which is {value!r}",
                    "what is taken from elsewhere has no parts of its own here",
                    "override a key at the top level that it reads",
                )


def part_of(config: Any, path: Sequence[str]) -> Any:
    """Return what stands at the parts of an id, or None."""
    here = config
    for part in path:
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, (list, tuple)) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        else:
            return None
    return here


def refuse_absent_references(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that refers to an id that does not exist.

    Raises:
        BundleError: names the id and the nearest existing one.
    """
    for fault in absent_references(config):
        raise fault
