"""Find the cases among bare files: what a hospital gives to ``predict`` is a folder, not a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transforms.errors import DataError, UsageError

IMAGE_ENDINGS = (".nii.gz", ".nii")
MASK_ROLE = "brain"  # role of the brain mask in a manifest, and its file's name beside images to predict
NOT_IMAGES = {"label", "lesion", "mask", "brain", "brainmask", "seg", "gt"}


def items_from_path(
    source: str | Path, modalities: Sequence[str], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the items of a NIfTI file, of a case's folder, or of a folder of either.

    A file belongs to the modality whose name it ends with (``FLAIR.nii.gz``, ``sub-01_flair.nii.gz``) or, in nnU-Net's
    way, whose index (``case_0001.nii.gz``); what stands before is the case, or else the folder's name. Where there is
    only one modality, any other name is a case of its own. ``brain.nii.gz`` or ``<case>_brain.nii.gz`` is the case's
    brain mask; other masks and label maps (by name) are passed over.

    Args:
        source: file or folder.
        modalities: the weights' modalities in the order of their channels.
        optional: those that may be missing.

    Raises:
        DataError: the path does not exist, holds no image, or a case lacks a required modality.
        UsageError: two files for one modality of one case.
    """
    path = Path(source)
    files = _image_files(path)
    top = path if path.is_dir() else path.parent
    cases: dict[str, dict[str, Path]] = {}
    for file in files:
        found = recognise(file.relative_to(top), top.resolve().name, modalities)
        if found is None:
            continue
        case, role = found
        other = cases.setdefault(case, {}).setdefault(role, file)
        if other != file:
            raise UsageError(f"case {case}: two files for {role}", f"{other} and {file}", "leave one of them")
    if path.is_file():  # a mask may lie beside it; other images there were not asked for
        cases = {case: roles for case, roles in cases.items() if path in roles.values()}
    else:
        cases = {case: roles for case, roles in cases.items() if set(roles) - {MASK_ROLE}}
    if not cases:
        raise DataError(
            f"input {path}: no image found",
            f"expected NIfTI files named by {', '.join(modalities)} or _0000 ...",
            "rename the files, or make a manifest with `fiducial manifest import`",
        )
    return [_item(case, roles, modalities, optional) for case, roles in sorted(cases.items())]


def recognise(file: Path, top: str, modalities: Sequence[str]) -> tuple[str, str] | None:
    """Return (case, modality or mask role) of a file by its name, or None where its name says that it is neither.

    Args:
        file: path relative to the input folder.
        top: name of the input folder, which is the case's name for files that lie directly in it.
        modalities: in the order of the channels.
    """
    stem = _stem(file.name) or file.name
    folder = "_".join(file.parent.parts) or top
    names = {MASK_ROLE: MASK_ROLE}
    for index, modality in enumerate(modalities):
        names |= {modality.lower(): modality, f"{index:04d}": modality}
    for name, role in names.items():
        if stem.lower() == name:
            return folder, role
        if stem.lower().endswith((f"_{name}", f"-{name}")):
            return stem[: -len(name) - 1], role
    words = set(stem.lower().replace("-", "_").split("_"))
    return (stem, modalities[0]) if len(modalities) == 1 and not words & NOT_IMAGES else None


def _image_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _stem(file.name))
    if not path.is_file():
        raise DataError(f"input {path}: no such file or folder", "nothing to predict", "check --input")
    if not _stem(path.name):
        raise DataError(f"input {path}: not a NIfTI file", f"expected {' or '.join(IMAGE_ENDINGS)}", "convert it first")
    return [path, *(file for file in sorted(path.parent.glob("*")) if file != path and _stem(file.name))]


def _stem(name: str) -> str | None:
    """Return a NIfTI file's name without its ending, or None for any other file."""
    ending = next((ending for ending in IMAGE_ENDINGS if name.lower().endswith(ending)), None)
    return None if ending is None else name[: -len(ending)]


def _item(case: str, roles: Mapping[str, Path], modalities: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in modalities if name not in roles and name not in optional]
    if missing:
        raise DataError(
            f"case {case}: modality {missing[0]} is missing",
            f"found {', '.join(sorted(roles))}; the weights need {', '.join(modalities)}",
            "add the file; only a bundle trained with optional_modalities can do without",
        )
    image = [str(roles[name].resolve()) if name in roles else None for name in modalities]
    mask = {"mask": str(roles[MASK_ROLE].resolve())} if MASK_ROLE in roles else {}
    return {"case": case, "image": image, **mask}
