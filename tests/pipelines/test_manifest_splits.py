"""Splits by subject: sizes that can be counted by hand, and properties that hold for every cohort."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.manifests import SplitPlan, assign_folds, explicit_split, split_subjects
from pipelines.manifests.splits import apply_plan, volume_strata
from transforms.errors import UsageError

cohorts = st.dictionaries(
    st.text("abcdef0123456789", min_size=1, max_size=6), st.sampled_from("ABC"), min_size=1, max_size=60
)
shares = st.tuples(st.integers(1, 10), st.integers(0, 10), st.integers(0, 10)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


def subjects(count: int, strata: int = 1) -> dict[str, str]:
    return {f"p{number:03d}": str(number % strata) for number in range(count)}


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (10, (0.7, 0.1, 0.2), (7, 1, 2)),
        (100, (0.7, 0.1, 0.2), (70, 10, 20)),
        (30, (0.7, 0.1, 0.2), (21, 3, 6)),
        (5, (0.8, 0.2, 0.0), (4, 1, 0)),
        (1, (0.7, 0.1, 0.2), (1, 0, 0)),  # one subject: to train with
        (2, (0.7, 0.1, 0.2), (1, 0, 1)),  # then the larger share
        (3, (0.7, 0.1, 0.2), (1, 1, 1)),
        (3, (0.98, 0.01, 0.01), (1, 1, 1)),
        (4, (1.0, 0.0, 0.0), (4, 0, 0)),
    ],
)
def test_sizes(count: int, fractions: tuple[float, float, float], sizes: tuple[int, int, int]) -> None:
    split = Counter(split_subjects(subjects(count), fractions).values())
    assert (split["train"], split["validation"], split["test"]) == sizes


def test_each_stratum_is_cut_in_the_wanted_proportions() -> None:
    cohort = subjects(90, strata=3)
    split = split_subjects(cohort, (0.5, 0.3, 0.2), seed=4)
    for stratum in "012":
        sizes = Counter(split[subject] for subject in cohort if cohort[subject] == stratum)
        assert (sizes["train"], sizes["validation"], sizes["test"]) == (15, 9, 6)


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts, fractions=shares, seed=st.integers(0, 1000), data=st.data())
def test_a_split_holds_for_every_cohort(
    cohort: dict[str, str], fractions: tuple[float, float, float], seed: int, data: st.DataObject
) -> None:
    split = split_subjects(cohort, fractions, seed)
    assert set(split) == set(cohort)
    shuffled = {subject: cohort[subject] for subject in data.draw(st.permutations(sorted(cohort)))}
    assert split_subjects(shuffled, fractions, seed) == split
    sizes = Counter(split.values())
    wanted = [name for name, share in zip(("train", "validation", "test"), fractions, strict=True) if share > 0]
    assert set(sizes) <= set(wanted)
    assert sizes["train"] >= 1
    if len(cohort) >= len(wanted):
        assert all(sizes[name] >= 1 for name in wanted)
    for name, share in zip(("train", "validation", "test"), fractions, strict=True):
        assert abs(sizes[name] - share * len(cohort)) < 3


def test_another_seed_is_another_split() -> None:
    cohort = subjects(40)
    assert split_subjects(cohort, seed=0) != split_subjects(cohort, seed=1)


def test_the_split_of_a_seed_never_changes() -> None:
    """Stored splits can be compared over releases: these names were read off once."""
    split = split_subjects(subjects(10), seed=0)
    assert [subject for subject in split if split[subject] != "train"] == ["p002", "p004", "p008"]


@pytest.mark.parametrize(
    "fractions", [(0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5), (0.5, 0.5), (float("nan"), 0.5, 0.5)]
)
def test_shares_that_are_none_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        split_subjects(subjects(10), fractions)


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts.filter(lambda cohort: len(cohort) >= 5), k=st.integers(2, 5), seed=st.integers(0, 1000))
def test_folds_are_balanced_overall_and_in_every_stratum(cohort: dict[str, str], k: int, seed: int) -> None:
    folds = assign_folds(cohort, k, seed)
    assert set(folds) == set(cohort)
    assert folds == assign_folds(dict(reversed(cohort.items())), k, seed)
    for members in (set(cohort), *({s for s in cohort if cohort[s] == stratum} for stratum in "ABC")):
        sizes = [sum(folds[subject] == fold for subject in members) for fold in range(k)]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("k", [0, 1, 6])
def test_folds_that_cannot_be_are_refused(k: int) -> None:
    with pytest.raises(UsageError, match="expected 2 to 5"):
        assign_folds(subjects(5), k)


def test_named_subjects_go_where_they_are_named_and_the_rest_trains() -> None:
    split = explicit_split(["d", "c", "b", "a"], validation=["b"], test=["a"])
    assert split == {"a": "test", "b": "validation", "c": "train", "d": "train"}


def test_a_misspelt_subject_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"test subject 'patient7'(.|\n)*did you mean 'patient07'"):
        explicit_split(["patient07", "control1"], test=["patient7"])


@pytest.mark.parametrize("lists", [{"test": ["a", "a"]}, {"train": ["a"], "test": ["a"]}])
def test_a_subject_named_twice_is_refused(lists: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match=r"'a'(.|\n)*already named"):
        explicit_split(["a", "b"], **lists)


def test_volume_strata_are_tertiles_of_what_has_a_lesion() -> None:
    strata = volume_strata({"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0, "e": None, "f": 9.0, "g": 9.0, "h": 9.0})
    assert [strata[subject] for subject in "bcafghde"] == [
        *["1 small"] * 2,
        *["2 middle"] * 2,
        *["3 large"] * 2,
        "empty",
        "unlabelled",
    ]


def test_a_plan_with_folds_keeps_test_out_of_them() -> None:
    split, folds, record = apply_plan(subjects(20), SplitPlan(fractions=(0.8, 0.0, 0.2), seed=3, folds=4))
    assert {subject for subject in split if split[subject] == "test"} == set(split) - set(folds)
    assert Counter(folds.values()) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert (record.scheme, record.seed, record.folds) == ("stratified", 3, 4)


def test_an_explicit_plan_records_no_fractions() -> None:
    split, folds, record = apply_plan(subjects(3), SplitPlan(test=("p001",)))
    assert split == {"p000": "train", "p001": "test", "p002": "train"}
    assert not folds
    assert (record.scheme, record.seed, record.fractions) == ("explicit", None, None)
