"""What validations show: classes, metrics and digests of samples and outputs; of a fusion, its range and its rival.

See ``watchers.py`` for what a watcher is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor

from pipelines.preflight.finding import Finding
from pipelines.preflight.watch import (
    Saturation,
    Validated,
    changed_samples,
    collapse,
    frozen_metric,
    implausible_fusion,
    not_above_trivial,
    one_sided_errors,
    same_sample,
    saturated_output,
    saturation_of,
    settled_epoch,
)
from pipelines.preflight.watch.histories import validated_from_json
from pipelines.training.distributed import from_every_process
from pipelines.training.fusion import roi_figures
from pipelines.training.handlers import validated_metric
from pipelines.training.phases import Phase
from pipelines.training.validation import ValidationDice
from pipelines.training.watchers import Limits, Listen, Watcher
from transforms.fusion import CT, MRI, REFERENCE_CHANNELS, ct_display, mri_display
from transforms.fusion_rules import mean_fusion

DIGEST_VALUES = 4096  # of a sample: a stride through it, so that a digest costs nothing beside the forward pass
SATURATION_VALUES = 200_000
FUSION_SCORES = ("brain_ssim", "bone_ssim")  # whose mean selects the weights of a fusion


class WatchValidation(Watcher):
    """R31, R32, R34, R39, R43: what is validated, and what comes out.

    Args:
        phase: that trains.
        validator: MONAI's evaluator.
        metric: that selects the weights; from a ``ValidationDice`` come the voxels of the classes.
        fusion: of the same validator, which knows the trivial answer of a fusion; None = no fusion.
    """

    rules = ("R31", "R32", "R34", "R39", "R43")

    def __init__(
        self, phase: Phase, validator: Engine, metric: Metric | None, limits: Limits, fusion: WatchFusion | None = None
    ) -> None:
        self.validator, self.metric, self.limits, self.fusion = validator, metric, limits, fusion
        self.history: list[Validated] = []
        self.settled = {
            rule: settled_epoch(
                phase.max_epochs, phase.warmup_epochs, limits[rule]["grace_share"], limits[rule]["grace_epochs"]
            )
            for rule in ("R31", "R34")
        }
        self.last_epoch = phase.max_epochs
        self._samples: list[str] = []
        self._outputs: list[str] = []

    def listen(self) -> Listen:
        """Listen to every batch: before the postprocessing makes labels of the logits, and after it."""
        yield Events.STARTED, self._start
        yield IterationEvents.FORWARD_COMPLETED, self._output
        yield Events.ITERATION_COMPLETED, self._sample

    def judge(self, engine: Engine) -> list[Finding] | None:
        """Judge the validations so far, in an epoch that had one."""
        epoch, limits = int(engine.state.epoch), self.limits
        value = validated_metric(self.validator, epoch)
        if value is None:
            return None
        samples = sorted(digest for share in from_every_process(self._samples) for digest in share)
        outputs = sorted(digest for share in from_every_process(self._outputs) for digest in share)
        trivial, trivial_name = self._trivial()
        now = Validated(
            epoch,
            value,
            dict(self.metric.class_voxels) if isinstance(self.metric, ValidationDice) else {},
            trivial,
            trivial_name,
            tuple(samples),
            tuple(outputs),
            {name: float(each) for name, each in self.validator.state.metrics.items() if math.isfinite(each)},
        )
        before = self.history[-1] if self.history else now
        if math.isfinite(value):
            self.history.append(now)
        trivial_from = min(self.settled["R34"], self.last_epoch - 1)  # the last validation of a run is always judged
        return [
            *collapse(self.history, self.settled["R31"], limits["R31"]),
            *frozen_metric(self.history, self.settled["R31"], limits["R32"]),
            *same_sample(samples),
            *not_above_trivial(self.history, trivial_from, limits["R34"]),
            *(implausible_fusion(self.history, limits["R34"]) if self.fusion is not None else ()),
            *one_sided_errors(self.history, self.settled["R31"], limits["R39"]),
            *changed_samples(before.samples, samples),
        ]

    def so_far(self) -> Sequence[Validated]:
        """Return the history of the validations."""
        return self.history

    def dice(self) -> dict[str, float]:
        """Return the Dice per label of the newest validation."""
        classes = self.history[-1].classes if self.history else {}
        return {name: voxels.dice for name, voxels in classes.items() if voxels.dice is not None}

    def learnt(self) -> bool:
        """Return whether a validation was clearly better than trivial; of a fusion, whether it was better at all."""
        margin = self.limits["R37"]["passed"] if self.fusion is None else 0.0
        return any(each.trivial is not None and each.metric > each.trivial + margin for each in self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return the history; of digests, only the newest are needed again."""
        keep = int(self.limits["R32"]["long_validations"])
        recent = [each.as_json() for each in self.history[-keep:]]
        older = [{**each.as_json(), "samples": [], "outputs": []} for each in self.history[:-keep]]
        return {"history": older + recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.history = [validated_from_json(raw) for raw in state["history"]]

    def _trivial(self) -> tuple[float | None, str]:
        if self.fusion is not None:
            return self.fusion.trivial(), "the mean of MRI and CT"
        return self.metric.trivial if isinstance(self.metric, ValidationDice) else None, "one class everywhere"

    def _start(self, _: Engine) -> None:
        self._samples, self._outputs = [], []

    def _output(self, validator: Engine) -> None:
        prediction = validator.state.output["pred"]
        for each in prediction if isinstance(prediction, (list, tuple)) else [prediction]:
            self._outputs.append(sample_digest([each]))

    def _sample(self, validator: Engine) -> None:
        for item in _items(validator.state.batch):
            self._samples.append(sample_digest([item[key] for key in ("image", "label") if key in item]))


class WatchFusion(Watcher):
    """R33, and for R34 the figure of the trivial fusion: what the outputs and the inputs of a fusion are like.

    Args:
        validator: MONAI's evaluator, whose predictions are fused images and whose labels are ``FusionReferenced``.
    """

    rules = ("R33",)

    def __init__(self, validator: Engine, limits: Limits) -> None:
        self.validator, self.limits = validator, limits["R33"]
        self.means: dict[str, list[float]] | None = None  # of the mean fusion; measured in the first validation
        self._measuring: list[dict[str, float | None]] = []
        self._cases: list[Saturation] = []

    def listen(self) -> Listen:
        """Listen to every fused case."""
        yield Events.STARTED, self._start
        yield Events.ITERATION_COMPLETED, self._case

    def judge(self, engine: Engine) -> list[Finding] | None:
        """Judge the newest validation."""
        if validated_metric(self.validator, int(engine.state.epoch)) is None:
            return None
        cases = [case for share in from_every_process(self._cases) for case in share]
        return saturated_output(cases, self.limits)

    def trivial(self) -> float | None:
        """Return what the mean of MRI and CT would get as metric of the validation."""
        if self.means is None:
            rows = [row for share in from_every_process(self._measuring) for row in share]
            self.means = {name: [v for v in (row[name] for row in rows) if v is not None] for name in FUSION_SCORES}
        if not all(self.means.values()):
            return None
        return float(np.mean([np.mean(values) for values in self.means.values()]))

    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the mean fusion."""
        return {"means": self.means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.means = state["means"]

    def _start(self, _: Engine) -> None:
        self._cases, self._measuring = [], []

    def _case(self, validator: Engine) -> None:
        items = zip(_items(validator.state.batch), _items(validator.state.output), strict=True)
        for item, output in items:
            fused = _array(output["pred"])[0]
            reference = _array(output["label"])
            channel = dict(zip(REFERENCE_CHANNELS, reference, strict=True))
            values = fused[(channel["brain"] > 0.5) | (channel["bone"] > 0.5)]
            if values.size and bool(np.isfinite(values).all()):
                few = values[:: max(1, values.size // SATURATION_VALUES)]
                self._cases.append(saturation_of(few, str(item.get("case", "unnamed"))))
            if self.means is None:
                self._measuring.append(_mean_figures(item, channel, reference))


def _mean_figures(
    item: Mapping[str, Any], channel: Mapping[str, np.ndarray], reference: np.ndarray
) -> dict[str, float | None]:
    """Return SSIM of the mean of MRI and CT, of the pair that the network saw where that is kept."""
    mri, ct, hounsfield = channel["mri_display"], channel["ct_display"], channel["ct_display"]
    if "pair" in item and "mri_scale" in item:
        pair = _array(item["pair"])
        mri, ct, hounsfield = mri_display(pair[MRI], _array(item["mri_scale"])), ct_display(pair[CT]), pair[CT]
    return roi_figures(mean_fusion(mri, ct, hounsfield), reference)


def sample_digest(arrays: Sequence[Any]) -> str:
    """Return a digest of a stride through each array, and of its shape."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        tensor = convert_to_tensor(array).detach()
        flat = tensor.reshape(-1)
        # an odd stride: with a power of two, a window or a tile could hide between the values
        few = flat[:: max(1, flat.numel() // DIGEST_VALUES) | 1].float().cpu().contiguous()
        digest.update(str(tuple(tensor.shape)).encode() + few.numpy().tobytes())
    return digest.hexdigest()


def _items(batch: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the cases of a batch as MONAI's evaluator leaves them; a batch that is not taken apart is one case."""
    yield from [batch] if isinstance(batch, Mapping) else batch


def _array(value: Any) -> np.ndarray:
    return np.asarray(convert_to_tensor(value).detach().cpu())
