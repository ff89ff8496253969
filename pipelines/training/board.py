"""TensorBoard of a run: loss per term, learning rate, metrics per class, and overlays on fixed cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from pipelines.reports.overlay import most_labelled_slice, overlay_panels
from pipelines.training.handlers import validated_metric


class TensorBoardLog:
    """Write a training run to TensorBoard.

    Per step: ``loss/step`` and ``learning_rate``. Per epoch: ``loss/epoch`` with one curve per term, ``validation/*``,
    and for the first ``overlay_cases`` validation cases the middle and the most lesioned slice.

    Args:
        folder: the run's ``tensorboard``.
        learning_rate: returns the rate in force.
        validator: the evaluator whose metrics and predictions are shown, or None.
        colours: ``#rrggbb`` per label id.
        overlay_cases: how many cases are drawn.
        channel: the image's channel that is shown.
    """

    def __init__(
        self,
        folder: Path,
        learning_rate: Callable[[], float],
        validator: Engine | None,
        colours: Mapping[int, str],
        overlay_cases: int = 2,
        channel: int = 0,
    ) -> None:
        self.writer = SummaryWriter(str(folder))
        self.learning_rate = learning_rate
        self.validator = validator
        self.colours = dict(colours)
        self.overlay_cases = overlay_cases
        self.channel = channel

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after the validation and ``AverageLoss``; also on the validator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_and_raise)
        if self.validator is not None:
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._overlays)

    def _step(self, engine: Engine) -> None:
        self.writer.add_scalar("loss/step", engine.state.output["loss"].item(), engine.state.iteration)
        self.writer.add_scalar("learning_rate", self.learning_rate(), engine.state.iteration)

    def _epoch(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        for name, value in engine.state.metrics.items():
            self.writer.add_scalar("loss/epoch" if name == "loss" else f"loss/{name}", value, epoch)
        if self.validator is not None and validated_metric(self.validator, epoch) is not None:
            for name, value in self.validator.state.metrics.items():
                self.writer.add_scalar(f"validation/{name}", float(value), epoch)
        self.writer.flush()

    def _overlays(self, evaluator: Engine) -> None:
        if evaluator.state.iteration > self.overlay_cases:
            return
        for item, batch in zip(evaluator.state.output, evaluator.state.batch, strict=True):
            image, label, prediction = (np.asarray(item[key].cpu()) for key in ("image", "label", "pred"))
            slices = {"middle": image.shape[-1] // 2, "most_lesioned": most_labelled_slice(label[0])}
            for name, index in slices.items():
                panels = overlay_panels(image[self.channel], label[0], prediction[0], index, self.colours)
                tag = f"overlay/{batch['case']}/{name}"
                self.writer.add_image(tag, panels, evaluator.state.epoch, dataformats="HWC")

    def _close(self, engine: Engine) -> None:
        self.writer.close()

    def _close_and_raise(self, engine: Engine, exception: BaseException) -> None:
        self.writer.close()
        raise exception  # an ignite engine takes an exception that has a handler for dealt with
