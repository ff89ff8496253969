"""Planted failures of data: masks that a quantile made or that hold no brain, cases and files that went missing."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from planted import Proof
from proof_geometry import prepared
from proof_intensity import changed, findings, fusion_run, lesion_run, rule_named

from pipelines.preflight import Inspection
from pipelines.preflight.data import RULES

MASKS = rule_named(RULES, "automatic masks are plausible")
CASES = rule_named(RULES, "every case of the manifest is processed")
FILES = rule_named(RULES, "every file of the manifest is there")


def cores(quantile: bool) -> Inspection:
    """Twelve cores: discs of 10 to 21 pixels radius in noise; the mask is the brightest 15 %, or above a level."""
    cases = []
    for number in range(12):
        draw = np.random.default_rng(number)
        y, x = np.ogrid[:64, :64]
        disc = (y - draw.integers(24, 40)) ** 2 + (x - draw.integers(24, 40)) ** 2 <= (10 + number) ** 2
        image = disc + draw.normal(0, 0.1, (64, 64))
        mask = image > (np.quantile(image, 0.85) if quantile else 0.5)
        name = f"core_{number}"
        cases.append({"case": name, "subject": name, "image": image[None], "foreground": mask[None].astype(np.uint8)})
    return Inspection("spectral", train=SimpleNamespace(data=[{"case": c["case"]} for c in cases], cases=cases))


def with_automatic_masks(run: Inspection) -> Inspection:
    """The same run, as if its masks of brain and bone had been made and not given."""
    items = [{key: value for key, value in item.items() if key not in ("mask", "bone")} for item in run.train.data]
    return changed(run, "train", data=items)


def with_a_leaking_bone(case: dict[str, Any]) -> dict[str, Any]:
    return {**case, "bone": np.asarray(case["foreground"])}


def with_a_corner_of_brain(case: dict[str, Any]) -> dict[str, Any]:
    brain = np.zeros_like(np.asarray(case["mask"]))
    brain[:, 10:20, 10:20, 10:20] = 1  # 64 mL
    return {**case, "mask": brain}


def without_a_case() -> Inspection:
    run = lesion_run()
    return changed(run, "train", cases=run.train.cases[1:])


def without_a_file() -> Inspection:
    """The manifest looked up in a folder that lacks one file."""
    run = lesion_run()
    cohort = run.need("cohort")
    case = copy.copy(cohort.cases[0])
    flair = replace(case.images["flair"], path="head_000/lost.nii.gz")
    lost = replace(case, images={**case.images, "flair": flair})
    return replace(run, cohort=replace(cohort, cases=(lost, *cohort.cases[1:])))


PROOFS = [
    Proof(
        "R09",
        "The share of the image that each automatic mask keeps, over subjects.",
        "a tissue mask at a quantile kept 15 % of every core",
        lambda: findings(MASKS, cores(quantile=True)),
        lambda: findings(MASKS, cores(quantile=False), with_automatic_masks(fusion_run())),
    ),
    Proof(
        "R09",
        "Volumes of the automatic masks of brain and bone.",
        "a mask of bone that was larger than the brain",
        lambda: findings(MASKS, prepared(with_automatic_masks(fusion_run()), with_a_leaking_bone)),
        lambda: findings(MASKS, lesion_run(), fusion_run()),
    ),
    Proof(
        "R14",
        "Case ids of the manifest against those that training and validation see.",
        "cases whose files could not be read were dropped without a word",
        lambda: findings(CASES, without_a_case()),
        lambda: findings(CASES, lesion_run(), fusion_run()),
    ),
    Proof(
        "R14",
        "Every file of the manifest: there, of its size, readable.",
        "a missing file was skipped",
        lambda: findings(FILES, without_a_file()),
        lambda: findings(FILES, lesion_run(), fusion_run()),
    ),
]
