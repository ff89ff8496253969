"""Planted failures of metrics: another class scored, answers in the input, cells grown together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from planted import Proof
from proof_network import found, fusion, lesion
from skimage.measure import label

from pipelines.preflight import Finding, Inspection
from pipelines.preflight.metrics import RULES
from pipelines.training import ValidationDice

INPUT, PREDICTION, METRIC = "ground truth in the input", "prediction is no ground truth", "metric on known cases"


class Leaks(torch.utils.data.Dataset):
    """The run's samples with a mask stacked on the image, scaled like an image."""

    def __init__(self, dataset: Any, channel: int, position: int) -> None:
        self.dataset, self.channel, self.position = dataset, channel, position

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.dataset[index])
        image = np.array(sample["image"])
        image[self.position] = 3 * np.asarray(sample["label"])[self.channel] - 0.2
        return {**sample, "image": torch.as_tensor(image)}


class EmptyIsZero(ValidationDice):
    """MONAI's habit: a case without any label counts as 0."""

    def compute(self) -> float:
        sums = self._totals.sum(1)
        return float(sums[0] / (sums[1] + sums[2]))


def answers(inspection: Inspection) -> Inspection:
    """Return a run whose inferer returns the lesion that came with the sample."""
    item = inspection.validation[0]
    truth = torch.as_tensor(np.asarray(item["label"]))[None].long()

    def inferer(image: torch.Tensor, network: Any) -> torch.Tensor:
        start = [(whole - part) // 2 for whole, part in zip(truth.shape[2:], image.shape[2:], strict=True)]
        window = [slice(s, s + n) for s, n in zip(start, image.shape[2:], strict=True)]
        return torch.nn.functional.one_hot(truth[(slice(None), 0, *window)], 2).movedim(-1, 1)

    return replace(inspection, inferer=inferer)


def cells(touching: bool) -> Inspection:
    """Return four images of 25 round cells each; where they touch, every third column of them is one instance."""
    rows, columns = np.mgrid[:150, :150]
    mask: NDArray[np.bool_] = np.zeros((150, 150), bool)
    for row in range(5):
        for column in range(5):
            # a pair of the touching cells is 15 pixels apart, at a radius of 8: they overlap by a pixel
            centre = 30 * column + 15 - (15 if touching and column % 2 else 0)
            mask |= (rows - 30 * row - 15) ** 2 + (columns - centre) ** 2 <= 8**2
    ids = label(mask)[None].astype(np.int32)

    class Images:
        cases = tuple({"case": f"image {n}", "instances": ids} for n in range(4))

    return Inspection("instances", train=Images())


def of(name: str, inspection: Inspection) -> list[Finding]:
    return found(RULES, "R28", inspection, name)


PROOFS = [
    Proof(
        rule="R28",
        check="a perfect prediction scores 1, an empty mask what the policy says",
        origin="a case without a lesion counted as 0",
        planted=lambda: of(METRIC, replace(lesion(), metrics={"dice": EmptyIsZero({1: "lesion"})})),
        healthy=lambda: of(METRIC, lesion()) + of(METRIC, fusion()),
    ),
    Proof(
        rule="R28",
        check="no channel of the input is the ground truth",
        origin="the lesion mask went into the condition of the sampler",
        planted=lambda: of(INPUT, replace(fusion(), train=Leaks(fusion().train, channel=5, position=2))),
        healthy=lambda: of(INPUT, fusion()) + of(INPUT, lesion()),
    ),
    Proof(
        rule="R28",
        check="a prediction is not the ground truth",
        origin="ground-truth lesion passed as prediction (Dice 1.0)",
        planted=lambda: of(PREDICTION, answers(lesion())),
        healthy=lambda: of(PREDICTION, lesion()) + of(PREDICTION, fusion()),
    ),
    Proof(
        rule="R44",
        check="instances of the ground truth are single cells",
        origin="instances made from a binary mask: cells that touch were one",
        planted=lambda: found(RULES, "R44", cells(touching=True)),
        healthy=lambda: found(RULES, "R44", cells(touching=False)),
        severity="warn",
    ),
]
