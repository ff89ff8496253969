"""What the rules of validation look at: one entry per validation, as plain numbers that fit into the state of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BACKGROUND = "background"


@dataclass(frozen=True)
class ClassVoxels:
    """Voxels of one class, summed over all validation cases.

    Attributes:
        predicted, truth, hit: in the prediction, in the reference, in both.
        valid: that count at all.
        dice: mean over the cases; None where no case has the class.
        constant_dice: mean over the cases of the Dice that this class everywhere would get: 2 f / (1 + f) in a case of
            which it fills the share f.
    """

    predicted: int
    truth: int
    hit: int
    valid: int
    dice: float | None = None
    constant_dice: float = 0.0


@dataclass(frozen=True)
class Validated:
    """One validation.

    Attributes:
        epoch: of the training.
        metric: that selects the weights; higher is better.
        classes: by name, with ``background`` where classes exclude one another.
        trivial: the metric of the best prediction that nobody has to learn; None = unknown.
        trivial_name: which one that is.
        samples: a digest of every sample.
        outputs: a digest of what the network gave for each of them, before any threshold.
        figures: the other metrics.
    """

    epoch: int
    metric: float
    classes: Mapping[str, ClassVoxels] = field(default_factory=dict)
    trivial: float | None = None
    trivial_name: str = ""
    samples: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "samples": list(self.samples), "outputs": list(self.outputs)}


def validated_from_json(raw: Mapping[str, Any]) -> Validated:
    """Return what ``as_json`` has written."""
    classes = {name: ClassVoxels(**voxels) for name, voxels in raw["classes"].items()}
    return Validated(**{**raw, "classes": classes, "samples": tuple(raw["samples"]), "outputs": tuple(raw["outputs"])})


def settled_epoch(max_epochs: int, warmup_epochs: int, share: float, least: float) -> int:
    """Return the last epoch in which a network may still know nothing.

    A healthy network can predict nothing but background for a while, and then learn.

    Args:
        max_epochs, warmup_epochs: of the phase.
        share: of the epochs of the phase.
        least: epochs, for short phases.
    """
    return max(warmup_epochs, math.ceil(share * max_epochs), int(least))
