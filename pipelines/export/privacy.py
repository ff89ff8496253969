"""What must not leave the house: names of cases and subjects, and paths of the machine that exports.

Names become digests that only somebody who knows a name can find again; with names that can be guessed (numbers) this
is a pseudonym, not anonymity. What has been taken out is looked for once more in every byte of the finished export.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.manifests import Manifest
from pipelines.manifests.model import SPLITS
from pipelines.runner import PATH_KEYS
from transforms.errors import BundleError

PATH, ADDRESS = "<path>", "<address>"
_DIGITS = 12
_ROOTED = re.compile(r"(?<![\w.<:/])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?![/\\])[^\s'\",\[\](){}]+")
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\",\[\](){}]*")
_SUREST = 4  # letters: shorter names are words of any text, and are not looked for unless they hold a digit
_BINARY = frozenset([".safetensors", ".pt2", ".ts", ".onnx", ".nii", ".whl"])


@dataclass(frozen=True)
class Pseudonyms:
    """What stands for the name of every case and of every subject."""

    cases: Mapping[str, str]
    subjects: Mapping[str, str]

    def names(self) -> list[str]:
        """Return every name, the longest first."""
        return sorted({*self.cases, *self.subjects}, key=lambda name: (-len(name), name))

    def of(self, name: str) -> str:
        """Return what stands for a name, be it a case's or a subject's."""
        return self.cases.get(name) or self.subjects[name]


def pseudonyms_of(cohort: Manifest, rows: Sequence[Mapping[str, Any]] = ()) -> Pseudonyms:
    """Return the pseudonyms of a cohort, and of the cases of a table of results, which may be another cohort's."""
    cases = [case.id for case in cohort.cases] + [left.case for left in cohort.left_out]
    subjects = [case.subject for case in cohort.cases]
    cases += [case_of(row) for row in rows]
    subjects += [str(row["subject"]) for row in rows]
    return Pseudonyms(
        {name: _pseudonym("case", name, cohort.digest) for name in cases},
        {name: _pseudonym("subject", name, cohort.digest) for name in subjects},
    )


def case_of(row: Mapping[str, Any]) -> str:
    """Return the case of a row of results without the severity at which a fusion measures it."""
    return str(row["case"]).partition("@")[0]


def described_cohort(cohort: Manifest, names: Pseudonyms) -> dict[str, Any]:
    """Return what may be known of a cohort: licence, labels, and the split as digests of its cases."""
    name, licence, source = (scrubbed(text, names) for text in (cohort.name, cohort.licence, cohort.source))
    splits = {}
    for split in SPLITS:
        own = [case for case in cohort.cases if case.split == split]
        splits[split] = {
            "cases": len(own),
            "subjects": len({case.subject for case in own}),
            "case_digests": sorted(names.cases[case.id] for case in own),
        }
    return {
        "name": name,
        "licence": licence,
        "source": source,
        "task": cohort.task,
        "modalities": [{"name": each.name, "unit": each.unit} for each in cohort.modalities],
        "labels": [{"id": label.id, "name": label.name} for label in cohort.labels],
        "manifest_digest": cohort.digest,
        "splits": splits,
        "case_digest": f"case-, then the first {_DIGITS} digits of sha256(manifest_digest NUL case NUL name)",
    }


def scrubbed(value: Any, names: Pseudonyms) -> Any:
    """Return JSON values without names, paths and addresses; values of keys that name files become ``<path>``.

    A name of one letter is a word of any text, and stays where it stands in one.
    """
    return _scrubbed(value, names, _pattern([name for name in names.names() if len(name) > 1]))


def scrubbed_command(words: Sequence[str], names: Pseudonyms) -> list[str]:
    """Return a command without paths: what it was started with, and every option's value that is no path."""
    said = [Path(str(word)).name if number == 0 else str(word) for number, word in enumerate(words)]
    for number, word in enumerate(said[:-1]):
        if word.lstrip("-") in PATH_KEYS and word.startswith("--") and said[number + 1]:
            said[number + 1] = PATH
    said = [f"{word.split('=', 1)[0]}={PATH}" if _names_file(word) else word for word in said]
    return [scrubbed(word, names) for word in said]


def refuse_private(files: Mapping[str, bytes | Path], names: Pseudonyms, places: Iterable[str | Path]) -> None:
    """Refuse an export in which a name of the cohort or a path of this machine still stands.

    Args:
        files: of the export by name.
        names: of the cohort. Names without a digit that are shorter than 4 letters are not looked for.
        places: folders of this machine.

    Raises:
        BundleError: names the file, never what was found in it but its kind.
    """
    sure = [name for name in names.names() if len(name) >= _SUREST or any(letter.isdigit() for letter in name)]
    pattern = _pattern(sure)
    paths = sorted({str(place).encode() for place in places if len(str(place)) >= _SUREST})
    for file in sorted(files):
        stored = files[file]
        content = stored if isinstance(stored, bytes) else stored.read_bytes()
        kind = "a path of this machine" if any(path in content for path in paths) else ""
        if not kind and Path(file).suffix not in _BINARY and pattern is not None:
            kind = "the name of a case or subject" if pattern.search(content.decode(errors="replace")) else ""
        if not kind and pattern is not None and pattern.search(file):
            kind = "the name of a case or subject (in the file's own name)"
        if kind:
            raise BundleError(
                f"export: {file} holds {kind}",
                "an export travels: no patient's name and no path leaves with it",
                "report it; or rename the cases, if their names are words of ordinary text",
            )


def _scrubbed(value: Any, names: Pseudonyms, pattern: re.Pattern[str] | None) -> Any:
    if isinstance(value, Mapping):
        known = {key: names.of(key) if key in names.cases or key in names.subjects else key for key in value}
        return {
            known[key]: PATH if key in PATH_KEYS and inner else _scrubbed(inner, names, pattern)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_scrubbed(inner, names, pattern) for inner in value]
    if not isinstance(value, str):
        return value
    text = _ROOTED.sub(PATH, _ADDRESS.sub(ADDRESS, value))
    return text if pattern is None else pattern.sub(lambda found: names.of(found[0]), text)


def _pattern(names: Sequence[str]) -> re.Pattern[str] | None:
    if not names:
        return None
    return re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(re.escape(name) for name in names) + r")(?![A-Za-z0-9])")


def _names_file(word: str) -> bool:
    key, equals, value = word.partition("=")
    return bool(equals and value) and key.startswith("--") and key.lstrip("-") in PATH_KEYS


def _pseudonym(kind: str, name: str, digest: str) -> str:
    content = "\0".join([digest, kind, name])
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]}"
