"""The last handler of an evaluation: where every case's files and largest error are, and the report of the split."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from pipelines.files import write_json
from pipelines.manifests import Label
from pipelines.reports.gallery import largest_error_slices
from pipelines.reports.report import write_report
from pipelines.reports.report_data import CASES_FILE

logger = logging.getLogger(__name__)


class WriteReport:
    """Write ``cases.json`` beside the results, then ``report/index.html`` beside the metrics folder.

    Attach it after the handlers that write results and masks. A report that cannot be made is a warning: the results
    stand.

    Args:
        folder: the run's ``metrics``.
        predictions: where the masks are written as ``<case>.nii.gz``.
        items: what is evaluated: ``case``, ``image`` (paths), ``channels``, ``label_values``, and the truth's path.
        labels: the bundle's label table.
        reference_key: the truth, as a path in the items and as an array in the batch.
    """

    def __init__(
        self,
        folder: str | Path,
        predictions: str | Path,
        items: Sequence[Mapping[str, Any]],
        labels: Sequence[Label],
        reference_key: str = "reference",
    ) -> None:
        self.folder = Path(folder)
        self.predictions = Path(predictions)
        self.items = {str(item["case"]): item for item in items}
        self.labels = [{"id": label.id, "name": label.name, "colour": label.colour} for label in labels]
        self.reference_key = reference_key
        self.errors: dict[str, dict[str, list[int]]] = {}

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing leaves label maps on the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            truth, prediction = (np.asarray(a.cpu())[0] for a in (batch[self.reference_key], item["pred"]))
            slices, wrong = largest_error_slices(truth, prediction)
            self.errors[batch["case"]] = {"slices": list(slices), "wrong_voxels": list(wrong)}

    def _write(self, engine: Engine) -> None:
        values = next((item.get("label_values") for item in self.items.values()), None)
        cases = {case: self._entry(case) for case in self.errors}
        about = {"labels": self.labels, "label_values": [list(pair) for pair in values or []], "cases": cases}
        write_json(self.folder / CASES_FILE, about)
        report_or_warn(self.folder)

    def _entry(self, case: str) -> dict[str, Any]:
        item = self.items[case]
        paths = list(item["image"])
        first = next(i for i, path in enumerate(paths) if path is not None)
        channels = item.get("channels")
        return {
            "image": self._relative(paths[first]),
            "channel": channels[first] if channels else None,
            "reference": self._relative(item[self.reference_key]),
            "prediction": self._relative(self.predictions / f"{case}.nii.gz"),
            "largest_error": self.errors[case],
        }

    def _relative(self, path: str | Path) -> str:
        """Return a path from the metrics folder, so that run and data can move together, unless on another drive."""
        try:
            return Path(os.path.relpath(path, self.folder)).as_posix()
        except ValueError:
            return Path(path).as_posix()


def report_or_warn(folder: str | Path) -> None:
    """Write the report of results that have just been written; where it fails, say so and go on."""
    try:
        logger.info("report in %s", write_report([folder]))
    except Exception as problem:  # the numbers are written and right; a picture of them is no reason to fail
        logger.warning("no report of %s: %s", folder, problem)
