"""Geometry: grids worked out by hand, headers written wrong on purpose, and the proofs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted import Proof
from proof_geometry import (
    HEADERS,
    PROOFS,
    REGISTRATION,
    SLICES,
    WINDOW,
    identity,
    two_forms,
    with_files_changed,
    with_one_pair_moved_apart,
    without_spacing,
)
from proof_intensity import findings, fusion_run, lesion_run

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.geometry import (
    Grid,
    case_findings,
    declared_findings,
    form_findings,
    in_plane_axes,
    missing_slices,
    registration_findings,
    slice_findings,
    view_findings,
    window_findings,
)
from transforms.registration_check import RegistrationFigures

AFFINE = {"affine": 1e-3}


def grid(
    spacing: Sequence[float] = (1, 1, 1),
    shape: tuple[int, ...] = (180, 220, 180),
    key: str = "images/t1",
    case: str = "a",
    origin: float = 0.0,
) -> Grid:
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = origin
    return Grid(case, key, shape, affine)


@pytest.mark.parametrize(("difference", "fires"), [(0.0009, False), (0.0011, True)])
def test_affines_of_a_case_agree_to_a_thousandth(difference: float, fires: bool) -> None:
    grids = [grid(), grid(key="label", origin=difference)]
    assert bool(case_findings(grids, AFFINE)) is fires


def test_files_of_different_cases_are_not_compared() -> None:
    assert not case_findings([grid(case="a"), grid(case="b", shape=(9, 9, 9), origin=5)], AFFINE)


def test_shapes_are_a_finding_of_their_own_and_the_worst_affine_comes_first() -> None:
    grids = [grid(case=case) for case in "abc"]
    grids += [grid(key="label", shape=(180, 220, 90)), grid(key="label", case="b", origin=1)]
    grids += [grid(key="label", case="c", origin=7)]
    shape, affine = case_findings(grids, AFFINE)
    assert shape.cases == ("a",)
    assert affine.cases == ("c", "b")


@pytest.mark.parametrize(("size", "fires"), [(1.0009, False), (1.0011, True)])
def test_the_spacing_is_that_of_the_manifest(size: float, fires: bool) -> None:
    found = declared_findings([grid((1, 1, size))], {"a": (1, 1, 1)}, {"spacing": 1e-3})
    assert bool(found) is fires


def test_an_identity_is_named_where_the_manifest_says_otherwise() -> None:
    limits = {"spacing": 1e-3}
    (found,) = declared_findings([grid()], {"a": (1, 1, 3)}, limits)
    assert "identity" in found.what
    assert not declared_findings([grid()], {"a": (1, 1, 1)}, limits)


def test_forms_of_one_space_agree_and_forms_of_two_keep_their_sides() -> None:
    one, moved, mirrored = np.eye(4), np.eye(4), np.diag([-1.0, 1, 1, 1])
    moved[0, 3] = 2  # mm
    limits = {"forms_mm": 1.0}

    def found(qform: np.ndarray, code: int) -> list[str]:
        each = replace(grid(), sform=(one, 1), qform=(qform, code))
        return [finding.severity for finding in form_findings([each], limits)]

    assert found(one, 1) == []
    assert found(moved, 1) == ["warn"]
    assert found(moved, 4) == []  # an atlas has another origin
    assert found(mirrored, 4) == ["error"]
    assert form_findings([grid()], limits) == []


@pytest.mark.parametrize(
    ("spacing", "shape", "axes"),
    [
        ((1, 1, 1), (180, 220, 180), (0, 1)),  # isotropic: the axial plane
        ((0.5, 5, 0.5), (400, 30, 400), (0, 2)),  # coronal slices
    ],
)
def test_the_plane_of_the_slices(spacing: tuple[float, ...], shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    assert in_plane_axes(grid(spacing, shape)) == axes


@pytest.mark.parametrize(("size", "fires"), [(149, True), (151, False), (349, False), (351, True)])
def test_a_head_fits_the_field_of_view(size: int, fires: bool) -> None:
    limits = {"view_low": 150.0, "view_high": 350.0}
    assert bool(view_findings([grid((1, 1, 5), (size, 200, 20))], limits)) is fires


@pytest.mark.parametrize(("voxels", "fires"), [(33, False), (31, True)])
def test_a_window_is_at_least_half_full(voxels: int, fires: bool) -> None:
    # slices of 5 mm become 1 mm along the third axis: 20 x 5 = 100 voxels
    limits = {"filled": 0.5}
    found = window_findings([grid((1, 1, 5), (voxels, 90, 20))], (1, 1, 1), (64, 64, 64), limits)
    assert bool(found) is fires


def test_the_window_is_laid_along_the_axes_of_the_head() -> None:
    # the array runs superior, right, anterior: its 10 voxels stand for the height
    affine = np.zeros((4, 4))
    affine[2, 0] = affine[0, 1] = affine[1, 2] = affine[3, 3] = 1
    turned = Grid("a", "images/t1", (10, 100, 100), affine)
    assert not window_findings([turned], (1, 1, 1), (64, 64, 8), {"filled": 0.5})
    assert window_findings([turned], (1, 1, 1), (8, 64, 64), {"filled": 0.5})


def test_an_empty_slice_counts_between_others_only() -> None:
    # along the axis of 6: air, tissue, tissue, nothing, tissue, air
    image = np.random.default_rng(0).normal(size=(2, 6, 5, 5))
    image[:, [0, 5]] = 0
    assert missing_slices(image) == []
    image[:, 3] = 0
    assert missing_slices(image) == [(0, 3)]
    image[1] = 0  # a modality that the case lacks says nothing
    assert missing_slices(image) == [(0, 3)]
    image[0, 3, 2, 2] = 1
    assert missing_slices(image) == []
    assert missing_slices(np.zeros((1, 4, 4, 4))) == []


def test_cases_with_most_empty_slices_come_first() -> None:
    (found,) = slice_findings({"a": [(2, 5)], "b": [], "c": [(2, 5), (2, 6)]})
    assert found.cases == ("c", "a")
    assert slice_findings({"b": []}) == []


@pytest.mark.parametrize(("dice", "offset", "fires"), [(0.81, 1.9, False), (0.79, 0.5, True), (0.95, 2.1, True)])
def test_pairs_lie_on_each_other(dice: float, offset: float, fires: bool) -> None:
    figures = {"a": RegistrationFigures(dice, (offset, 0, 0), offset, 1.0)}
    assert bool(registration_findings(figures, REGISTRATION.limits)) is fires


def test_a_spacing_of_zero_is_found_beside_all_else() -> None:
    (found,) = findings(HEADERS, without_spacing())
    assert found.source == "data"
    assert found.cases == ("head_000",)


def test_an_identity_affine_is_found() -> None:
    found = findings(HEADERS, with_files_changed("identity", identity, "images/t1"))
    assert {"images/t1 has an identity affine", "images/t1 and images/flair have different affines"} == {
        each.what for each in found
    }


def test_a_left_that_another_reader_takes_for_right_is_found() -> None:
    (found,) = findings(HEADERS, with_files_changed("forms", two_forms))
    assert (found.severity, found.what) == ("error", "sform and qform of label disagree")


def test_a_preparation_that_refuses_has_seen_every_pair() -> None:
    moved = with_one_pair_moved_apart()
    refusing = replace(moved, extra={"registration_check": "raise"})
    assert findings(REGISTRATION, refusing) == []  # it would have been refused before


def test_a_run_without_its_pieces_says_so() -> None:
    for rule in (HEADERS, WINDOW, SLICES, REGISTRATION):
        with pytest.raises(CannotRun):
            findings(rule, Inspection("fusion"))
    with pytest.raises(CannotRun, match="NIfTI"):
        findings(HEADERS, replace(lesion_run(), cohort=replace(lesion_run().need("cohort"), cases=())))
    no_affine = {"case": "a", "image": np.zeros((2, 8, 8, 8))}
    with pytest.raises(CannotRun, match="affine"):
        findings(REGISTRATION, replace(fusion_run(), train=SimpleNamespace(cases=[no_affine])))


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_the_planted_failure_is_found_and_the_healthy_run_is_not(proof: Proof) -> None:
    planted = proof.planted()
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert list(proof.healthy()) == []
