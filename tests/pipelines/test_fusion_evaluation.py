"""A fusion measured beside its rivals by a real evaluator: what is written, who is ranked, and who sees the truth."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import Compose
from torch import nn

from pipelines.inference import SamplingInferer
from pipelines.metrics import image_quality
from pipelines.metrics.fusion import fusion_figures
from pipelines.reports.tables import read_per_case_csv
from pipelines.training import FusionCases, at_severities
from pipelines.training.fusion_evaluation import (
    MRI_ALONE,
    ORACLE,
    RANKED,
    LesionReader,
    lesion_reader,
    method_of,
    rank_values,
)
from transforms import FUSION_RULES, DegradePaird, FusionConditiond, FusionReferenced, MeasurePaird
from transforms.errors import DataError, UsageError, find_error

SHAPE = (22, 20, 18)
SPACING = (2.0, 2.0, 3.0)
SOURCE = {"cohort": "tiny", "split": "test"}
RIVALS = {*FUSION_RULES, ORACLE, MRI_ALONE}


def head(number: int, lesion: bool = True) -> dict[str, Any]:
    """A brain with a lesion in a skull in skin, all ellipsoids: what ``pair_items`` and the preparation would leave."""
    draw = np.random.default_rng(number)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    brain, bone, inside = radius < 0.65, (radius >= 0.65) & (radius < 0.8), radius < 0.95
    label = np.zeros(SHAPE, np.uint8)
    label[12:15, 9:12, 8:11] = lesion
    mri = np.select([brain, bone, inside], [250 + 150.0 * label, 20, 150], 0) + draw.normal(0, 8, SHAPE) * inside
    ct = np.select([brain, bone, inside], [35, 1000, 0], -1000) + draw.normal(0, 8, SHAPE)
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    masks = {"mask": brain, "bone": bone, "foreground": inside, "label": label}
    return {
        "case": f"c{number}",
        "subject": f"s{number}",
        "image": MetaTensor(np.stack([mri, ct]).astype(np.float32), affine=affine),
        **{name: MetaTensor(mask[None].astype(np.uint8), affine=affine) for name, mask in masks.items()},
    }


class Pointwise(nn.Module):
    """A convolution of one voxel: from MRI, CT in the window 0 to 1500 HU, first guess, x_t and t to x0.

    Half of a channel of the condition is the x0 of the same image.
    """

    def __init__(self, of_mri: float, of_ct: float, of_noise: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([of_mri, of_ct, 0.0, of_noise, 0.0]).reshape(1, 5, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv3d(x, self.weights)


MRI_LIKE, CT_LIKE = (0.5, 0.0), (0.0, 0.5)
PREPARED = Compose(
    [
        MeasurePaird(),
        FusionReferenced(),
        DegradePaird("image"),
        MeasurePaird(),
        FusionConditiond("image", {"bone": (750, 1500)}, pair_key="pair"),
    ]
)


def bright(fused: np.ndarray) -> np.ndarray:
    """Read the lesion by its brightness inside of the skull."""
    middle = np.zeros(SHAPE, bool)
    middle[7:16, 6:15, 5:14] = True
    return ((fused > 0.85) & middle).astype(np.float32)


def evaluate(
    folder: Path,
    items: Sequence[dict[str, Any]],
    method: str = "ours",
    weights: tuple[float, ...] = MRI_LIKE,
    sampling: dict[str, Any] | None = None,
    prepare: Callable = PREPARED,
    **options: Any,
) -> Path:
    """Run a MONAI evaluator with ``FusionCases`` over ``items``; return the folder of the metrics."""
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(list(items), prepare), batch_size=1),
        network=Pointwise(*weights),
        inferer=SamplingInferer(SimpleInferer(), 3, every_sample=True, **(sampling or {"schedule": "none"})),
    )
    subjects = {item["case"]: item["subject"] for item in items}
    FusionCases(method, folder, SOURCE, subjects, SPACING, **options).attach(evaluator)
    evaluator.run()
    return folder


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return at_severities([head(0), head(1), head(2)], [0, 2])


@pytest.fixture(scope="module")
def measured(items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(tmp_path_factory.mktemp("ours") / "metrics", items, lesion=bright)


# ---- severities ----------------------------------------------------------------------------------------------------


def test_every_case_comes_at_every_severity_and_shift() -> None:
    items = at_severities([{"case": "a", "subject": "s"}, {"case": "b", "subject": "s"}], [0, 1.5], [2])
    named = [(item["case"], item["scan"], item["severity"]) for item in items]
    assert named == [
        ("a@0", "a", 0.0),
        ("b@0", "b", 0.0),
        ("a@1.5", "a", 1.5),
        ("b@1.5", "b", 1.5),
        ("a@shift 2 mm", "a", {"shift_mm": 2.0}),
        ("b@shift 2 mm", "b", {"shift_mm": 2.0}),
    ]
    assert {item["subject"] for item in items} == {"s"}


def test_a_shift_moves_the_ct_and_nothing_else() -> None:
    (item,) = at_severities([head(0)], [], [4])
    prepared = PREPARED(item)
    change = np.abs(np.asarray(prepared["pair"]) - np.asarray(item["image"])).mean(axis=(1, 2, 3))
    assert change[0] == 0
    assert change[1] > 10


# ---- what is written -----------------------------------------------------------------------------------------------


def test_a_row_for_every_method_case_and_severity(measured: Path, items: list[dict[str, Any]]) -> None:
    rows = read_per_case_csv(measured / "per_case.csv")
    assert sorted(path.name for path in measured.iterdir()) == ["per_case.csv", "ranks.json", "summary.json"]
    assert len(rows) == 6 * (1 + len(RIVALS))
    assert {row["case"] for row in rows} == {item["case"] for item in items}
    assert {row["label"] for row in rows} == {f"{name} @{level}" for name in {"ours", *RIVALS} for level in (0, 2)}
    assert {(row["case"], row["subject"]) for row in rows} == {(item["case"], item["subject"]) for item in items}
    for row in rows:
        assert row["label"].endswith(f"@{row['case'].rpartition('@')[2]}")
        assert {*RANKED, "lesion_hd95_mm", "lesion_nsd"} <= set(row)
    summary = json.loads((measured / "summary.json").read_text())
    assert summary["source"] == SOURCE
    assert (summary["n_cases"], summary["n_subjects"]) == (6, 3)
    mean = np.mean([row["bone_psnr_db"] for row in rows if row["label"] == "ours @2"])
    assert summary["labels"]["ours @2"]["bone_psnr_db"]["mean"] == pytest.approx(mean)


def test_the_network_is_measured_against_the_clean_reference(measured: Path, items: list[dict[str, Any]]) -> None:
    rows = {(row["case"], row["label"]): row for row in read_per_case_csv(measured / "per_case.csv")}
    item = next(item for item in items if item["case"] == "c1@2")
    clean = FusionReferenced()(MeasurePaird()(item))["label"]
    x0, mri, ct, brain, bone, _ = np.asarray(clean)
    seen = np.asarray(PREPARED(item)["image"])
    fused = (0.5 * seen[0] + 1) / 2  # what the network makes of its condition
    expected = fusion_figures(
        fused,
        mri,
        ct,
        target=(x0 + 1) / 2,
        brain=brain > 0,
        bone=bone > 0,
        head=np.asarray(item["foreground"])[0] > 0,
        spacing_mm=SPACING,
    )
    row = rows["c1@2", "ours @2"]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    found, there = bright(fused) > 0, np.asarray(item["label"])[0] > 0
    assert row["lesion_dice"] == pytest.approx(2 * (found & there).sum() / (found.sum() + there.sum()))
    # without degradation, MRI alone is the reference of the brain and the oracle that of the bone as well
    for name, figure, best in ((MRI_ALONE, "brain_ssim_within", 1), (ORACLE, "bone_psnr_db", 100)):
        assert rows["c1@0", f"{name} @0"][figure] == pytest.approx(best, abs=1e-6)
        assert rows["c1@2", f"{name} @2"][figure] < 0.95 * best


def test_the_oracle_stands_in_the_table_and_not_in_the_ranks(measured: Path) -> None:
    ranks = json.loads((measured / "ranks.json").read_text())
    assert ranks["method"] == "ours"
    assert list(ranks["severities"]) == ["0", "2"]
    for of_severity in ranks["severities"].values():
        assert {row["method"] for row in of_severity["mean_ranks"]} == {"ours", *FUSION_RULES}
        assert {row["other"] for row in of_severity["differences"]} == set(FUSION_RULES)
        assert {row["figure"] for row in of_severity["differences"]} == {"mean_rank", *RANKED}
        assert {row["n_subjects"] for row in of_severity["mean_ranks"]} == {3}


def test_without_a_lesion_head_there_are_no_figures_of_lesions(tmp_path: Path) -> None:
    folder = evaluate(tmp_path / "m", at_severities([head(0), head(1)], [1]))
    assert not [name for name in read_per_case_csv(folder / "per_case.csv")[0] if "lesion" in name]
    ranks = json.loads((folder / "ranks.json").read_text())["severities"]["1"]
    assert "lesion_dice" not in ranks["mean_ranks"][0]["by_figure"]


# A lesion reader that sees only brightness: in a healthy brain some methods raise a false alarm (Dice 0) and others
# rightly find nothing (no Dice). That case cannot be ranked in this figure, and must not spoil the others.
def test_a_case_without_a_lesion_is_left_out_of_the_ranks_of_lesions(tmp_path: Path) -> None:
    folder = evaluate(tmp_path / "m", at_severities([head(0), head(1), head(2, lesion=False)], [3]), lesion=bright)
    rows = read_per_case_csv(folder / "per_case.csv")
    healthy = {method_of(row): row["lesion_dice"] for row in rows if row["case"] == "c2@3"}
    assert set(healthy.values()) == {None, 0}
    ranks = json.loads((folder / "ranks.json").read_text())["severities"]["3"]
    counts = {row["figure"]: row["n"] for row in ranks["differences"] if row["other"] == "mean"}
    assert counts == {
        "mean_rank": 11,
        "lesion_dice": 2,
        "brain_ssim_within": 3,
        "bone_ssim_within": 3,
        "bone_psnr_db": 3,
    }


# One step from pure noise of which the network lets 0.2 through: 0.1 in display units, with n - 1 unbiased.
def test_of_several_samples_the_spread_is_measured(tmp_path: Path) -> None:
    sampling = {"schedule": "cosine", "steps": 1, "samples": 4}
    folder = evaluate(tmp_path / "m", at_severities([head(0), head(1)], [0]), weights=(0.5, 0, 0.2), sampling=sampling)
    cases = json.loads((folder / "uncertainty.json").read_text())["cases"]
    assert [(row["case"], row["subject"]) for row in cases] == [("c0@0", "s0"), ("c1@0", "s1")]
    for row, number in zip(cases, (0, 1), strict=True):
        assert row["n_voxels"] == np.asarray(head(number)["foreground"]).sum()
        assert row["rms_std"] == pytest.approx(0.1, rel=0.05)
        assert row["rmse"] > 0.1  # this network never shows the bone
        assert "lesion_ece" not in row  # there is no lesion head


# The samples are the MRI plus noise of .1: near the threshold a voxel is a lesion in some and not in others. The mean
# over four samples is then nearer to the truth than a single one, which is sure and often wrong.
def test_of_several_samples_the_probability_of_lesion_is_calibrated(tmp_path: Path) -> None:
    sampling = {"schedule": "cosine", "steps": 1, "samples": 4}
    items = at_severities([head(0), head(1)], [0])
    folder = evaluate(tmp_path / "m", items, weights=(0.5, 0, 0.2), sampling=sampling, lesion=bright)
    for row in json.loads((folder / "uncertainty.json").read_text())["cases"]:
        assert 0 < row["lesion_brier"] < row["lesion_brier_first"] < 1
        assert row["lesion_brier_first"] == pytest.approx(row["lesion_ece_first"])  # of 0 and 1: the share of errors


# ---- the truth has no way in (R28) ---------------------------------------------------------------------------------


def leak(data: dict[str, Any]) -> dict[str, Any]:
    """Planted: the reference beside the condition, and a network that copies it would be perfect."""
    prepared = PREPARED(data)
    return {**prepared, "image": torch.cat([prepared["image"], prepared["label"][:1]])}


def test_a_network_that_is_handed_the_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="condition of this network has 3") as caught:
        evaluate(tmp_path / "m", at_severities([head(0)], [0]), prepare=leak)
    assert isinstance(find_error(caught.value), DataError)
    assert not (tmp_path / "m").exists()


def test_another_truth_changes_the_figures_and_not_the_images(tmp_path: Path) -> None:
    """The reference of another head: every method is measured against it, none follows it, but the oracle."""

    class Images(FusionCases):
        def _figures(self, image: np.ndarray, *rest: Any) -> dict[str, float | None]:
            self.images = [*getattr(self, "images", []), image.copy()]
            return super()._figures(image, *rest)

    def images_of(prepare: Callable) -> list[np.ndarray]:
        (item,) = at_severities([head(0)], [1])
        cases = Images("ours", tmp_path / "m", SOURCE, {"c0@1": "s0"}, SPACING)
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset([item], prepare), batch_size=1),
            network=Pointwise(*MRI_LIKE),
            inferer=SamplingInferer(SimpleInferer(), 3, schedule="none"),
        )
        cases.attach(evaluator)
        evaluator.run()
        return cases.images

    def other_truth(data: dict[str, Any]) -> dict[str, Any]:
        prepared = PREPARED(data)
        return {**prepared, "label": torch.flip(prepared["label"], (1,)).roll(2, 3)}

    kept, changed = images_of(PREPARED), images_of(other_truth)
    names = ["ours", *FUSION_RULES, ORACLE, MRI_ALONE]
    differ = [name for name, one, two in zip(names, kept, changed, strict=True) if not np.array_equal(one, two)]
    assert differ == [ORACLE]


# ---- other evaluations ---------------------------------------------------------------------------------------------


def test_the_network_of_another_evaluation_joins_the_ranks(
    measured: Path, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = evaluate(tmp_path / "m", items, "worse", CT_LIKE, lesion=bright, compare_with=[measured])
    ranks = json.loads((folder / "ranks.json").read_text())["severities"]["0"]
    places = {row["method"]: row for row in ranks["mean_ranks"]}
    assert set(places) == {"ours", "worse", *FUSION_RULES}
    alone = {
        row["method"]: row for row in json.loads((measured / "ranks.json").read_text())["severities"]["0"]["mean_ranks"]
    }
    assert places["ours"]["by_figure"]["brain_ssim_within"] < places["worse"]["by_figure"]["brain_ssim_within"]
    assert places["ours"]["mean_rank"] >= alone["ours"]["mean_rank"]  # one more rival cannot better a place
    assert places["ours"] != alone["ours"]
    (row,) = [r for r in ranks["differences"] if (r["figure"], r["other"]) == ("brain_ssim_within", "ours")]
    assert row["difference"] < 0
    rows = read_per_case_csv(folder / "per_case.csv")  # its own rows only
    assert {method_of(row) for row in rows} == {"worse", *RIVALS}


@pytest.mark.parametrize("name", ["mean", ORACLE, MRI_ALONE])
def test_a_network_is_not_called_as_a_rule(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="another row of the tables has this name"):
        FusionCases(name, tmp_path, SOURCE, {}, SPACING)


def refused(tmp_path: Path, kind: type[Exception], words: str, items: list[dict[str, Any]], **options: Any) -> None:
    """Whatever cannot be compared is refused before anything is measured."""
    with pytest.raises(kind, match=words):
        evaluate(tmp_path / "m", items, **options)
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_compared_is_refused_before_the_work(
    measured: Path, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = {"compare_with": [measured], "lesion": bright}
    refused(tmp_path, DataError, r"same names: \['ours'\]", items, **given)
    refused(tmp_path, DataError, "2 and 0 cases are only in one", items[1:5], method="other", **given)
    fewer = at_severities([head(0), head(1), head(2), head(3)], [0, 2])
    refused(tmp_path, DataError, "0 and 2 cases are only in one", fewer, method="other", **given)
    missing = {"compare_with": [tmp_path / "none"]}
    refused(tmp_path, UsageError, "there is no per_case.csv", items, method="other", **missing)
    twice = {**given, "compare_with": [measured, measured]}
    refused(tmp_path, DataError, r"same names: \['ours'\]", items, method="other", **twice)
    refused(tmp_path, DataError, "only in the other one", items, method="other", compare_with=[measured])


# ---- ranks by hand -------------------------------------------------------------------------------------------------


def row(case: str, subject: str, method: str, **figures: float | None) -> dict[str, Any]:
    return {"case": f"{case}@1", "subject": subject, "label": f"{method} @1", "status": "both", **figures}


# Subject p has two cases: 20 and 30 dB -> 25; q one: 10. What is not ranked, and who is no rival, is left out.
def test_rank_values_by_hand() -> None:
    rows = [
        row("p_t1", "p", "ours", bone_psnr_db=20.0, qabf=0.1),
        row("p_t2", "p", "ours", bone_psnr_db=30.0, qabf=0.1),
        row("q_t1", "q", "ours", bone_psnr_db=10.0, qabf=0.1),
        row("p_t1", "p", "mean", bone_psnr_db=1.0, qabf=0.9),
        row("p_t2", "p", "mean", bone_psnr_db=2.0, qabf=0.9),
        row("q_t1", "q", "mean", bone_psnr_db=3.0, qabf=0.9),
        row("q_t1", "q", ORACLE, bone_psnr_db=100.0, qabf=0.9),
        row("q_t1", "q", MRI_ALONE, bone_psnr_db=0.0, qabf=0.9),
    ]
    assert rank_values(rows) == {"bone_psnr_db": {"ours": {"p": 25.0, "q": 10.0}, "mean": {"p": 1.5, "q": 3.0}}}


# Of p, the second case has no Dice with one method: only the first counts, for both. Of q no case has one for both.
def test_a_case_counts_for_every_method_or_for_none() -> None:
    rows = [
        row("p_t1", "p", "ours", lesion_dice=0.8),
        row("p_t2", "p", "ours", lesion_dice=None),
        row("q_t1", "q", "ours", lesion_dice=0.0),
        row("p_t1", "p", "mean", lesion_dice=0.4),
        row("p_t2", "p", "mean", lesion_dice=0.0),
        row("q_t1", "q", "mean", lesion_dice=None),
    ]
    assert rank_values(rows) == {"lesion_dice": {"ours": {"p": 0.8, "q": None}, "mean": {"p": 0.4, "q": None}}}


def test_a_method_may_have_an_at_in_its_name() -> None:
    assert method_of({"label": "me @home @shift 2 mm"}) == "me @home"


# ---- lesion reader -------------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Logits that say lesion above 0.7."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), x - 0.7], 1)


@pytest.mark.parametrize("shape", [(9, 7, 5), (40, 33, 3)])
def test_the_reader_segments_images_of_any_size(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    found = LesionReader(Threshold(), (16, 16, 1), torch.device("cpu"))(image)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(0.7 - image)), rtol=1e-5)
    np.testing.assert_array_equal(found > 0.5, image > 0.7)


def test_no_weights_no_reader() -> None:
    assert lesion_reader("", torch.device("cpu")) is None


def test_the_table_is_one_that_a_spreadsheet_reads(measured: Path) -> None:
    with (measured / "per_case.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_hand = next(row for row in rows if row["label"] == "mean @0" and row["case"] == "c0@0")
    reference = np.asarray(FusionReferenced()(MeasurePaird()(head(0)))["label"])
    mean = (reference[1] + reference[2]) / 2
    row = image_quality(mean, reference[2], 1.0, reference[4] > 0, metrics=("psnr_db",))
    assert float(by_hand["bone_psnr_db"]) == pytest.approx(row["psnr_db"], rel=1e-5)
