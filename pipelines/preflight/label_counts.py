"""What the rules on labels count: voxels per class and case, which classes were looked for, what a loss leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.preflight.finding import CannotRun
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.training.datasets import MAXIMUM_CENTRES

WITH_CLASSES = ("segmentation", "organelles", "spectral", "instances")  # tasks whose loss is one of classes
MOST_VOXELS = 200_000  # of a case, where a share is estimated
_NOT_LABELLED = ("unlabelled", "unlabeled", "unknown", "ignore", "void")
_BALANCING = ("dice", "tversky", "jaccard", "lovasz", "focal")
_WEIGHTS = ("weight", "class_weight", "class_weights", "pos_weight", "alpha")


@dataclass(frozen=True)
class Tally:
    """How many voxels of each class a case has.

    Attributes:
        case: its id.
        voxels: class id -> voxels.
        total: voxels of the case.
        annotated: class ids that somebody has looked for; None = all.
    """

    case: str
    voxels: Mapping[int, int]
    total: int
    annotated: frozenset[int] | None = None

    def has(self, class_id: int) -> bool:
        """Return whether the class was looked for in this case."""
        return self.annotated is None or class_id in self.annotated


def all_cases(dataset: Any, split: str) -> Sequence[Any]:
    """Return the cases of a data set, if there are any and all of them are in this process.

    Raises:
        CannotRun: there is none, or other processes have the rest.
    """
    total = getattr(dataset, "n_cases", len(dataset.cases))
    if not len(dataset.cases) or total > len(dataset.cases):
        raise CannotRun(f"this process has {len(dataset.cases)} of the {total} cases of {split}")
    return list(dataset.cases)


def tallies_of(cases: Sequence[Any], class_ids: Sequence[int]) -> list[Tally]:
    """Return the tally of every case that has a label."""
    return [tally_of(case, class_ids) for case in map(as_dictionary, cases) if "label" in case]


def tally_of(case: Mapping[str, Any], class_ids: Sequence[int]) -> Tally:
    """Count the voxels of each class: of ids in a label (1, *spatial), or of channels of a label (C, *spatial).

    Where the case has the centres of patches, and few of them, their number is the number of voxels.
    """
    label = case["label"]
    voxels = {}
    for class_id in class_ids:
        centres = case.get(f"centres_{class_id}")
        if label.shape[0] > 1:
            channel = label[channel_of(class_id, class_ids, label.shape[0])]
            voxels[class_id] = int(np.count_nonzero(np.nan_to_num(np.asarray(channel, np.float32)) > 0.5))
        elif centres is not None and len(centres) <= MAXIMUM_CENTRES // 2:  # above, they may be every other voxel
            voxels[class_id] = len(centres)
        else:
            voxels[class_id] = int(np.count_nonzero(np.asarray(label[0]) == class_id))
    return Tally(str(case.get("case", "")), voxels, int(np.prod(label.shape[1:])), annotated_in(case))


def annotated_in(case: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the class ids that were looked for in a case, None = all."""
    annotated = case.get("annotated")
    return None if annotated is None else frozenset(int(class_id) for class_id in annotated)


def channel_of(class_id: int, class_ids: Sequence[int], channels: int) -> int:
    """Return the channel of a class in a label with one channel per class, with or without one for the background."""
    place = sorted(class_ids).index(class_id)
    return place + (channels - len(class_ids))


def foreground_names(inspection: Inspection) -> dict[int, str]:
    """Return class id -> name of every class that is learnt: all but 0 and those that mean "not labelled"."""
    labels = inspection.need("contract").get("labels") or []
    if not labels:
        raise CannotRun("the contract has no labels")
    unknown = unlabelled_ids(inspection)
    return {int(label["id"]): str(label["name"]) for label in labels if label["id"] > 0 and label["id"] not in unknown}


def unlabelled_ids(inspection: Inspection) -> frozenset[int]:
    """Return the label ids that mean "nobody has labelled this", told by their names."""
    labels = inspection.contract.get("labels") or []
    return frozenset(int(lb["id"]) for lb in labels if any(word in str(lb["name"]).lower() for word in _NOT_LABELLED))


def losses_of(inspection: Inspection) -> dict[str, torch.nn.Module]:
    """Return the losses of the plan by name."""
    build = inspection.need("loss")
    return {name: build(name) for name in dict.fromkeys(phase.loss for phase in inspection.need("plan"))}


def ignored_value(loss: torch.nn.Module) -> int | None:
    """Return the label value that a loss leaves out, or None."""
    values = [getattr(module, "ignore_index", None) for module in loss.modules()]
    return next((int(value) for value in values if value is not None), None)


def is_balanced(loss: torch.nn.Module) -> bool:
    """Return whether a loss weighs the classes, or has a term in which every class counts alike."""
    for module in loss.modules():
        terms = [type(module).__name__, *getattr(module, "weighted_terms", ())]
        if any(word in name.lower() for name in terms for word in _BALANCING):
            return True
        if any(getattr(module, name, None) is not None for name in _WEIGHTS):
            return True
    return False


def value_shares(labels: Sequence[np.ndarray]) -> dict[int, float]:
    """Return label value -> share of the voxels, each label looked at in at most ``MOST_VOXELS`` places."""
    counts: dict[int, int] = {}
    for label in labels:
        values, numbers = np.unique(thinned(label), return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            if np.isfinite(value):
                counts[int(value)] = counts.get(int(value), 0) + number
    total = sum(counts.values())
    return {value: number / total for value, number in counts.items()}


def thinned(array: np.ndarray, most: int = MOST_VOXELS) -> np.ndarray:
    """Return at most about ``most`` values of an array (C, *spatial), evenly spaced, as a view."""
    step = max(1, int(np.ceil((array.size / most) ** (1 / max(1, array.ndim - 1)))))
    return array[(slice(None), *[slice(None, None, step)] * (array.ndim - 1))]
