"""The label table as a user writes it: ``1:whole_tumour=1+2+3+4`` is one label, read from four values of the files."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Sequence

from pipelines.manifests.model import Label
from transforms.errors import UsageError

BACKGROUND_COLOUR = "#000000"
# Okabe and Ito's palette (2008), which readers with colour-vision deficiency can tell apart.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_GOLDEN_RATIO = 0.618033988749895
_FORM = re.compile(r"(?P<id>\d{1,5}):(?P<name>[^=@/\\]+)(=(?P<values>-?\d+(\+-?\d+)*))?(@(?P<roi>[^=@]+))?")


def label_colour(label_id: int) -> str:
    """Return the fixed colour of a label id as ``#rrggbb``; beyond the palette, hues spread by the golden ratio."""
    if label_id == 0:
        return BACKGROUND_COLOUR
    if label_id <= len(PALETTE):
        return PALETTE[label_id - 1]
    channels = colorsys.hsv_to_rgb((label_id * _GOLDEN_RATIO) % 1.0, 0.65, 0.85)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def parse_label(text: str) -> Label:
    """Return the label that ``ID:NAME[=VALUE+VALUE...][@ROI]`` describes; without values, the file's value is the id.

    Raises:
        UsageError: another form, or an id beyond 32767.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or int(match["id"]) > 32767:
        raise UsageError(
            f"label {text!r}",
            "expected ID:NAME, ID:NAME=VALUE+VALUE or either with @ROI, the id between 0 and 32767",
            "write for example 1:lesion or 1:whole_tumour=1+2+3+4",
        )
    label_id = int(match["id"])
    values = tuple(int(value) for value in match["values"].split("+")) if match["values"] else (label_id,)
    return Label(label_id, match["name"].strip(), label_colour(label_id), values, match["roi"])


def label_table(labels: Iterable[str | Label]) -> tuple[Label, ...]:
    """Return the labels sorted by id, the background added as id 0 where it is not given.

    Raises:
        UsageError: a label in another form, two labels with one id or name, a value that means two labels.
    """
    table = [parse_label(label) if isinstance(label, str) else label for label in labels]
    if all(label.id != 0 for label in table):
        table.append(Label(0, "background", BACKGROUND_COLOUR, (0,)))
    table.sort(key=lambda label: label.id)
    conflict = label_conflict(table)
    if conflict:
        raise UsageError(
            f"label {table[conflict[0]].name!r}", conflict[1], "give every id, name and value to one label"
        )
    return tuple(table)


def label_conflict(labels: Sequence[Label]) -> tuple[int, str] | None:
    """Return the position of the first label that clashes with an earlier one and what they share, or None."""
    owners: dict[tuple[str, int | str], str] = {}
    for position, label in enumerate(labels):
        claims: list[tuple[str, int | str]] = [("id", label.id), ("name", label.name)]
        claims += [("value", value) for value in label.values]
        for claim in claims:
            if claim in owners:
                return position, f"{claim[0]} {claim[1]!r} already belongs to label {owners[claim]!r}"
            owners[claim] = label.name
    return None
