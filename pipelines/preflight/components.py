"""What a configuration names in Python: is it there, is its package installed, does it take these arguments?

Nothing is instantiated and no expression is evaluated: a ``_target_`` is looked up as MONAI looks it up, an expression
is only parsed.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from pipelines.names import nearest
from transforms.errors import BundleError

REFERENCE = re.compile(r"@(?:::|#)?([A-Za-z_]\w*(?:(?:::|#)\w+)*)")
SEPARATOR = re.compile(r"::|#")
GLOBALS = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}  # MONAI's parser brings them itself
# functions that hand their further keyword arguments on: to what
FORWARDED = {
    "pipelines.training.phases.plan_phases": "pipelines.training.phases.Phase",
    "pipelines.losses.fusion.fusion_loss": "pipelines.losses.fusion.FusionLoss",
}
_IMPORT = re.compile(r"\$\s*(?:from\s+\S+\s+)?import\s")
_REFERRED = "referred_item"  # stands for an @reference while an expression is parsed


def items(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (id, value) of every value in a configuration, at any depth, ids joined by ``::``."""
    yield at, config
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key != "_meta_":
                yield from items(value, f"{at}::{key}" if at else str(key))
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            yield from items(value, f"{at}::{index}" if at else str(index))


def blocks(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (id, block) of every block with a ``_target_`` that is a name."""
    for at, value in items(config):
        if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
            yield at, value


def component_faults(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each target that is not there, and each argument that a target does not take."""
    for at, block in blocks(config):
        target = block["_target_"]
        if target.startswith(("$", "@", "%")):
            continue
        component = located(target)
        if component is None:
            yield BundleError(f"{at}: _target_ {target!r}", *_absence(target))
            continue
        arguments = [key for key in block if isinstance(key, str) and not re.fullmatch(r"_\w+_", key)]
        yield from (_unknown_argument(at, target, *each) for each in unknown_arguments(component, arguments))


def expression_faults(config: Mapping[str, Any]) -> Iterator[BundleError]:
    """Yield a fault for each import, name, attribute and keyword in an expression that is not there."""
    expressions = [(at, v) for at, v in items(config) if isinstance(v, str) and v.startswith("$")]
    modules = {name: importlib.import_module(module) for name, module in GLOBALS.items()}
    for at, text in expressions:
        if _IMPORT.match(text):
            bound, fault = _imported(at, text)
            modules |= bound
            if fault is not None:
                yield fault
    for at, text in expressions:
        if not _IMPORT.match(text):
            yield from _faults_of_expression(at, text, modules)


@cache
def _locator() -> Any:
    from monai.bundle import ComponentLocator

    return ComponentLocator()


@contextmanager
def _bundle_importable() -> Iterator[None]:
    """Let modules in the bundle's root be imported; MONAI lets them before ``run``, but not before ``initialize``."""
    folder = str(Path.cwd())
    sys.path.insert(1, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def located(target: str) -> Any:
    """Return the class or function that MONAI would take for a ``_target_``, or None."""
    module = _locator().get_component_module_name(target)
    module = module[0] if isinstance(module, list) else module
    return _found(f"{module}.{target}" if module else target)


def _found(name: str) -> Any:
    """Return what a dotted name stands for, or None: also where one of its own imports fails."""
    try:
        with _bundle_importable():
            return locate(name)
    except ErrorDuringImport:
        return None


def accepted_arguments(component: Any) -> tuple[list[str], bool]:
    """Return the names of the keyword arguments that a callable takes, and whether it may take any other."""
    try:
        parameters = inspect.signature(component).parameters.values()
    except (TypeError, ValueError):
        return [], True
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return names, False
    forwarded = FORWARDED.get(f"{component.__module__}.{component.__qualname__}")
    if forwarded is not None:
        more, is_open = accepted_arguments(locate(forwarded))
        return names + more, is_open
    for base in inspect.getmro(component)[1:] if inspect.isclass(component) else ():
        if "__init__" in vars(base) and base is not object:
            names += [name for name in inspect.signature(vars(base)["__init__"]).parameters if name != "self"]
    return names, True


def unknown_arguments(component: Any, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the names that ``component`` does not take, each with those that it takes.

    Where it takes anything (``**kwargs``), a name counts as unknown only if it nearly is one that it declares.
    """
    if not callable(component):
        return []
    accepted, is_open = accepted_arguments(component)
    return [
        (name, accepted)
        for name in names
        if name not in accepted and (not is_open or get_close_matches(name, accepted, n=1, cutoff=0.8))
    ]


def _unknown_argument(at: str, target: str, name: str, accepted: Sequence[str]) -> BundleError:
    what = f"{at}: {target} does not take {name!r}" if at else f"{target} does not take {name!r}"
    return BundleError(what, f"it takes {', '.join(accepted) or 'nothing'}", nearest(name, accepted))


def _absence(target: str) -> tuple[str, str]:
    """Return why a target cannot be found, and what to do."""
    parts = target.split(".")
    if len(parts) == 1:
        table = _locator()._components_table or {}
        near = get_close_matches(target, table, n=1, cutoff=0.6)
        advice = f"did you mean {near[0]!r}?" if near else "write the full path of what is not MONAI's own"
        return "MONAI has no class or function of this name", advice
    return _missing_part(parts)


def _missing_part(parts: Sequence[str]) -> tuple[str, str]:
    """Return at which part a dotted name ends, and the nearest name there; or which package is not installed."""
    if not all(part.isidentifier() for part in parts):
        return f"{'.'.join(parts)!r} is no name", "correct it"
    with _bundle_importable():
        installed = parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None
    if not installed:
        near = get_close_matches(parts[0], [name for name in sys.modules if "." not in name], n=1, cutoff=0.8)
        advice = f"did you mean {near[0]!r}?" if near else f"install {parts[0]}, or take the component out"
        return f"the package {parts[0]!r} is not installed", advice
    for count in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:count])
        try:
            with _bundle_importable():
                found = locate(prefix)
        except ErrorDuringImport as problem:
            return f"importing {prefix} fails: {problem.value}", "install what it needs, or take the component out"
        if found is not None:
            names = [name for name in dir(found) if not name.startswith("_")]
            near = get_close_matches(parts[count], names, n=1, cutoff=0.5)
            advice = f"did you mean '{prefix}.{near[0]}'?" if near else f"see what {prefix} has"
            return f"{prefix} has no {parts[count]!r}", advice
    return f"{parts[0]} cannot be imported", "repair its installation"


def _imported(at: str, text: str) -> tuple[dict[str, Any], BundleError | None]:
    """Return what an import statement binds, or its fault."""
    try:
        statement = ast.parse(text[1:].strip()).body[0]
    except (SyntaxError, ValueError) as problem:
        return {}, BundleError(f"{at}: {text!r}", f"it cannot be read: {problem}", "correct it")
    bound: dict[str, Any] = {}
    origin = f"{statement.module}." if isinstance(statement, ast.ImportFrom) else ""
    for alias in statement.names if isinstance(statement, (ast.Import, ast.ImportFrom)) else ():
        name = f"{origin}{alias.name}"
        found = _found(name)
        if found is None:
            why, fix = _missing_part(name.split("."))
            return bound, BundleError(f"{at}: {text!r}", why, fix)
        plain = isinstance(statement, ast.Import) and alias.asname is None
        bound[alias.asname or alias.name.split(".")[0]] = _found(name.split(".")[0]) if plain else found
    return bound, None


def _faults_of_expression(at: str, text: str, modules: Mapping[str, Any]) -> Iterator[BundleError]:
    try:
        tree = ast.parse(REFERENCE.sub(_REFERRED, text[1:]).strip(), mode="eval")
    except (SyntaxError, ValueError) as problem:
        yield BundleError(f"{at}: {text!r}", f"it cannot be read: {problem}", "correct the expression")
        return
    nodes = list(ast.walk(tree))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known = bound | set(modules) | {_REFERRED} | set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in known:
            yield BundleError(f"{at}: {text!r} names {node.id!r}", "nothing imports it", nearest(node.id, modules))
        elif isinstance(node, ast.Attribute):
            owner = _resolved(node.value, modules)
            if inspect.ismodule(owner) and _attribute(owner, node.attr) is None:
                names = [name for name in dir(owner) if not name.startswith("_")]
                near = get_close_matches(node.attr, names, n=1, cutoff=0.5)
                yield BundleError(
                    f"{at}: {text!r} names {node.attr!r}",
                    f"{owner.__name__} has no such function",
                    f"did you mean {near[0]!r}?" if near else f"see what {owner.__name__} has",
                )
        elif isinstance(node, ast.Call):
            called = _resolved(node.func, modules)
            given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            if called is not None and not inspect.ismodule(called):
                name = ast.unparse(node.func)
                yield from (_unknown_argument(at, name, *each) for each in unknown_arguments(called, given))


def _resolved(node: ast.expr, modules: Mapping[str, Any]) -> Any:
    """Return the module, class or function that a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, modules)
        return None if owner is None else _attribute(owner, node.attr)
    return None


def _attribute(owner: Any, name: str) -> Any:
    """Return an attribute; of a module also a submodule that nobody has imported yet."""
    if hasattr(owner, name):
        return getattr(owner, name)
    return _found(f"{owner.__name__}.{name}") if inspect.ismodule(owner) else None
