"""Dice for validation during training, with the same policy for empty masks as the final evaluation.

MONAI's Dice handler turns an epoch in which no label occurred into 0.0 and NaN labels into nothing. Here a label that
is absent from prediction and reference is left out and counted, a missed one is 0, and an epoch without any value is an
error: the number that selects a checkpoint must exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric

from pipelines.preflight.watch.histories import BACKGROUND, ClassVoxels
from transforms.errors import DataError, UsageError


class ValidationDice(Metric):
    """Mean foreground Dice for a MONAI evaluator: mean over cases for each label, then over the labels that occurred.

    Use it as ``key_val_metric={"val_mean_dice": ValidationDice(labels)}``. Beside its own value it writes into
    ``engine.state.metrics``, for each label name: ``dice_<name>`` (absent in an epoch in which the label has no value),
    ``n_empty_<name>``, ``n_missed_<name>`` and ``n_false_alarm_<name>``. Counting runs on the tensors' device, and the
    sums are added up over processes; there every case has to be given to one process only.

    Attributes:
        class_voxels: after a validation, per label and for the background how many voxels are predicted, true and both.
        trivial: after a validation, the mean Dice of the best constant prediction; None where no label occurs.

    Args:
        labels: value to name; 0 is background and not scored.
        output_keys: keys of prediction and reference in every decollated output. Each is a label map (1, *spatial) or
            one-hot (C, *spatial) with the value as channel index.

    Raises:
        UsageError: no foreground label.
        DataError: in an epoch without any value, on different shapes, on values that are not whole numbers, on several
            channels that are not one-hot, such as overlapping labels or logits.
    """

    def __init__(self, labels: Mapping[int, str], output_keys: tuple[str, str] = ("pred", "label")) -> None:
        self.names = {int(value): name for value, name in labels.items() if int(value) != 0}
        if not self.names:
            raise UsageError(
                f"ValidationDice: labels {dict(labels)}", "expected at least one label other than 0", "name the labels"
            )
        self.output_keys = output_keys
        self.class_voxels: dict[str, ClassVoxels] = {}
        self.trivial: float | None = None
        super().__init__(skip_unrolling=True)

    def reset(self) -> None:
        """Forget all cases."""
        # Rows: sum of Dice, scored, empty, missed, false alarm. Columns: labels.
        self._totals = torch.zeros(5, len(self.names), dtype=torch.float64)
        # Rows: predicted, true, both, Dice of the label everywhere, cases, voxels. Columns: background, labels.
        self._voxels = torch.zeros(6, 1 + len(self.names), dtype=torch.float64)

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch: a list of decollated cases."""
        for item in output:
            prediction, reference = (self._label_map(item, key) for key in self.output_keys)
            if prediction.shape != reference.shape:
                raise DataError(
                    f"{_case_of(item)}: keys {self.output_keys[0]} and {self.output_keys[1]} differ in shape",
                    f"{tuple(prediction.shape)} and {tuple(reference.shape)}",
                    "validate on the grid of the label",
                )
            values = torch.tensor([0, *self.names], device=prediction.device)
            counts = torch.stack([_counts(prediction == v, reference == v) for v in values]).cpu().double()
            self._totals += _scores(*counts[1:].unbind(dim=1))
            self._voxels += _voxels(counts, reference.numel())

    def compute(self) -> float:
        """Return the mean foreground Dice over the cases since the last reset."""
        totals = self._reduced()
        scored = totals[1] > 0
        if not scored.any():
            raise DataError(
                "validation: no case contributes to the mean Dice",
                f"labels {list(self.names.values())} are absent from every prediction and reference "
                f"({int(totals[2].max())} cases)",
                "put at least one case with foreground into the validation split",
            )
        return float((totals[0, scored] / totals[1, scored]).mean())

    def completed(self, engine: Engine, name: str) -> None:
        """Write the mean under ``name``, and the figures of every label beside it."""
        totals = self._reduced()
        for label, (dice, scored, empty, missed, false_alarm) in zip(
            self.names.values(), totals.T.tolist(), strict=True
        ):
            # A value of the epoch before must not stand in for one that is missing now.
            engine.state.metrics.pop(f"dice_{label}", None)
            if scored:
                engine.state.metrics[f"dice_{label}"] = dice / scored
            engine.state.metrics[f"n_empty_{label}"] = int(empty)
            engine.state.metrics[f"n_missed_{label}"] = int(missed)
            engine.state.metrics[f"n_false_alarm_{label}"] = int(false_alarm)
        self._count_voxels(totals)
        super().completed(engine, name)

    def _reduced(self) -> torch.Tensor:
        # all_reduce works in place, and this is asked for twice.
        return idist.all_reduce(self._totals.clone())

    def _count_voxels(self, totals: torch.Tensor) -> None:
        """Set what the attributes say of the validation, over all processes."""
        voxels = idist.all_reduce(self._voxels.clone())
        cases = max(1.0, float(voxels[4, 0]))
        dice = [None, *(total / scored if scored else None for total, scored in totals[:2].T.tolist())]
        self.class_voxels = {
            name: ClassVoxels(int(predicted), int(truth), int(hit), int(valid), of_class, constant / cases)
            for name, of_class, (predicted, truth, hit, constant, _, valid) in zip(
                [BACKGROUND, *self.names.values()], dice, voxels.T.tolist(), strict=True
            )
        }
        labels = [each for name, each in self.class_voxels.items() if name != BACKGROUND]
        present = [each for each in labels if each.truth]
        # a label that is everywhere is scored even where it is absent; the background everywhere has Dice 0
        constants = [each.constant_dice / (len(present) + (not each.truth)) for each in labels]
        self.trivial = max(constants) if present else None

    def _label_map(self, item: Mapping[str, Any], key: str) -> torch.Tensor:
        """Return the case's label map (*spatial)."""
        array = torch.as_tensor(item[key])
        array = array.as_tensor() if hasattr(array, "as_tensor") else array
        if array.is_floating_point() and not torch.equal(array, array.trunc()):
            raise DataError(
                f"{_case_of(item)}: key {key} is not a label map",
                "it has values that are not whole numbers",
                "take the argmax of the network's output; resample labels by nearest neighbour",
            )
        if array.shape[0] == 1:
            return array[0]
        one_hot = bool(((array == 0) | (array == 1)).all()) and bool((array.sum(dim=0) == 1).all())
        if not one_hot or array.shape[0] <= max(self.names):
            raise DataError(
                f"{_case_of(item)}: key {key} has {array.shape[0]} channels",
                f"expected a label map (1, ...), or one-hot with the labels {sorted(self.names)} and background",
                "add AsDiscreted(argmax=True) to the validation's postprocessing",
            )
        return array.argmax(dim=0)


def _counts(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the voxels of the intersection, the prediction and the reference."""
    return torch.stack([(prediction & reference).sum(), prediction.sum(), reference.sum()])


def _scores(intersection: torch.Tensor, predicted: torch.Tensor, referenced: torch.Tensor) -> torch.Tensor:
    """Return (5, labels) for one case: Dice (0 where empty), scored, empty, missed, false alarm."""
    union = predicted + referenced
    empty = union == 0
    return torch.stack(
        [
            2 * intersection / union.clamp(min=1),
            ~empty,
            empty,
            (referenced > 0) & (predicted == 0),
            (referenced == 0) & (predicted > 0),
        ]
    )


def _voxels(counts: torch.Tensor, voxels: int) -> torch.Tensor:
    """Return (6, classes) for one case: predicted, true, both, Dice of the class everywhere, 1, voxels."""
    intersection, predicted, referenced = counts.unbind(dim=1)
    ones = torch.ones_like(predicted)
    return torch.stack(
        [predicted, referenced, intersection, 2 * referenced / (referenced + voxels), ones, voxels * ones]
    )


def _case_of(item: Mapping[str, Any]) -> str:
    for value in item.values():
        if "filename_or_obj" in getattr(value, "meta", {}):
            return f"file {value.meta['filename_or_obj']}"
    return f"case {item.get('case', 'unnamed')}"
