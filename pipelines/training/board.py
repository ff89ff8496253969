"""TensorBoard of a run: loss per term, rate, metrics and precision-recall per class, overlays, hyper-parameters.

The event files are part of the state of a run: after a kill they are rewound to where the run goes on, so that every
step stands there exactly once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipelines.inference.inferers import class_probabilities
from pipelines.reports.overlay import most_labelled_slice, overlay_panels
from pipelines.training.handlers import validated_metric
from transforms.errors import DataError

logger = logging.getLogger(__name__)

EVENT_FILES = "events.out.tfevents.*"
THRESHOLDS = torch.linspace(0, 1, 127)  # TensorBoard draws exactly these
FIRST_KEY_BELOW_THE_LINE = "bundle_root"


class TensorBoardLog:
    """Write a training run to TensorBoard.

    Per step: ``loss/step`` and ``learning_rate``, with several groups ``learning_rate/<group>``. Per epoch:
    ``loss/epoch`` with one curve per term, ``validation/*``, a precision-recall curve per class, and for the first
    ``overlay_cases`` validation cases the middle and the most lesioned slice. The curves take 3 kB per class and
    validation, less than a single overlay, so they are written every time: TensorBoard's slider then shows how they
    grow, and a resumed run needs to remember nothing about them.

    Args:
        folder: the run's ``tensorboard``.
        rates: returns the rate in force of every group of parameters, by name.
        validator: the evaluator whose metrics and predictions are shown, or None. For the curves its inferer must give
            logits (B, K, *spatial).
        colours: ``#rrggbb`` per label id.
        labels: name per label id, for the precision-recall curves; 0, the background, has none. Empty = no curves.
        overlay_cases: how many cases are drawn.
        pictures: draws a case of the validation, RGB rows in [0, 1] by name; None = image, truth and prediction of a
            segmentation, in ``colours``.
        active: whether anything is opened or written; one process of a run does. The counts of the curves are summed
            over all processes, so every one of them needs its log.
    """

    def __init__(
        self,
        folder: str | Path,
        rates: Callable[[], Mapping[str, float]],
        validator: Engine | None,
        colours: Mapping[int, str],
        labels: Mapping[int, str] | None = None,
        overlay_cases: int = 2,
        pictures: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] | None = None,
        active: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.rates = rates
        self.validator = validator
        self.pictures = pictures or partial(segmentation_pictures, colours=dict(colours))
        self.labels = {int(value): name for value, name in (labels or {}).items() if int(value) != 0}
        self.overlay_cases = overlay_cases
        self.active = active
        self._open: SummaryWriter | None = None
        self._counts = self._no_counts()
        self._listening: list[RemovableEventHandle] = []

    @property
    def writer(self) -> SummaryWriter:
        """The writer, opened on first use: a run that is resumed rewinds its files before."""
        if self._open is None:
            self._open = SummaryWriter(str(self.folder))
        return self._open

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after the validation and ``AverageLoss``; while it runs, also on the validator."""
        engine.add_event_handler(Events.STARTED, lambda _: self._start())
        engine.add_event_handler(Events.COMPLETED, lambda _: self.close())
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_and_raise)
        if self.validator is not None and self.labels:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._curves)
        if self.active:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _start(self) -> None:
        """Open the files, and listen to the validator: the phases of a run share it, and each has a log of its own."""
        if self.active:
            self.writer.flush()
        if self.validator is not None and self.labels:
            # the postprocessing, which makes labels of the logits, listens to the event after this one
            self._listening.append(self.validator.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._count))
        if self.validator is not None and self.active:
            self._listening.append(self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._overlays))

    def close(self) -> None:
        """Write out what is pending and close the files; what is written later goes into a new one."""
        while self._listening:
            self._listening.pop().remove()
        if self._open is not None:
            self._open.close()
            self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"files": {name: size in bytes}}`` of all that is written so far; empty where nothing is written."""
        if self._open is not None:
            self._open.flush()
        files = self._event_files() if self.active else []
        return {"files": {path.name: path.stat().st_size for path in files}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rewind the folder to ``state``, before the engine starts: cut what was written later, delete later files."""
        if not self.active:
            return
        self.close()
        recorded = {str(name): int(size) for name, size in state["files"].items()}
        for path in self._event_files():
            if path.name not in recorded:
                path.unlink()
            elif path.stat().st_size > recorded[path.name]:
                os.truncate(path, recorded[path.name])
        for name, size in recorded.items():
            found = (self.folder / name).stat().st_size if (self.folder / name).is_file() else 0
            if found < size:
                logger.warning("%s: %d of %d bytes are left; TensorBoard has a gap", self.folder / name, found, size)

    def hyper_parameters(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write what a run was asked for and what came out, for TensorBoard's table of runs; once, at its end.

        torch's ``add_hparams`` would put them into a folder of their own, which TensorBoard takes for another run.

        Args:
            values: name -> number, text, or anything that is shown as text.
            metrics: name -> value, shown as ``final/<name>``.
        """
        if not self.active:
            return
        results = {f"final/{name}": float(value) for name, value in metrics.items()}
        was_open = self._open is not None
        file_writer = self.writer.file_writer
        assert file_writer is not None  # an open writer has one
        for summary in hparams({name: _number_or_text(value) for name, value in values.items()}, results):
            file_writer.add_summary(summary)
        for name, value in results.items():
            self.writer.add_scalar(name, value, 0)
        if not was_open:
            self.close()

    def _event_files(self) -> list[Path]:
        return sorted(self.folder.glob(EVENT_FILES))

    def _step(self, engine: Engine) -> None:
        self.writer.add_scalar("loss/step", engine.state.output["loss"].item(), engine.state.iteration)
        rates = self.rates()
        for name, rate in rates.items():
            tag = "learning_rate" if len(rates) == 1 else f"learning_rate/{re.sub(r'[^-.A-Za-z0-9_]', '_', name)}"
            self.writer.add_scalar(tag, rate, engine.state.iteration)

    def _epoch(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        for name, value in sorted(engine.state.metrics.items()):
            self.writer.add_scalar("loss/epoch" if name == "loss" else f"loss/{name}", value, epoch)
        if self.validator is not None and validated_metric(self.validator, epoch) is not None:
            for name, value in sorted(self.validator.state.metrics.items()):
                self.writer.add_scalar(f"validation/{name}", float(value), epoch)
        self.writer.flush()

    def _overlays(self, evaluator: Engine) -> None:
        if evaluator.state.iteration > self.overlay_cases:
            return
        for item, batch in zip(evaluator.state.output, evaluator.state.batch, strict=True):
            for name, picture in self.pictures(item).items():
                tag = f"overlay/{batch['case']}/{name}"
                self.writer.add_image(tag, picture, evaluator.state.epoch, dataformats="HWC")

    def _count(self, evaluator: Engine) -> None:
        logits, label = (convert_to_tensor(evaluator.state.output[key]) for key in ("pred", "label"))
        probability, label = class_probabilities(logits), label[:, 0]
        channels = {value: 0 if probability.shape[1] == 1 else value for value in self.labels}
        try:
            counts = [binned_counts(probability[:, c], label == v, THRESHOLDS) for v, c in channels.items()]
        except DataError as problem:  # the metrics judge the case; a log must not end the run
            cases = ", ".join(map(str, evaluator.state.batch.get("case", [])))
            logger.warning("case %s is left out of the precision-recall curves: %s", cases, problem.why)
            return
        self._counts += torch.stack(counts).cpu()

    def _no_counts(self) -> torch.Tensor:
        return torch.zeros(len(self.labels), 4, len(THRESHOLDS), dtype=torch.int64)

    def _curves(self, engine: Engine) -> None:
        """Runs on the trainer: every process comes here, also one that had no case to validate."""
        if validated_metric(self.validator, engine.state.epoch) is None:
            return
        counts, self._counts = idist.all_reduce(self._counts).cpu(), self._no_counts()
        if not self.active:
            return
        for name, (tp, fp, tn, fn) in zip(self.labels.values(), counts.double().numpy(), strict=True):
            precision, recall = tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1)
            self.writer.add_pr_curve_raw(
                f"precision_recall/{name}", tp, fp, tn, fn, precision, recall, engine.state.epoch, len(THRESHOLDS)
            )

    def _close_and_raise(self, engine: Engine, exception: BaseException) -> None:
        self.close()
        raise exception  # an ignite engine takes an exception that has a handler for dealt with


def segmentation_pictures(item: Mapping[str, Any], colours: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Return the middle and the most lesioned slice of a case: image (first channel), truth and prediction."""
    image, label, prediction = (np.asarray(item[key].cpu()) for key in ("image", "label", "pred"))
    slices = {"middle": image.shape[-1] // 2, "most_lesioned": most_labelled_slice(label[0])}
    return {n: overlay_panels(image[0], label[0], prediction[0], index, colours) for n, index in slices.items()}


def binned_counts(probability: torch.Tensor, truth: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Return exact counts (4, T) int64: true and false positives, true and false negatives at each threshold.

    A voxel is positive at threshold t where its probability is t or more. One histogram per truth value is made and
    summed from above, so the cost does not depend on the number of thresholds.

    Args:
        probability: any shape, finite.
        truth: bool, same shape.
        thresholds: (T,) ascending.

    Raises:
        DataError: a probability is not finite.
    """
    finite = torch.isfinite(probability)
    if not bool(finite.all()):
        raise DataError(
            "predicted probabilities",
            f"{int((~finite).sum())} of {finite.numel()} voxels are not finite",
            "look at the case and at the network's weights",
        )
    bins = len(thresholds) + 1  # bin b: exactly b thresholds are reached
    reached = torch.bucketize(probability.flatten(), thresholds.to(probability), right=True)
    histogram = torch.bincount(reached + bins * truth.flatten(), minlength=2 * bins).reshape(2, bins)
    at_least = histogram.flip(1).cumsum(1).flip(1)[:, 1:]
    (fp, tp), (negatives, positives) = at_least, histogram.sum(1)
    return torch.stack([tp, fp, negatives - fp, positives - tp])


def hyper_parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bundle's hyper-parameters: the plain values at the top level, above the line.

    Args:
        config: resolved, in the order of the file; ``bundle_root`` is the first key below the line.
    """
    keys = list(config)
    last = keys.index(FIRST_KEY_BELOW_THE_LINE) if FIRST_KEY_BELOW_THE_LINE in config else len(keys)
    return {key: config[key] for key in keys[:last] if _is_plain(config[key])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, str):
        return not value.startswith(("$", "@", "%"))
    return value is None or isinstance(value, (bool, int, float))


def _number_or_text(value: Any) -> bool | float | str:
    return value if isinstance(value, (bool, int, float)) else str(value)
