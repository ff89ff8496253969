"""Planted failures of augmentation in the two bundles; distance maps in a fixture of cells."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Lambdad, RandFlipd, RandLambdad
from planted import Proof
from proof_intensity import changed, findings, fusion_run, lesion_run, rule_named

from pipelines.preflight import Inspection
from pipelines.preflight.augmentation import RULES, horizontal_vertical
from pipelines.preflight.chains import steps_of
from transforms import NormalizeIntensityInMaskd

SHIFT = rule_named(RULES, "augmentation keeps the scale")
PADDING = rule_named(RULES, "padding is background")
BENDING = rule_named(RULES, "no gamma, logarithm or root of signed values")
MOVES = rule_named(RULES, "labels and masks move with the image")
MAPS = rule_named(RULES, "distance maps are made after the moves")


def clipped_gamma(image: torch.Tensor) -> torch.Tensor:
    return image.clamp(min=0) ** 0.9


def root(image: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(image.abs())


def with_more(run: Inspection, *steps: Any) -> Inspection:
    """The same run with further transforms at the end of its random chain."""
    return changed(run, "train", transform=Compose([*steps_of(run.train.transform), *steps]))


def with_background(value: float) -> Inspection:
    """The lesion bundle with another background than 0, while RandAffined still pads with zeros."""
    run = lesion_run()
    chain = copy.deepcopy(steps_of(run.train.transform))
    for step in chain:
        if isinstance(step, NormalizeIntensityInMaskd):
            step.normalize.background = value
    return changed(run, "train", transform=Compose(chain))


def with_first_flip_of(run: Inspection, *keys: str) -> Inspection:
    """The same run whose first flip moves these keys only."""
    chain = list(steps_of(run.train.transform))
    place = next(index for index, step in enumerate(chain) if isinstance(step, RandFlipd))
    chain[place] = RandFlipd(keys, prob=0.5, spatial_axis=0)
    return changed(run, "train", transform=Compose(chain))


@dataclass
class Cells:
    """Two cells, mirrored at random, whose maps were made before (the failure) or after (healthy)."""

    made_after: bool

    def __getitem__(self, index: int) -> dict[str, Any]:
        instances = np.zeros((12, 12), np.int32)
        instances[1:5, 2:6], instances[7:11, 3:10] = 1, 2
        hv = horizontal_vertical(instances)
        if index % 2:
            instances, hv = instances[:, ::-1], hv[:, :, ::-1]
        return {
            "case": "cells",
            "instances": instances[None],
            "hv": horizontal_vertical(instances) if self.made_after else hv,
        }


def cells(made_after: bool) -> Inspection:
    return Inspection("instances", train=Cells(made_after))


PROOFS = [
    Proof(
        "R02",
        "24 samples with augmentation and without: minimum, mean, share of voxels at one value.",
        "a gamma with a clip at 0 stood behind the z-score on every image: Dice .33 instead of .70",
        lambda: findings(SHIFT, with_more(lesion_run(), RandLambdad("image", func=clipped_gamma, prob=1.0))),
        lambda: findings(SHIFT, lesion_run(), fusion_run()),
    ),
    Proof(
        "R02",
        "A sample of background alone is moved; whatever else appears is padding.",
        "neighbours that were missing were padded with zeros after the z-score",
        lambda: findings(PADDING, with_background(-3.0)),
        lambda: findings(PADDING, lesion_run(), fusion_run()),
    ),
    Proof(
        "R02",
        "The order of the transforms: gamma, logarithm, root or power behind a signed normalisation.",
        "gamma after the z-score",
        lambda: findings(BENDING, with_more(lesion_run(), Lambdad("image", func=root))),
        lambda: findings(BENDING, lesion_run(), fusion_run()),
    ),
    Proof(
        "R08",
        "Image and maps hold one pattern; every transform that moves voxels is switched on; they are compared.",
        "augmentation moved the image but not what it was compared with",
        lambda: findings(MOVES, with_first_flip_of(lesion_run(), "image")),
        lambda: findings(MOVES, lesion_run()),
    ),
    Proof(
        "R08",
        "The same for masks that a later transform still reads.",
        "augmentation moved image and label but not the mask",
        lambda: findings(MOVES, with_first_flip_of(fusion_run(), "image", "label", "mask", "foreground")),
        lambda: findings(MOVES, fusion_run()),
    ),
    Proof(
        "R08",
        "Horizontal and vertical maps made again from the instances that come with them.",
        "stale maps were mirrored like an image",
        lambda: findings(MAPS, cells(made_after=False)),
        lambda: findings(MAPS, cells(made_after=True)),
    ),
]
