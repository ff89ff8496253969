"""Both bundles on a few coarse heads, for every family of rules about models; and the proofs of R20, R21, R22, R25."""

from __future__ import annotations

import atexit
import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from planted import Proof
from torch import nn

from pipelines.embedded import head_cohort, pair_cohort
from pipelines.preflight import Finding, Inspection, Rule, condition, network, steps
from pipelines.runner import bundle_parser

SPACING = [4.0, 4.0, 4.0]
STEPS, LEARNT = "every step runs", "one batch is learnt"
RULES: tuple[Rule, ...] = (*network.RULES, *steps.RULES, *condition.RULES)


@cache
def folder() -> Path:
    """One folder for the cohorts of a test session, and what is made of them."""
    temporary = tempfile.TemporaryDirectory(prefix="preflight")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)


def inspection_of(bundle: str, manifest: Path, changes: Mapping[str, Any]) -> Inspection:
    """Return what a bundle hands over to the preflight, on the CPU in fp32."""
    where = {"manifest": str(manifest), "cache_dir": str(folder() / "cache"), "runs_dir": str(folder() / "runs")}
    given = {**where, "spacing": SPACING, "device_name": "cpu", "precision": "fp32", **changes}
    with bundle_parser(bundle, "train", given) as parser:
        return parser.get_parsed_content("inspection")


@cache
def lesion_manifest() -> Path:
    cohort = head_cohort(folder() / "heads", subjects=3, spacing_mm=(4.0, 4.0, 4.0), seed=4, modalities=("flair", "t1"))
    assert cohort.path is not None
    return cohort.path


@cache
def pair_manifest() -> Path:
    cohort = pair_cohort(folder() / "pairs", subjects=3, spacing_mm=(4.0, 4.0, 4.0), seed=6, contrasts=("t1",))
    assert cohort.path is not None
    return cohort.path


def lesion_with(**changes: Any) -> Inspection:
    """Return the lesion bundle's run with other hyper-parameters."""
    small = {"patch_size": [32, 32, 32], "filters": [8, 16, 32]}
    return inspection_of("brain_lesion_mri_segmentation", lesion_manifest(), {**small, **changes})


def fusion_with(**changes: Any) -> Inspection:
    """Return the fusion bundle's run as a diffusion, with other hyper-parameters."""
    small = {"patch_size": [48, 56, 1], "channels": [8, 16, 24], "schedule": "cosine", "sampling_steps": 5}
    return inspection_of("head_mri_ct_fusion", pair_manifest(), {**small, **changes})


@cache
def lesion() -> Inspection:
    """The lesion bundle's run."""
    return lesion_with()


@cache
def fusion() -> Inspection:
    """The fusion bundle's run, 2D with noise."""
    return fusion_with()


@cache
def thick_slices() -> Inspection:
    """A 3D fusion on 26 slices of 8 mm, which the bundle halves once."""
    return fusion_with(spacing=[4.0, 4.0, 8.0], dimensions=3, patch_size=[48, 56, 26])


def found(rules: Sequence[Rule], rule: str, inspection: Inspection, name: str = "") -> list[Finding]:
    """Run every check of a rule, or the one called ``name``."""
    checks = [each for each in rules if each.id == rule and name in ("", each.name)]
    assert checks
    assert all(inspection.task in each.tasks for each in checks)
    return [finding for each in checks for finding in each.check(inspection, each.limits)]


class FourPoolings(nn.Module):
    """A U-Net that halves every axis four times and cuts its skips to what the way up is left with.

    26 -> 13 -> 6 -> 3 -> 1 on the way down, 2, 4, 8, 16 on the way up: skips of 3, 6, 13 and 26 lose 1, 2, 5, 10.
    """

    def __init__(self, channels: int, classes: int = 1) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv3d(channels if level == 0 else 4, 4, 3, padding=1) for level in range(5))
        self.up = nn.ModuleList(nn.Conv3d(8, 4, 3, padding=1) for _ in range(4))
        self.head = nn.Conv3d(4, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool3d(x, 2) if level else x)
            skips.append(x)
        x = skips.pop()
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            skip = skips.pop()[..., : x.shape[2], : x.shape[3], : x.shape[4]]
            x = block(torch.cat([x[..., : skip.shape[2], : skip.shape[3], : skip.shape[4]], skip], 1))
        return self.head(x)


class PooledCondition(nn.Module):
    """A denoiser that sees its condition as one vector."""

    def __init__(self, condition_channels: int) -> None:
        super().__init__()
        self.condition_channels = condition_channels
        self.image, self.vector = nn.Conv3d(2, 8, 3, padding=1), nn.Linear(condition_channels, 8)
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vector = self.vector(x[:, : self.condition_channels].mean((2, 3, 4)))
        return self.head(torch.relu(self.image(x[:, self.condition_channels :]) + vector[:, :, None, None, None]))


class AllHeads(nn.Module):
    """The bundle's network, as if it were in training for ever: all heads come out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.train()(x)


class Detached(nn.Module):
    """The bundle's network behind which no gradient passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).detach()


class Deaf(nn.Module):
    """The bundle's network, from which parameters get a gradient of 0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).detach() + 0 * sum(parameter.sum() for parameter in self.network.parameters())


def with_network(inspection: Inspection, network: nn.Module) -> Inspection:
    return replace(inspection, network=network)


PROOFS = [
    Proof(
        rule="R20",
        check="a step of training, validation and inference runs",
        origin="evaluation took a tuple for a tensor",
        planted=lambda: [
            *found(RULES, "R20", with_network(lesion(), Detached(lesion().network)), STEPS),
            *found(RULES, "R20", with_network(fusion(), Detached(fusion().network)), STEPS),
        ],
        healthy=lambda: found(RULES, "R20", lesion(), STEPS) + found(RULES, "R20", fusion(), STEPS),
    ),
    Proof(
        rule="R20",
        check="a batch is learnt by heart",
        origin="lesion terms computed without gradient",
        planted=lambda: found(RULES, "R20", with_network(lesion(), Deaf(lesion().network)), LEARNT),
        healthy=lambda: found(RULES, "R20", lesion(), LEARNT),
    ),
    Proof(
        rule="R20",
        check="the same of a fusion",
        origin="as above",
        planted=lambda: found(RULES, "R20", with_network(fusion(), Deaf(fusion().network)), LEARNT),
        healthy=lambda: found(RULES, "R20", fusion(), LEARNT),
    ),
    Proof(
        rule="R21",
        check="features are not cropped before they are joined, and keep the input's resolution",
        origin="four poolings on 26 slices",
        planted=lambda: found(RULES, "R21", with_network(thick_slices(), FourPoolings(7))),
        healthy=lambda: found(RULES, "R21", thick_slices()),
    ),
    Proof(
        rule="R22",
        check="another condition, and the same elsewhere, change the output",
        origin="the condition was pooled to a vector",
        planted=lambda: found(RULES, "R22", with_network(fusion(), PooledCondition(5))),
        healthy=lambda: found(RULES, "R22", fusion()),
    ),
    Proof(
        rule="R25",
        check="in eval mode one tensor comes out",
        origin="evaluation took the heads of deep supervision for one output",
        planted=lambda: found(RULES, "R25", with_network(lesion(), AllHeads(lesion().network))),
        healthy=lambda: found(RULES, "R25", lesion()) + found(RULES, "R25", fusion()),
    ),
]
