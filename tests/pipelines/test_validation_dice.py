"""Validation Dice through a real MONAI evaluator whose network returns the logits it is given."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.networks.utils import one_hot
from monai.transforms import AsDiscreted

from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.training.validation import ValidationDice
from transforms.errors import DataError, UsageError, find_error

LABELS = {0: "background", 1: "lesion", 2: "core"}


def line(text: str) -> torch.Tensor:
    """A label map (1, 1, n) from one digit per voxel."""
    return torch.tensor([[[int(digit) for digit in text]]])


def batch_of(predictions: list[str], references: list[str]) -> dict[str, torch.Tensor]:
    """The image already holds the logits of the prediction, which the network passes on."""
    logits = torch.cat([one_hot(line(p)[None], 3) * 20.0 - 10.0 for p in predictions])
    return {"image": logits, "label": torch.stack([line(r) for r in references])}


def evaluator_of(batches: list[dict], one_hot_channels: int | None = None, **options) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        network=torch.nn.Identity(),
        inferer=SimpleInferer(),
        postprocessing=AsDiscreted("pred", argmax=True, to_onehot=one_hot_channels),
        key_val_metric={"val_mean_dice": ValidationDice(LABELS)},
        **options,
    )


# case      1            2            3 (empty)    4
# P         1110 2       0000 2       0000 0       1000 0
# R         0110 2       1100 0       0000 0       0000 0
# lesion    2*2/5 = .8   0, missed    -            0, false alarm     mean of three: 0.8 / 3
# core      1            0, f. alarm  -            -                  mean of two: 0.5
BATCHES = [batch_of(["11102", "00002"], ["01102", "11000"]), batch_of(["00000", "10000"], ["00000", "00000"])]


@pytest.mark.parametrize("one_hot_channels", [None, 3])
def test_policy_through_the_evaluator(one_hot_channels: int | None) -> None:
    evaluator = evaluator_of(BATCHES, one_hot_channels)
    evaluator.run()
    metrics = evaluator.state.metrics
    assert metrics["dice_lesion"] == pytest.approx(0.8 / 3)
    assert metrics["dice_core"] == pytest.approx(0.5)
    assert metrics["val_mean_dice"] == pytest.approx((0.8 / 3 + 0.5) / 2)
    assert isinstance(metrics["val_mean_dice"], float)
    assert evaluator.state.best_metric == metrics["val_mean_dice"]
    assert {key: metrics[key] for key in metrics if key.startswith("n_")} == {
        "n_empty_lesion": 1,
        "n_missed_lesion": 1,
        "n_false_alarm_lesion": 1,
        "n_empty_core": 2,
        "n_missed_core": 0,
        "n_false_alarm_core": 1,
    }


def test_equal_to_the_final_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (2, 3, 1, 6, 5, 4), generator=generator)
    metric = ValidationDice(LABELS)
    metric.update([{"pred": p.float(), "label": r} for p, r in zip(*maps, strict=True)])
    rows = [
        row["dice"]
        for p, r in zip(*maps, strict=True)
        for row in segmentation_metrics(p[0].numpy(), r[0].numpy(), (1, 1, 1), LABELS)
    ]
    assert metric.compute() == pytest.approx(sum(rows) / len(rows), abs=1e-12)


def test_each_epoch_starts_anew_and_leaves_no_old_value() -> None:
    evaluator = evaluator_of(BATCHES)
    evaluator.run()
    evaluator.data_loader = [batch_of(["11000"], ["11000"])]
    evaluator.state.epoch_length = 1
    evaluator.run()
    assert evaluator.state.metrics["val_mean_dice"] == 1.0
    assert evaluator.state.metrics["dice_lesion"] == 1.0
    assert "dice_core" not in evaluator.state.metrics
    assert evaluator.state.metrics["n_empty_core"] == 1


def test_an_epoch_without_any_value_is_an_error() -> None:
    with pytest.raises(DataError, match="no case contributes") as raised:
        evaluator_of([batch_of(["00000"], ["00000"])]).run()
    assert "1 cases" in raised.value.why
    with pytest.raises(DataError, match="no case contributes"):
        ValidationDice(LABELS).compute()


def test_reads_decollated_metatensors_and_other_keys() -> None:
    batch = {"seg": MetaTensor(line("0110")[None].float()), "reference": MetaTensor(line("0100")[None].float())}
    metric = ValidationDice({1: "lesion"}, output_keys=("seg", "reference"))
    metric.update(decollate_batch(batch))
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (line("01100").float() * 0.5, "not a label map"),
        (line("01100").float() * float("nan"), "not a label map"),
        (line("0110"), "differ in shape"),
        (torch.cat([line("11111"), line("01100"), line("01000")]), "3 channels"),
        (torch.cat([line("10011"), line("01100")]), "2 channels"),
        (torch.stack([line("00000"), line("10000"), line("03000")])[:, 0] - 1, "3 channels"),
    ],
    ids=["probability", "NaN", "shape", "overlapping labels", "too few channels", "logits"],
)
def test_refuses_what_is_no_label_map(prediction: torch.Tensor, message: str) -> None:
    label = MetaTensor(line("01100"), meta={"filename_or_obj": "patient_7.nii.gz"})
    with pytest.raises(DataError, match=message) as raised:
        ValidationDice(LABELS).update([{"pred": prediction, "label": label}])
    assert "patient_7.nii.gz" in raised.value.what


def test_refusal_reaches_the_caller_of_the_evaluator() -> None:
    evaluator = evaluator_of([{**BATCHES[0], "label": BATCHES[0]["label"][..., :4]}])
    with pytest.raises(Exception, match="differ in shape") as raised:
        evaluator.run()
    assert isinstance(find_error(raised.value), DataError)


def test_refuses_a_table_without_foreground() -> None:
    with pytest.raises(UsageError):
        ValidationDice({0: "background"})


# Two processes, one case each: lesion 0.8 on one and 0 (missed) on the other. Both have to report 0.4.
TWO_PROCESSES = """
import sys, torch
from ignite.engine import Engine
from pipelines.training.validation import ValidationDice
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
prediction = torch.tensor([[1, 1, 1, 0]]) if rank == 0 else torch.zeros(1, 4)
engine = Engine(lambda engine, batch: [{"pred": prediction, "label": torch.tensor([[0, 1, 1, 0]])}])
ValidationDice({1: "lesion"}).attach(engine, "mean")
metrics = engine.run([0]).metrics
print(round(metrics["mean"], 6), round(metrics["dice_lesion"], 6), metrics["n_missed_lesion"])
torch.distributed.destroy_process_group()
"""


def test_sums_over_processes(tmp_path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out.split() for out, _ in answers] == [["0.4", "0.4", "1"]] * 2, answers
