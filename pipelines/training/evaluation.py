"""What an evaluator does with each case: measure it, report it; and at the end what is known of the whole split."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from nibabel.affines import voxel_sizes

from pipelines.files import write_json
from pipelines.manifests import Label
from pipelines.metrics import segmentation_metrics, summarise
from pipelines.metrics.calibration import count_calibration, pool_calibration
from pipelines.reports.overlay import save_overlay_figure
from pipelines.reports.panels import calibration_panel
from pipelines.reports.tables import format_table, write_per_case_csv, write_summary_json
from transforms.errors import DataError

logger = logging.getLogger(__name__)


class CaseMetrics:
    """Measure every prediction on its image's grid; write ``per_case.csv``, ``summary.json`` and an overlay per case.

    Args:
        labels: the bundle's label table.
        nsd_tolerance_mm: tolerance of the surface Dice.
        folder: the run's ``metrics``.
        subjects: subject of each case, the unit of the bootstrap.
        source: of what these are results (``source_of``); stands in ``summary.json``.
        reference_key: the truth in the batch, on the image's own grid.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        nsd_tolerance_mm: float,
        folder: str | Path,
        subjects: Mapping[str, str],
        source: Mapping[str, Any],
        reference_key: str = "reference",
    ) -> None:
        self.names = {label.id: label.name for label in labels if label.id > 0}
        self.colours = {label.id: label.colour for label in labels}
        self.tolerance = float(nsd_tolerance_mm)
        self.folder = Path(folder)
        self.subjects = dict(subjects)
        self.source = dict(source)
        self.reference_key = reference_key
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing leaves label maps on the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            case, reference = batch["case"], batch[self.reference_key]
            prediction = np.asarray(item["pred"].cpu())[0].astype(np.int16)
            truth = np.asarray(reference.cpu())[0].astype(np.int16)
            spacing = tuple(float(s) for s in voxel_sizes(np.asarray(reference.affine)))
            results = segmentation_metrics(prediction, truth, spacing, self.names, self.tolerance, case)
            self.rows += [{"case": case, "subject": self.subjects[case], **result} for result in results]
            dice = [result["dice"] for result in results if result["dice"] is not None]
            title = f"{case}: mean Dice {np.mean(dice):.3f}" if dice else case
            try:
                self._draw(item["image"].meta["filename_or_obj"], truth, prediction, case, title)
            except Exception as problem:  # a picture is no reason to lose the numbers of a whole split
                logger.warning("case %s: no overlay (%s: %s)", case, type(problem).__name__, problem)

    def _draw(self, source: str, truth: np.ndarray, prediction: np.ndarray, case: str, title: str) -> None:
        image = nib.load(source)
        truth, prediction = (
            np.asarray(nib.as_closest_canonical(nib.Nifti1Image(a, image.affine)).dataobj) for a in (truth, prediction)
        )
        voxels = np.asarray(nib.as_closest_canonical(image).dataobj, dtype=np.float32)
        voxels = voxels[..., 0] if voxels.ndim == 4 else voxels
        save_overlay_figure(self.folder / "overlays" / f"{case}.png", voxels, truth, prediction, self.colours, title)

    def _write(self, engine: Engine) -> None:
        summary = {"source": self.source, **summarise(self.rows)}
        write_per_case_csv(self.rows, self.folder / "per_case.csv")
        write_summary_json(summary, self.folder / "summary.json")
        logger.info("results of %d cases in %s\n%s", len(engine.data_loader), self.folder, format_table(summary))


class CaseCalibration:
    """Count, case by case, how often each label's probabilities come true; write ``calibration.json`` for the report.

    Only the image's foreground counts (``foreground``, the head or the brain): air is always certain, and right. No
    volume outlives its case. A case that cannot be counted is left out, and named in the panel and in the log.

    Args:
        labels: the bundle's label table.
        folder: the run's ``metrics``.
        probability_key: in the output, (K, *spatial) on the image's own grid, before the label is chosen; a single
            channel is that of the only label, else a label's id is its channel.
        reference_key: the truth in the batch, on that grid.
        mask_key: the foreground in the batch, on that grid.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        folder: str | Path,
        probability_key: str = "probability",
        reference_key: str = "reference",
        mask_key: str = "foreground",
    ) -> None:
        self.names = {label.id: label.name for label in labels if label.id > 0}
        self.folder = Path(folder)
        self.keys = (probability_key, reference_key, mask_key)
        self.counts = dict.fromkeys(self.names.values(), count_calibration(np.empty(0), np.empty(0)))
        self.left_out: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing leaves probabilities and foreground on the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            both = {**batch, **item}
            probability, truth, mask = (np.asarray(both[key].cpu()) for key in self.keys)
            channels = {label: 0 if len(probability) == 1 else label for label in self.names}
            try:
                counted = {
                    self.names[label]: count_calibration(
                        probability[channel], np.rint(truth[0]) == label, mask[0] > 0.5, batch["case"]
                    )
                    for label, channel in channels.items()
                }
            except DataError as problem:  # the metrics judge the case; a curve is no reason to lose a whole split
                logger.warning("case %s is left out of the calibration: %s", batch["case"], problem.why)
                self.left_out.append(batch["case"])
                continue
            self.counts = {name: pool_calibration([own, counted[name]]) for name, own in self.counts.items()}

    def _write(self, engine: Engine) -> None:
        about = "Counted are the voxels in the foreground of the images, of all cases together."
        if self.left_out:
            about += f" Left out, for the reason in the log: {', '.join(self.left_out)}."
        write_json(self.folder / "calibration.json", calibration_panel(self.counts, about))


class ReportCases:
    """One plain line per finished case, with its time."""

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator, as the last handler."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self._since = time.monotonic()

    def _report(self, engine: Engine) -> None:
        now = time.monotonic()
        cases = ", ".join(batch["case"] for batch in engine.state.batch)
        logger.info(
            "case %s done (%d of %d), %.1f s",
            cases,
            engine.state.iteration,
            engine.state.epoch_length,
            now - self._since,
        )
        self._since = now
