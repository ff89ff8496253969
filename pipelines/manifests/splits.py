"""Splits by subject: stratified, seeded, and the same whatever the order of the subjects.

Within a stratum subjects are ordered by a hash of seed and name, which no library version can change. The strata
are laid end to end and places in the splits are dealt along that line: every stratum is cut in the wanted proportions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.manifests.model import SPLITS, Splits
from pipelines.names import nearest
from transforms.errors import UsageError


@dataclass(frozen=True)
class SplitPlan:
    """How to split a cohort: by ``fractions`` (train, validation, test), or by the subjects named in the three lists.

    Attributes:
        fractions: used where no subject is named.
        seed: of the stratified split and of the folds.
        folds: number of cross-validation folds over the subjects outside test; None for none.
        train, validation, test: subjects by name; those not named go to train.
    """

    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 0
    folds: int | None = None
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @property
    def explicit(self) -> bool:
        """Whether subjects are named."""
        return bool(self.train or self.validation or self.test)


def apply_plan(strata: Mapping[str, str], plan: SplitPlan) -> tuple[dict[str, str], dict[str, int], Splits]:
    """Return split by subject, fold by subject (none in test), and the record of how it was done.

    Args:
        strata: stratum by subject.
        plan: what is wanted.
    """
    if plan.explicit:
        split = explicit_split(strata, plan.train, plan.validation, plan.test)
    else:
        split = split_subjects(strata, plan.fractions, plan.seed)
    folds: dict[str, int] = {}
    if plan.folds is not None:
        folds = assign_folds({name: strata[name] for name in strata if split[name] != "test"}, plan.folds, plan.seed)
    seeded = not plan.explicit or plan.folds is not None
    record = Splits(
        scheme="explicit" if plan.explicit else "stratified",
        seed=plan.seed if seeded else None,
        fractions=None if plan.explicit else plan.fractions,
        folds=plan.folds,
    )
    return split, folds, record


def split_subjects(
    subjects: Mapping[str, str], fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> dict[str, str]:
    """Return the split of every subject.

    Args:
        subjects: stratum by subject.
        fractions: shares of train, validation and test; they sum to 1. Every share above 0 gets a subject where there
            are enough; train comes first, then the larger share.
        seed: another seed, another split.

    Raises:
        UsageError: shares that are negative, do not sum to 1, or leave train empty.
    """
    targets = _target_sizes(len(subjects), _check_fractions(fractions))
    counts = dict.fromkeys(SPLITS, 0)
    split: dict[str, str] = {}
    for place, subject in enumerate(_stratified_order(subjects, seed), start=1):
        open_splits = [name for name in SPLITS if counts[name] < targets[name]]
        chosen = max(open_splits, key=lambda name: targets[name] * place / len(subjects) - counts[name])
        counts[chosen] += 1
        split[subject] = chosen
    return {subject: split[subject] for subject in sorted(split)}


def assign_folds(subjects: Mapping[str, str], k: int, seed: int = 0) -> dict[str, int]:
    """Return a fold from 0 to k - 1 for every subject; sizes differ by at most one, overall and in every stratum.

    Args:
        subjects: stratum by subject.
        k: number of folds.
        seed: another seed, another assignment.

    Raises:
        UsageError: fewer than two folds, or fewer subjects than folds.
    """
    if not 2 <= k <= len(subjects):
        raise UsageError(
            f"folds {k}", f"expected 2 to {len(subjects)}, the number of subjects outside test", "choose fewer folds"
        )
    folds = {subject: place % k for place, subject in enumerate(_stratified_order(subjects, seed))}
    return {subject: folds[subject] for subject in sorted(folds)}


def explicit_split(
    subjects: Iterable[str],
    train: Sequence[str] = (),
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
) -> dict[str, str]:
    """Return the split of every subject as named; subjects that are not named go to train.

    Raises:
        UsageError: a name that is no subject, or a subject named twice.
    """
    names = sorted(subjects)
    split: dict[str, str] = {}
    for target, members in zip(SPLITS, (train, validation, test), strict=True):
        for subject in members:
            if subject not in names:
                raise UsageError(
                    f"{target} subject {subject!r}", "the cohort has no such subject", nearest(subject, names)
                )
            if subject in split:
                raise UsageError(
                    f"{target} subject {subject!r}",
                    f"the subject is already named in {split[subject]}",
                    "name every subject once",
                )
            split[subject] = target
    return {subject: split.get(subject, "train") for subject in names}


def volume_strata(volumes: Mapping[str, float | None]) -> dict[str, str]:
    """Return a stratum by subject from its label volume: ``empty``, ``unlabelled``, or the tertile of its rank.

    Args:
        volumes: label volume in mL by subject; None where there is no label.
    """
    positive = sorted((volume, subject) for subject, volume in volumes.items() if volume)
    tertiles = ("1 small", "2 middle", "3 large")
    strata = {subject: tertiles[3 * rank // len(positive)] for rank, (_, subject) in enumerate(positive)}
    rest = {subject: "unlabelled" if volume is None else "empty" for subject, volume in volumes.items() if not volume}
    return strata | rest


def _check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    shares = tuple(float(share) for share in fractions)
    sums_to_one = math.isclose(math.fsum(shares), 1.0, abs_tol=1e-6)
    if len(shares) != 3 or min(shares) < 0 or not sums_to_one or shares[0] == 0:
        raise UsageError(
            f"fractions {shares}",
            f"expected three shares that sum to 1 (these: {math.fsum(shares):g}), none negative, train above 0",
            "write for example 0.7 0.1 0.2; for a test cohort name its subjects",
        )
    return shares


def _target_sizes(total: int, shares: Sequence[float]) -> dict[str, int]:
    """Return the number of subjects per split: largest remainders, then at least one for every share above 0."""
    exact = [share * total for share in shares]
    # 1e-9 keeps 0.1 * 30 = 3.0000000000000004 and its kin from moving a subject.
    sizes = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(3), key=lambda i: (-(exact[i] - sizes[i]), -shares[i], i))
    for index in by_remainder[: total - sum(sizes)]:
        sizes[index] += 1
    by_claim = sorted((i for i in range(3) if shares[i] > 0), key=lambda i: (i != 0, -shares[i], i))
    for index in by_claim[:total]:
        if sizes[index] == 0:
            donor = max(by_claim, key=lambda i: (sizes[i], by_claim.index(i)))
            sizes[donor] -= 1
            sizes[index] += 1
    return dict(zip(SPLITS, sizes, strict=True))


def _stratified_order(subjects: Mapping[str, str], seed: int) -> list[str]:
    def rank(subject: str) -> tuple[str, str]:
        return subjects[subject], hashlib.sha256(f"{seed}/{subject}".encode()).hexdigest()

    return sorted(subjects, key=rank)
