"""Embedded cohorts: generated once, and proven afterwards to be the ones that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.embedded import MANIFEST, head_cohort, pair_cohort
from pipelines.manifests import Manifest
from pipelines.phantoms import LesionPrior
from transforms.errors import DataError, UsageError

MM = (5.0, 5.0, 6.0)
PAIRS: dict[str, Any] = {"subjects": 3, "spacing_mm": MM, "seed": 4, "contrasts": ["t1", "flair"]}
# lesions that voxels of 5 mm can hold
PRIOR = LesionPrior(median_ml=8.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pair_cohort(tmp_path_factory.mktemp("data") / "pairs", **PAIRS, lesions=PRIOR)


def test_every_contrast_of_a_subject_is_a_pair_with_masks(pairs: Manifest) -> None:
    assert [modality.name for modality in pairs.modalities] == ["mri", "ct"]
    assert {modality.name: modality.unit for modality in pairs.modalities}["ct"] == "HU"
    assert pairs.task == "fusion"
    assert len(pairs.cases) == 6
    for case in pairs.cases:
        assert set(case.images) == {"mri", "ct"}
        assert set(case.masks) == {"brain", "bone"}
        assert case.label is not None


def test_the_split_is_by_subject(pairs: Manifest) -> None:
    of_subject: dict[str, set[str]] = {}
    for case in pairs.cases:
        of_subject.setdefault(case.subject, set()).add(case.split)
    assert sorted(map(sorted, of_subject.values())) == [["test"], ["train"], ["validation"]]


def test_asked_for_again_it_is_read_and_not_generated(pairs: Manifest) -> None:
    times = {path: path.stat().st_mtime_ns for path in pairs.root.rglob("*.nii.gz")}
    again = pair_cohort(pairs.root, **PAIRS, lesions=PRIOR)
    assert again.digest == pairs.digest
    assert {path: path.stat().st_mtime_ns for path in pairs.root.rglob("*.nii.gz")} == times


@pytest.mark.parametrize(
    "other",
    [
        {"subjects": 4},
        {"seed": 5},
        {"spacing_mm": (5.0, 5.0, 5.0)},
        {"contrasts": ["t1"]},
        {"contrasts": ["flair", "t1"]},
        {"lesions": LesionPrior(median_ml=9.0)},
        {"tissue_sd": 0.0},
    ],
    ids=lambda other: " ".join(other),
)
def test_other_arguments_are_refused(pairs: Manifest, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="generated with other arguments") as caught:
        pair_cohort(pairs.root, **{**PAIRS, "lesions": PRIOR, **other})
    assert pairs.source in caught.value.why


def test_a_cohort_of_heads_is_no_cohort_of_pairs(pairs: Manifest) -> None:
    with pytest.raises(UsageError, match="generated with other arguments"):
        head_cohort(pairs.root, 3, MM, 4, ["t1", "ct"], lesions=PRIOR)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    cohort = pair_cohort(tmp_path / "pairs", 1, MM, 0, ["t1"], lesions=PRIOR)
    assert (cohort.root / MANIFEST).is_file()
    image = cohort.root / cohort.cases[0].images["mri"].path
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        pair_cohort(tmp_path / "pairs", 1, MM, 0, ["t1"], lesions=PRIOR)
