"""JSON files read strictly: no duplicate keys, no NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from transforms.errors import DataError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: absent, unreadable, not JSON, a key twice in one object, NaN or infinity, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            owner = dict(pairs).get("id", dict(pairs).get("name", "unnamed"))
            raise DataError(
                f"{path}, key {repeated[0]!r} in the object {owner!r}",
                f"the key stands {keys.count(repeated[0])} times in one object, expected once",
                "keep the value that is meant and delete the others",
            )
        return dict(pairs)

    def refuse_constant(name: str) -> NoReturn:
        raise DataError(
            str(path), f"the file contains {name}, expected numbers as JSON knows them", "write a finite number"
        )

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except OSError as error:
        raise DataError(
            str(path), f"the file cannot be read: {error.strerror}", "check the path and its rights"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), f"the file is not UTF-8 text: {error.reason}", "write it again with an importer"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}",
            f"the file is not JSON: {error.msg}",
            "correct that line, or write the file again with an importer",
        ) from error
    if not isinstance(raw, dict):
        raise DataError(
            str(path), f"the file holds a {type(raw).__name__}, expected an object", "check that it is the right file"
        )
    return raw
