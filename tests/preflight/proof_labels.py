"""Planted failures for the rules on labels: in the lesion bundle, in spectral cores, in crops with partial labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from planted import Proof
from proof_network import folder, found, fusion, inspection_of, lesion, lesion_manifest
from torch import nn

from pipelines.losses import CompositeLoss, DeepSupervisionLoss, segmentation_loss
from pipelines.losses.terms import cross_entropy_loss
from pipelines.manifests import Label, Manifest, load_manifest, write_manifest
from pipelines.preflight import Finding, Inspection
from pipelines.preflight.labels import RULES
from pipelines.runner import bundle_root, working_directory
from pipelines.training import PatchDataset

SMALL = {"patch_size": [32, 32, 32], "filters": [8, 16, 32]}
TISSUES = [{"id": i, "name": name} for i, name in enumerate(("background/unlabelled", "epithelium", "stroma"))]
ORGANELLES = [{"id": i, "name": name} for i, name in enumerate(("background", "er", "mito", "nuc"))]


def found_in(inspection: Inspection, rule: str, name: str = "", rules: Any = RULES) -> list[Finding]:
    """Run the checks of a rule as a bundle does, in the bundle's root."""
    if not inspection.bundle:
        return found(rules, rule, inspection, name)
    with working_directory(bundle_root(inspection.bundle)):
        return found(rules, rule, inspection, name)


@cache
def cohort() -> Manifest:
    return load_manifest(lesion_manifest())


def lesion_of(name: str, changed: Manifest) -> Inspection:
    """Return the lesion bundle's run on another version of its cohort."""
    path = folder() / f"{name}.json"
    write_manifest(changed, path, absolute_root=True)
    return inspection_of("brain_lesion_mri_segmentation", path, SMALL)


def with_oedema() -> Inspection:
    """A label table with a class that no label file holds."""
    return lesion_of("oedema", replace(cohort(), labels=(*cohort().labels, Label(2, "oedema", "#56b4e9", (2,)))))


def lesions_not_looked_for() -> Inspection:
    """One training case whose lesions nobody has drawn, with a label file of zeros where they are."""
    first = next(case for case in cohort().cases if case.split == "train")
    cases = tuple(replace(case, annotated=(0,)) if case is first else case for case in cohort().cases)
    return lesion_of("partial", replace(cohort(), cases=cases))


def renamed_contract() -> Inspection:
    """The contract says that class 1 is oedema, the manifest that it is a lesion."""
    labels = [{**label, "name": "oedema"} if label["id"] == 1 else label for label in lesion().contract["labels"]]
    return replace(lesion(), contract={**lesion().contract, "labels": labels})


def plain_cross_entropy(name: str) -> nn.Module:
    return CompositeLoss({"ce": (1.0, cross_entropy_loss)})


# --- spectral cores: a disc of tissue on glass, a few squares of it labelled


class LoadCore:
    """Read the arrays of a core from its NPZ file."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        with np.load(item["image"]) as arrays:
            return {**{key: arrays[key] for key in arrays.files}, "case": item["case"]}


@cache
def core_files() -> tuple[Path, ...]:
    """Six cores of 64 x 64 pixels; in each but the last, two squares of 6 x 6 are labelled: 1.8 % of the pixels."""
    files = []
    rows, columns = np.indices((64, 64))
    for number in range(6):
        draw = np.random.default_rng(number)
        tissue = (rows - 32) ** 2 + (columns - 32) ** 2 < 28**2
        label = np.zeros((64, 64), np.uint8)
        if number < 5:
            label[20:26, 18 + number : 24 + number] = 1
            label[40:46, 30 - number : 36 - number] = 2
        image = (draw.normal(size=(8, 64, 64)) + 3 * tissue).astype(np.float32)
        path = folder() / f"core{number}.npz"
        np.savez(path, image=image, label=label[None], foreground=tissue[None].astype(np.uint8))
        files.append(path)
    return tuple(files)


def cores(loss: nn.Module, around_labels: float, labelled_only: bool = True) -> Inspection:
    """Return a spectral run on patches of 16 x 16, ``around_labels`` of them centred on a labelled pixel."""
    items = [
        {"case": path.stem, "image": str(path), "label": str(path), "digests": {"image": _sha(path)}}
        for path in core_files()
        if not labelled_only or path.stem != "core5"
    ]
    cache_dir = str(folder() / "cores")
    data = PatchDataset(items, Compose([LoadCore()]), Compose([]), cache_dir, (1, 2), (16, 16), around_labels)
    return Inspection(
        "spectral",
        contract={"labels": TISSUES},
        train=data,
        loss=lambda name: loss,
        plan=[SimpleNamespace(loss="dice_ce")],
    )


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ignoring(value: int | None) -> nn.Module:
    return DeepSupervisionLoss(segmentation_loss("dice_ce", ignore_index=value))


# --- crops of organelles: one channel per class, NaN where nobody has looked


class MaskedBce(nn.Module):
    """Binary cross entropy over what is not NaN."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        known = torch.isfinite(target)
        each = nn.functional.binary_cross_entropy_with_logits(logits[known], target[known], reduction="sum")
        return each / known.sum().clamp(min=1)


class UnknownAsZero(nn.Module):
    """The same, with every unknown voxel taken for background."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.nan_to_num(target))


def crops(loss: nn.Module, unknown: float = np.nan, mix: Callable | None = None) -> Inspection:
    """Two crops of 8 x 8 x 8 with er, mito and nuc; nobody has looked for nuc in the second."""
    draw = np.random.default_rng(0)
    cases = []
    for name, annotated in (("crop1", (1, 2, 3)), ("crop2", (1, 2))):
        label = (draw.random((3, 8, 8, 8)) < 0.2).astype(np.float32)
        if 3 not in annotated:
            label[2] = unknown
        cases.append({"case": name, "label": label, "annotated": list(annotated)})
    return Inspection(
        "organelles",
        contract={"labels": ORGANELLES},
        train=SimpleNamespace(cases=cases),
        loss=lambda name: loss,
        plan=[SimpleNamespace(loss="bce")],
        config={"train": {"batch": {"_target_": "MixUp", "batch_size": 2}}} if mix else {},
        extra={"mix": mix} if mix else {},
    )


def union(first: frozenset[int], second: frozenset[int]) -> frozenset[int]:
    return first | second


def intersection(first: frozenset[int], second: frozenset[int]) -> frozenset[int]:
    return first & second


def everything(checks: Sequence[tuple[Callable[[], Inspection], str]], rule: str) -> list[Finding]:
    """Return what the checks (inspection, name or nothing) of a rule find together."""
    return [finding for inspection, name in checks for finding in found_in(inspection(), rule, name)]


PROOFS: list[Proof] = [
    Proof(
        "R05", "voxels of every class in training and validation", "cell classes that were not in the binary masks",
        lambda: found_in(with_oedema(), "R05"), lambda: found_in(lesion(), "R05"),
    ),
    Proof(
        "R06", "the loss's ignored value against the labels, background among what it sees",
        "ignore_index -100 where the unlabelled pixels are 0: mIoU .03",
        lambda: found_in(cores(ignoring(-100), 1.0), "R06"),
        partial(everything, [(lambda: cores(ignoring(0), 1.0), ""), (lesion, "")], "R06"),
    ),
    Proof(
        "R07", "valid voxels of 500 patches as training draws them", "patches without a labelled pixel: NaN",
        lambda: found_in(cores(ignoring(0), 0.2), "R07"),
        partial(everything, [(lambda: cores(ignoring(0), 1.0), ""), (lesion, "")], "R07"),
    ),
    Proof(
        "R12", "label tables of manifest, contract and metadata; values beyond them",
        "unknown colours that silently became background",
        lambda: found_in(renamed_contract(), "R12"),
        partial(everything, [(lesion, ""), (fusion, "")], "R12"),
    ),
    Proof(
        "R17", "unknown classes in the labels, gradient on them, annotation of mixed samples",
        "classes that nobody had annotated taken for absent",
        lambda: found_in(lesions_not_looked_for(), "R17"),
        partial(everything, [(lesion, ""), (lambda: crops(MaskedBce(), mix=intersection), "")], "R17"),
    ),
]  # fmt: skip
