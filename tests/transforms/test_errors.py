"""A refusal keeps its three lines and its exit code, however deep MONAI, ignite or a worker process have wrapped it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from monai.transforms import Compose
from torch.utils.data import DataLoader, Dataset

from transforms.errors import BundleError, DataError, FiducialError, ResourceError, UsageError, find_error

LINES = "error: case p01\n  why: 3 measured, 4 expected\n  fix: look at it"


class Refuse:
    """A transform that refuses every case."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        raise DataError("case p01", "3 measured, 4 expected", "look at it")


class Broken(Dataset):
    """Raises within a worker: as it is, or wrapped by MONAI's Compose into a RuntimeError."""

    def __init__(self, wrapped: bool) -> None:
        self.transform = Compose([Refuse()]) if wrapped else Refuse()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.transform({})


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (DataError, 3), (BundleError, 4), (ResourceError, 5)])
def test_three_lines_and_a_code(kind: type[FiducialError], code: int) -> None:
    error = kind("case p01", "3 measured, 4 expected", "look at it")
    assert str(error) == LINES
    assert kind.exit_code == code


def test_line_breaks_never_make_a_fourth_line() -> None:
    assert str(DataError("case\np01", "3 measured,\n  4 expected", "look\tat it")) == LINES


def test_it_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DataError("case p01", "3 measured, 4 expected", "look at it")))
    assert type(error) is DataError
    assert str(error) == LINES


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_found_through_compose_and_worker_processes(workers: int, wrapped: bool) -> None:
    with pytest.raises((DataError, RuntimeError)) as caught:
        next(iter(DataLoader(Broken(wrapped), num_workers=workers)))
    found = find_error(caught.value)
    assert type(found) is DataError
    assert str(found) == LINES


def test_another_error_is_not_taken_for_one() -> None:
    assert find_error(ValueError("error: something else")) is None
    assert find_error(None) is None


def _fail_after_dealing_with_a_refusal() -> None:
    try:
        raise DataError("dealt with")
    except DataError:
        raise KeyError("the real one") from None


def test_what_was_dealt_with_is_not_the_cause() -> None:
    with pytest.raises(KeyError) as caught:
        _fail_after_dealing_with_a_refusal()
    assert find_error(caught.value) is None


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_error(first) is None
