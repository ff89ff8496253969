"""What a bundle's files would run, read without running any of it.

MONAI instantiates every ``_target_`` and evaluates every ``$`` text: a configuration is a program. Only what stands on
a list may occur in it: components of Fiducial and MONAI that build a network, a chain or an engine, and expressions of
a small language (references, items, comparisons, functions of Fiducial). Anything else is named and refused.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import yaml

from transforms.errors import DataError

MODULES = frozenset(
    ["transforms", "pipelines.preflight.before_training"]
    + [f"pipelines.{name}" for name in ("bundles", "inference", "losses", "manifests", "networks", "training")]
)
TARGET_PACKAGES = frozenset(
    ["transforms"]
    + [
        f"pipelines.{name}"
        for name in ("inference", "losses", "metrics", "networks", "preflight", "reports", "training")
    ]
)
MONAI_PARTS = frozenset(
    [
        *("Compose", "DataLoader", "Dataset", "SlidingWindowInferer", "SimpleInferer"),
        *("SupervisedEvaluator", "SupervisedTrainer", "IgniteMetricHandler"),
    ]
)
# transforms that call what they are given, or that read and write files
MONAI_REFUSED = re.compile(
    r"(Rand)?Lambda(d|D|Dict)?|SaveImage\w*|LoadImage\w*|ToCupy\w*|TorchVision\w*|.*Save.*|.*Write.*"
)
TORCH_PARTS = frozenset(f"torch.optim.{name}" for name in ("AdamW", "Adam", "SGD"))
BUILTINS = frozenset(["bool", "dict", "float", "int", "len", "list", "max", "min", "range", "round", "sorted", "str"])
ATTRIBUTES = frozenset(
    ["digest", "from_dict", "items", "keys", "module", "parent", "record", "root", "run", "to", "values"]
)
LARGEST_NUMBER = 1e6  # an expression is no place for more
LARGEST_CONFIG = 1 << 20
DEEPEST = 40
SUFFIXES = {
    "configs": frozenset([".yaml", ".json", ".conf"]),
    "models": frozenset([".safetensors", ".pt2", ".ts", ".onnx", ".data", ".json"]),
    "": frozenset(
        [".md", ".txt", ".json", ".csv", ".html", ".png", ".whl", ".nii", ".gz", ".lock", ".sig", ".safetensors"]
    ),
}
PLAIN_NAMES = frozenset(["SHA256SUMS", "LICENSE"])
_REFERENCE = re.compile(r"@(?:::)?\w*(?:(?:#|::)\w*)*")
_MACRO = re.compile(r"%(configs/[\w.-]+\.(yaml|json))?(::)?[\w#:]*")
_IMPORT = re.compile(r"\$import ([\w.]+)(?: as (\w+))?")
_NODES = (
    *(ast.Expression, ast.Load, ast.Store, ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.Constant, ast.Subscript),
    *(ast.Slice, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp),
    *(ast.comprehension, ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Div, ast.IfExp, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot),
    *(ast.In, ast.NotIn, ast.Starred),
)
_LOGGING_CLASSES = frozenset(["StreamHandler", "logging.StreamHandler"])
_LOGGING_ARGUMENTS = frozenset(["(sys.stdout,)", "(sys.stderr,)", "()"])


def scan_files(files: Mapping[str, bytes], where: str) -> None:
    """Refuse a bundle that would run something that is not on the list.

    Args:
        files: content by name, of one bundle.
        where: of the bundle, for messages.

    Raises:
        DataError: names file, place and what stands there.
    """
    for name, content in files.items():
        _check_kind(name, content, where)
    configs = {name: load_config(files[name], f"{where}: {name}") for name in files if _is_config(name)}
    aliases: dict[str, str] = {}  # a configuration may be laid over another and use its imports
    for name, config in configs.items():
        aliases |= imported_modules(config, f"{where}: {name}")
    for name, config in configs.items():
        for place, text in _texts(config):
            _check_text(place, text, aliases, f"{where}: {name}")
    for name, content in files.items():
        if name.endswith(".conf"):
            _check_logging(content, f"{where}: {name}")
        elif name.endswith(".json") and name not in configs:
            _json(content, f"{where}: {name}")


def _is_config(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[0] == "configs" and path.suffix in (".yaml", ".json") and path.name != "metadata.json"


def load_config(content: bytes, where: str) -> Any:
    """Return the values of a YAML or JSON file that holds plain values alone: no tag, no anchor, no alias.

    Raises:
        DataError: it holds more, cannot be read, or is too large or too deep.
    """
    if len(content) > LARGEST_CONFIG:
        raise _refused(where, f"{len(content)} bytes, {LARGEST_CONFIG} are allowed")
    depth = 0
    try:
        text = content.decode()
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _refused(where, "it repeats a part of itself by an alias (a few lines can become gigabytes)")
            tag = getattr(event, "tag", None)
            if tag:
                raise _refused(where, f"it asks for an object by the tag {tag}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _refused(where, f"it is nested deeper than {DEEPEST}")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        raise _refused(where, f"it cannot be read: {type(problem).__name__}") from problem


def imported_modules(config: Any, where: str) -> dict[str, str]:
    """Return module by the name that expressions have for it.

    Raises:
        DataError: an import of something else than a module of the list.
    """
    if not isinstance(config, dict):
        return {}
    aliases = {}
    statements = config.get("imports", [])
    for statement in statements if isinstance(statements, list) else [statements]:
        match = _IMPORT.fullmatch(str(statement))
        if match is None or match[1] not in MODULES:
            raise _refused(where, f"imports: {statement!r} is not on the list of modules")
        aliases[match[2] or match[1].split(".")[0]] = match[1]
    return aliases


def refuse_expression(text: str, aliases: Mapping[str, str], where: str) -> None:
    """Refuse a ``$`` text that does more than the small language.

    Raises:
        DataError: names the part that is not allowed.
    """
    source = _REFERENCE.sub("__reference__", text[1:])
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise _refused(where, f"{_short(text)} is no expression") from problem
    bound = {"__reference__"} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        reason = _reason(node, bound, aliases)
        if reason:
            raise _refused(where, f"{_short(text)}: {reason}")


def _reason(node: ast.AST, bound: set[str], aliases: Mapping[str, str]) -> str:
    """Return why a node has no place in an expression, or nothing."""
    if not isinstance(node, _NODES):
        return f"{type(node).__name__} is not allowed"
    if isinstance(node, ast.Constant):
        large = isinstance(node.value, (int, float)) and abs(node.value) > LARGEST_NUMBER
        return "a number is too large" if large or isinstance(node.value, (complex, bytes)) else ""
    if isinstance(node, ast.Name):
        return "" if node.id in bound | BUILTINS | set(aliases) else f"the name {node.id} is not allowed"
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in aliases:
            return "" if _is_ours(aliases[node.value.id], node.attr) else f"{node.attr} is not allowed"
        return "" if node.attr in ATTRIBUTES else f"the attribute {node.attr} is not allowed"
    if isinstance(node, ast.Call) and not isinstance(node.func, (ast.Attribute, ast.Name)):
        return "a call of something computed is not allowed"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in BUILTINS:
        return f"a call of {node.func.id} is not allowed"
    return ""


def _check_text(place: str, text: str, aliases: Mapping[str, str], where: str) -> None:
    key = place.rpartition("::")[2]
    there = f"{where}, {place}"
    if key == "_target_":
        if not is_allowed_target(text):
            raise _refused(there, f"_target_ {text!r} is not on the list of components")
    elif key in ("_mode_", "_method_", "_args_"):
        if text not in ("default", "callable"):
            raise _refused(there, f"{key} {text!r} is not allowed")
    elif place.split("::")[0] == "imports":
        return
    elif text.startswith("$"):
        refuse_expression(text, aliases, there)
    elif text.startswith("%") and not _MACRO.fullmatch(text):
        raise _refused(there, f"{text!r} takes a block from outside of the bundle")


def is_allowed_target(name: str) -> bool:
    """Whether a configuration may instantiate this."""
    if name in MONAI_PARTS or name in TORCH_PARTS:
        return True
    package, dot, part = name.rpartition(".")
    if dot:
        return package in TARGET_PACKAGES and part in importlib.import_module(package).__all__
    return name.isidentifier() and not MONAI_REFUSED.fullmatch(name) and _is_monai_transform(name)


@cache
def _is_monai_transform(name: str) -> bool:
    from monai import transforms

    component = getattr(transforms, name, None)
    return isinstance(component, type) and issubclass(component, transforms.Transform)


@cache
def _is_ours(module: str, name: str) -> bool:
    """Whether a module of the list has a function or class of this name that Fiducial wrote."""
    component = getattr(importlib.import_module(module), name, None)
    home = getattr(component, "__module__", None) or ""
    return not name.startswith("_") and callable(component) and home.split(".")[0] in ("pipelines", "transforms")


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every text in nested values, keys as well."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if str(key).startswith(("$", "%")):
                yield f"{place}::key", str(key)
            yield from _texts(inner, f"{place}::{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}::{index}")
    elif isinstance(value, str):
        yield place, value


def _check_kind(name: str, content: bytes, where: str) -> None:
    path = PurePosixPath(name)
    allowed = SUFFIXES.get(path.parts[0], SUFFIXES[""]) | SUFFIXES[""]
    if path.name not in PLAIN_NAMES and path.suffix.lower() not in allowed:
        raise _refused(where, f"{name!r} is of a kind that has no place in a bundle")
    if content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _refused(where, f"{name!r} is a pickle, which can run anything when it is read")


def _check_logging(content: bytes, where: str) -> None:
    """Refuse a logging configuration that evaluates more than a stream: Python evaluates ``args`` and ``class``."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(content.decode())
    except (configparser.Error, UnicodeDecodeError) as problem:
        raise _refused(where, f"it cannot be read: {type(problem).__name__}") from problem
    for section in parser.sections():
        values = dict(parser.items(section))
        of_handler = section.startswith("handler_")
        if of_handler and values.get("class") not in _LOGGING_CLASSES:
            raise _refused(where, f"{section}: class {values.get('class')!r} is not allowed")
        if not of_handler and "class" in values:
            raise _refused(where, f"{section}: class {values['class']!r} is not allowed")
        for key in ("args", "kwargs"):
            if key in values and values[key].replace(" ", "") not in _LOGGING_ARGUMENTS:
                raise _refused(where, f"{section}: {key} {values[key]!r} is not allowed")


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise _refused(where, f"it cannot be read: {type(problem).__name__}") from problem


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: refused", why, "do not run it; ask its maker what this is for")
