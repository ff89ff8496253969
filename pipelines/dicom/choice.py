"""Which series is which modality of which case: from the headers where they say it, from the user where they do not.

A T1 taken for a FLAIR, or one patient's CT laid over another's MRI, would be processed without a word. So a sequence is
read from the description only where it is named plainly, two candidates are a question to the user, and the series of
a case must be of one patient. A case is a study; where an MRI and a CT were acquired in two studies, it is a patient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from pipelines.dicom.geometry import refuse
from pipelines.dicom.series import Series
from transforms.errors import DataError, UsageError

_MODALITIES = {"ct": "CT", "pet": "PT", "pt": "PT"}
_ANY_MR = {"mri", "mr"}
_SEQUENCES = {
    **dict.fromkeys(("flair", "t2flair", "t2-flair"), "flair"),
    **dict.fromkeys(("t1", "t1w", "t1n", "mprage"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd", "t1post"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
    **dict.fromkeys(("pd", "pdw"), "pd"),
}
_CONTRAST = re.compile(r"(?<![a-z])(ce|gd|gad\w*|post|contrast|km|dotarem|\+c)(?![a-z])|t1c(?![a-z])|t1ce|t1gd")
# weighted images by name only: quantitative maps, diffusion, angiography, inversion recovery that may be STIR or FLAIR
_SOMETHING_ELSE = re.compile(
    r"(?<![a-z])(map|mapping|dwi|diff\w*|adc|dti|trace|perf\w*|swi|tof|mra|bold|fmri|stir|tirm|subtr\w*|mip)(?![a-z])"
)
Case = dict[str, Series]


def choose(
    series: Sequence[Series], modalities: Sequence[str], optional: Sequence[str], chosen: Mapping[str, str]
) -> list[Case]:
    """Return per case the series of every modality that it has, in the order of the modalities.

    With one modality, every fitting series is a case. With several, every study is one; where no study has all of them,
    every patient (by ID and birth date, both given) is one, over all studies.

    Args:
        series: of a source.
        modalities: the weights' modalities.
        optional: those that may be missing.
        chosen: key of the series by modality, where the user says it.

    Raises:
        DataError: wrong modality (nothing fits, or a study lacks a modality), different patients.
        UsageError: a sequence that cannot be told, two series for one modality, a chosen series that is not there.
    """
    by_key = {one.key: one for one in series}
    for name, key in chosen.items():
        if name not in modalities or key not in by_key:
            raise UsageError(
                f"series {key!r} for modality {name!r}: not there",
                f"modalities {', '.join(modalities)}; series {', '.join(sorted(by_key))}",
                "write modality=key as the list of series gives it",
            )
    free = [one for one in series if one.key not in chosen.values()]
    candidates = {name: [by_key[chosen[name]]] if name in chosen else _fitting(free, name) for name in modalities}
    if not any(candidates.values()):
        _refuse_without(series, modalities)
    if len(modalities) == 1:
        return [{modalities[0]: one} for one in candidates[modalities[0]]]
    required = [name for name in modalities if name not in optional]
    groups = _grouped(candidates, lambda one: one.study)
    if not any(all(group[name] for name in required) for group in groups):
        groups = _grouped(candidates, lambda one: "|".join(one.patient) if all(one.patient) else one.study)
    if all(name in chosen for name in required):  # the user says that they belong together
        studies = {by_key[key].study for key in chosen.values()}
        groups = [{name: [one for one in ones if one.study in studies] for name, ones in candidates.items()}]
    elif chosen:
        groups = [group for group in groups if all(group[name] for name in chosen)] or groups
    return [_case(group, required) for group in groups]


def sequence_of(series: Series) -> str | None:
    """Return the sequence that an MR series' description or protocol names (flair, t1, t1ce, t2, pd), or None.

    None where two are named (a T1 FLAIR is no FLAIR), for maps, diffusion and other images that only quote a weighting,
    and for a T2 with an inversion time, which may be a FLAIR or fat suppression. A T1 with a contrast agent in its
    header is a t1ce whatever its description says.
    """
    for keyword in ("SeriesDescription", "ProtocolName"):
        text = str(series.header.get(keyword, "") or "").casefold()
        named = _weightings(text)
        if len(named) > 1 or (named and _SOMETHING_ELSE.search(text) and named != {"flair"}):
            return None
        if named == {"t2"} and _inversion_ms(series) > 0:
            return None
        if named:
            (sequence,) = named
            contrast = _CONTRAST.search(text) or str(series.header.get("ContrastBolusAgent") or "").strip()
            return "t1ce" if sequence == "t1" and contrast else sequence
    return None


def _inversion_ms(series: Series) -> float:
    try:
        return float(series.header.get("InversionTime") or 0)
    except (TypeError, ValueError):
        return 0.0


def _weightings(text: str) -> set[str]:
    weighted = r"(?<![a-z0-9]){}(w|-?weighted|ce|c|gd)?(?![a-z0-9*])"
    named = {name for name in ("t1", "t2", "pd") if re.search(weighted.format(name), text)}
    if re.search(r"mp2?rage|bravo", text):
        named.add("t1")
    if re.search(r"t2[ _-]?(\*|star)", text):
        named |= {"t2", "t2*"}
    if re.search(r"flair|dark[ -]fluid", text):
        return (named - {"t2"}) | {"flair"}
    return named


def _fitting(series: Iterable[Series], name: str) -> list[Series]:
    """Return the series of a modality; where none of them is made of plain images, those that would be refused."""
    fitting = [one for one in series if _fits(one, name)]
    return [one for one in fitting if one.is_plain] or fitting


def _fits(series: Series, name: str) -> bool:
    lower = name.casefold()
    if series.modality != _MODALITIES.get(lower, "MR"):
        return False
    if lower in _MODALITIES or lower in _ANY_MR:
        return True
    return sequence_of(series) == _SEQUENCES.get(lower, "unknown")


def _grouped(candidates: Mapping[str, Sequence[Series]], key: Callable[[Series], str]) -> list[dict[str, list[Series]]]:
    groups: dict[str, dict[str, list[Series]]] = {}
    for name, found in candidates.items():
        for one in found:
            groups.setdefault(key(one), {name: [] for name in candidates})[name].append(one)
    return list(groups.values())


def _case(group: Mapping[str, Sequence[Series]], required: Sequence[str]) -> Case:
    """Return the one series of every modality of a group.

    Raises:
        DataError: a required modality is missing, or the series are of different patients.
        UsageError: two series for one modality.
    """
    missing = [name for name in required if not group[name]]
    if missing:
        present = ", ".join(f"{name} ({one.key})" for name, ones in group.items() for one in ones)
        raise DataError(
            f"study with {present}: wrong modality",
            f"no series for {missing[0]}",
            f"add it to the study; if it lies in another one, --dicom_series {','.join(f'{n}=KEY' for n in required)}",
        )
    for name, ones in group.items():
        if len(ones) > 1:
            keys = ", ".join(one.key for one in ones)
            fix = f"choose one: --dicom_series {name}={ones[0].key}"
            raise UsageError(f"modality {name}: {len(ones)} series", f"series {keys}", fix)
    case = {name: ones[0] for name, ones in group.items() if ones}
    first, *others = case.values()
    for other in others:
        if any(a and b and a != b for a, b in zip(first.patient, other.patient, strict=True)):
            refuse("different patients", other.what, f"its patient's ID or birth date is not that of {first.what}")
    return case


def _refuse_without(series: Sequence[Series], modalities: Sequence[str]) -> NoReturn:
    """Say why no series fits: another modality, another sequence, or a sequence that the headers do not tell."""
    wanted = {_MODALITIES.get(name.casefold(), "MR") for name in modalities}
    listed = ", ".join(f"{one.key} ({one.modality}{_said(one)})" for one in series[:8])
    found = f"found {listed}; the weights need {', '.join(modalities)}"
    there = [one for one in series if one.modality in wanted and one.is_plain]
    untold = [one for one in there if one.modality == "MR" and sequence_of(one) is None]
    if untold:
        raise UsageError(
            f"{untold[0].what}: its sequence cannot be told",
            f"the description names none of the known ones, or several; {found}",
            f"say which series it is: --dicom_series {modalities[0]}={untold[0].key}",
        )
    refuse("wrong modality", "input", found)


def _said(series: Series) -> str:
    sequence = sequence_of(series) if series.modality == "MR" else None
    return f", {sequence}" if sequence else ""
