"""Whether JSON values are a manifest: first their form (the schema), then what they mean (leakage, tables, references).

Every refusal names the case and the JSON pointer of the value at fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from pipelines.manifests.labels import label_conflict
from pipelines.manifests.model import Case, Manifest, manifest_from_raw
from pipelines.names import nearest
from transforms.errors import DataError

_AGAIN = "import the cohort again with this version, or correct the key by hand"


def validate_manifest(raw: Mapping[str, Any], source: str = "manifest") -> None:
    """Raise unless ``raw`` is a manifest whose cases, labels and splits make sense together.

    A cohort without training cases is accepted only where every case is a test case (an external test cohort).

    Args:
        raw: the JSON values.
        source: name of the file, for the error message.

    Raises:
        DataError: naming file, case and JSON pointer.
    """
    _check_schema(raw, source)
    manifest = manifest_from_raw(raw, root=PurePosixPath("/"))  # type: ignore[arg-type]
    _check_tables(manifest, source)
    for index, case in enumerate(manifest.cases):
        _check_case(manifest, index, case, source)
    _check_splits(manifest, source)
    _check_leakage(manifest, source)


@cache
def _validator() -> Draft202012Validator:
    schema = json.loads(files("pipelines.manifests").joinpath("schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def _check_schema(raw: Mapping[str, Any], source: str) -> None:
    errors = sorted(_validator().iter_errors(raw), key=lambda error: [str(part) for part in error.absolute_path])
    if not errors:
        return
    error, others = errors[0], len(errors) - 1
    found, expected, key = _found_and_expected(error)
    where = _where(source, _case_of(raw, error), "".join(_pointers([*error.absolute_path, *key])))
    more = f" ({others} more such errors)" if others else ""
    raise DataError(where, f"found {found}, expected {expected}{more}", _fix(error, key))


def _pointers(parts: list[Any]) -> Iterator[str]:
    return ("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _case_of(raw: Mapping[str, Any], error: ValidationError) -> str:
    path = list(error.absolute_path)
    if len(path) < 2 or path[0] != "cases":
        return ""
    case = raw["cases"][path[1]]
    return str(case.get("id", f"number {path[1]}")) if isinstance(case, dict) else f"number {path[1]}"


def _found_and_expected(error: ValidationError) -> tuple[str, str, list[str]]:
    """Return what was found, what was expected, and the key below the error's path where one is missing or unknown."""
    schema: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
    rule: Any = error.validator_value
    instance: Any = error.instance
    if error.validator == "required":
        missing = [key for key in rule if key not in instance]
        return "no such key", f"the keys {sorted(rule)}", missing[:1]
    if error.validator == "additionalProperties":
        unknown = sorted(set(instance) - set(schema["properties"]))
        return f"the unknown key {unknown[0]!r}", f"only {sorted(schema['properties'])}", unknown[:1]
    meaning = f" ({schema['description']})" if "description" in schema else ""
    return _short(instance), f"{error.validator} {_short(rule)}{meaning}", []


def _fix(error: ValidationError, key: list[str]) -> str:
    if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
        return f"{nearest(key[0], error.schema['properties'])} Otherwise delete the key"
    return _AGAIN


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _where(source: str, case: str, pointer: str) -> str:
    return f"{source}{f', case {case}' if case else ''}, key {pointer or '/'}"


def _check_tables(manifest: Manifest, source: str) -> None:
    names = [modality.name for modality in manifest.modalities]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(
                _where(source, "", f"/modalities/{index}/name"),
                f"modality {name!r} is declared twice",
                "rename or delete one",
            )
    if all(modality.optional for modality in manifest.modalities):
        raise DataError(
            _where(source, "", "/modalities"), "every modality is optional, expected one that all cases have", _AGAIN
        )
    conflict = label_conflict(manifest.labels)
    if conflict:
        raise DataError(
            _where(source, "", f"/labels/{conflict[0]}"), conflict[1], "give every id, name and value to one label"
        )
    if all(label.id != 0 for label in manifest.labels):
        ids = sorted(label.id for label in manifest.labels)
        raise DataError(
            _where(source, "", "/labels"), f"found ids {ids}, expected id 0 (background) among them", _AGAIN
        )


def _check_case(manifest: Manifest, index: int, case: Case, source: str) -> None:
    def refuse(key: str, why: str, fix: str) -> None:
        raise DataError(_where(source, case.id, f"/cases/{index}/{key}"), why, fix)

    names = [modality.name for modality in manifest.modalities]
    for name in case.images:
        if name not in names:
            refuse("".join(["images", *_pointers([name])]), f"modality {name!r} is not declared", nearest(name, names))
    for modality in manifest.modalities:
        if not modality.optional and modality.name not in case.images:
            refuse(
                "images",
                f"the required modality {modality.name!r} is missing, found {sorted(case.images)}",
                "add the file, leave the case out, or declare the modality optional",
            )
    unknown = sorted(set(case.annotated or ()) - {label.id for label in manifest.labels})
    if unknown:
        refuse("annotated", f"label ids {unknown} are not in the label table", "correct the ids")


def _check_splits(manifest: Manifest, source: str) -> None:
    folds = manifest.splits.folds
    for index, case in enumerate(manifest.cases):
        expected = "no fold" if folds is None or case.split == "test" else f"a fold from 0 to {folds - 1}"
        valid = case.fold is None if expected == "no fold" else case.fold is not None and case.fold < (folds or 0)
        if not valid:
            raise DataError(
                _where(source, case.id, f"/cases/{index}/fold"),
                f"found {'no fold' if case.fold is None else f'fold {case.fold}'}, expected {expected} "
                f"(split {case.split}, {folds or 'no'} folds declared)",
                _AGAIN,
            )
    sizes = {case.split for case in manifest.cases}
    if "train" not in sizes and sizes != {"test"}:
        raise DataError(
            _where(source, "", "/cases"),
            f"the training split is empty: all {len(manifest.cases)} cases are in {sorted(sizes)}",
            "import again with a larger training share, or put every case into test (an external test cohort)",
        )


def _check_leakage(manifest: Manifest, source: str) -> None:
    """A case id stands once; a subject, and an image's bytes, in one split and one fold only."""
    ids: set[str] = set()
    subjects: dict[str, Case] = {}
    images: dict[str, tuple[Case, str]] = {}
    for index, case in enumerate(manifest.cases):
        if case.id in ids:
            raise DataError(
                _where(source, case.id, f"/cases/{index}/id"), "two cases have this id", "give each case its own id"
            )
        ids.add(case.id)
        first = subjects.setdefault(case.subject, case)
        if _part(first) != _part(case):
            raise DataError(
                _where(source, case.id, f"/cases/{index}/split"),
                f"leakage: subject {case.subject!r} is in {_part(case)} here, in {_part(first)} with case {first.id}",
                "put all cases of a subject into one split, or import again",
            )
        for name, entry in case.images.items():
            other, other_name = images.setdefault(entry.sha256, (case, name))
            if _part(other) != _part(case):
                raise DataError(
                    _where(source, case.id, f"/cases/{index}/images/{name}"),
                    f"leakage: this image in {_part(case)} is also {other_name} of case {other.id} in {_part(other)}",
                    "remove the copy, or give both cases one subject and import again",
                )


def _part(case: Case) -> str:
    return case.split if case.fold is None else f"{case.split} (fold {case.fold})"
