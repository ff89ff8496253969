"""Segmentation, image quality and instances as MONAI metrics, for any configuration, by ``_target_``.

Each is one call per case for all figures asked for. The means are those of :class:`pipelines.metrics.CaseFigures`; the
figures, their policy for empty masks and their errors are those of the functions of the same task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.metrics.case_pairs import CasePair, as_array, as_label_map
from pipelines.metrics.cumulative import CaseFigures, Row, mean_of_present
from pipelines.metrics.image_quality import IMAGE_METRICS, WINDOW, image_quality_in_rois
from pipelines.metrics.image_ssim import Window
from pipelines.metrics.instance_counts import InstanceCounts, instance_figures
from pipelines.metrics.instances import count_instances
from pipelines.metrics.segmentation import DISTANCE, GROUPS, segmentation_metrics
from pipelines.names import nearest
from transforms.errors import DataError, UsageError

STATUSES = ("both", "missed", "false_alarm", "empty")
IMAGE_STATUSES = ("ok", "empty", "border")


class SegmentationMetric(CaseFigures):
    """Figures of :func:`pipelines.metrics.segmentation_metrics` in mm and mL, the voxel size from the images' affines.

    ``y_pred`` and ``y`` are label maps (1, *spatial), or one-hot with one channel per label, background included; with
    ``multilabel`` one mask of 0 and 1 per channel, which may overlap. A label that is missed, or a false alarm, enters
    the mean with the worst value; one that is in neither map does not, and is counted. ``empty_policy`` changes that.

    Args:
        labels: value, or with ``multilabel`` channel, to name; 0 is background, or a channel like any other.
        figures: any keys of the function's rows; what they do not need is not computed.
        nsd_tolerance_mm: of several the first is ``nsd``, a further one t is ``nsd_{t}mm``.
        key_figure: the only figure that :meth:`aggregate` returns, as a key metric of MONAI has to be a scalar: one of
            ``figures``, or one with a label's name, as in ``dice_lesion``.
        spacing_mm: voxel size of images without an affine; where there is one, it has to be the same.
        multilabel: channels are masks.
        prefix: before every key of the results.
        options: ``definition``, ``empty_policy``, ``ignore_label``, ``boundary_width_mm``, ``threads``.

    Raises:
        UsageError: an unknown figure; what the function raises of its options.
        DataError: on being called, different grids, no voxel size, what the function raises.
    """

    def __init__(
        self,
        labels: Mapping[Any, str],
        figures: Sequence[str] = ("dice", "hd95_mm", "nsd"),
        nsd_tolerance_mm: float | Sequence[float] = 1.0,
        key_figure: str | None = None,
        spacing_mm: Sequence[float] | None = None,
        multilabel: bool = False,
        prefix: str = "",
        **options: Any,
    ) -> None:
        self.labels = {int(value): name for value, name in labels.items() if multilabel or int(value) != 0}
        self.multilabel = multilabel
        self.options: dict[str, Any] = {"nsd_tolerance_mm": nsd_tolerance_mm, "multilabel": multilabel, **options}
        nothing = np.zeros((1 + max(self.labels, default=0), 1, 1, 1) if multilabel else (1, 1, 1), np.uint8)
        rows = segmentation_metrics(nothing, nothing, (1.0, 1.0, 1.0), self.labels, **self.options)
        _check_figures(figures, [key for key in rows[0] if key not in ("label", "status")])
        self.options["groups"] = tuple(group for group in GROUPS if any(_group_of(name) == group for name in figures))
        super().__init__(tuple(self.labels.values()), figures, STATUSES, spacing_mm, key_figure, prefix)

    def _compare(self, pair: CasePair) -> tuple[Sequence[Row], tuple[torch.Tensor, ...]]:
        spacing_mm = pair.known_spacing()
        if self.multilabel:
            prediction, reference = as_array(pair.prediction), as_array(pair.reference)
        else:
            prediction = as_label_map(pair.prediction, self.labels, "prediction", pair.case)
            reference = as_label_map(pair.reference, self.labels, "reference", pair.case)
        return segmentation_metrics(prediction, reference, spacing_mm, self.labels, case=pair.case, **self.options), ()


class ImageQualityMetric(CaseFigures):
    """Figures of :func:`pipelines.metrics.image_quality_in_rois` in regions of interest.

    ``y_pred`` is an image (1, *spatial), ``y`` its reference (1 + R, *spatial): the image, then a mask of 0 and 1 for
    every region, as ``ConcatItemsd`` puts them together. Without regions ``y`` is the image alone, and the results are
    those of the region "image".

    Args:
        data_range: width of the range that the intensities can take; never guessed.
        rois: names of the R regions, in the order of their masks.
        figures: any of ``IMAGE_METRICS``.
        window: of SSIM and MS-SSIM; one in mm needs the voxel size.
        key_figure, spacing_mm, prefix: as of :class:`SegmentationMetric`.
        options: ``border``, ``bins``, ``threads``.

    Raises:
        UsageError: an unknown figure, what the function raises of its options.
        DataError: on being called, different grids or channels, what the function raises.
    """

    def __init__(
        self,
        data_range: float,
        rois: Sequence[str] = (),
        figures: Sequence[str] = ("ssim", "psnr_db", "mae"),
        window: Window = WINDOW,
        key_figure: str | None = None,
        spacing_mm: Sequence[float] | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        self.data_range, self.rois, self.options = data_range, tuple(rois), {"window": window, **options}
        self.needs_spacing = window.unit == "mm"
        _check_figures(figures, IMAGE_METRICS)
        nothing = np.zeros((1, 1), np.uint8)
        image_quality_in_rois(nothing, nothing, data_range, {"": None}, (1.0, 1.0), figures, **self.options)
        super().__init__(self.rois or ("image",), figures, IMAGE_STATUSES, spacing_mm, key_figure, prefix)

    def _compare(self, pair: CasePair) -> tuple[Sequence[Row], tuple[torch.Tensor, ...]]:
        if len(pair.prediction) != 1 or len(pair.reference) != 1 + len(self.rois):
            raise DataError(
                f"case {pair.case}: channels of prediction and reference",
                f"{len(pair.prediction)} and {len(pair.reference)}, expected 1 and {1 + len(self.rois)}: the image, "
                f"then the masks of {list(self.rois)}",
                "put image and masks together with ConcatItemsd; compare one channel of an image at a time",
            )
        image, reference, masks = pair.prediction[0], pair.reference[0], pair.reference[1:]
        spacing_mm = pair.known_spacing() if self.needs_spacing else pair.spacing_mm
        rois: dict[str, Any] = dict(zip(self.rois, map(as_array, masks), strict=True)) or {"image": None}
        return image_quality_in_rois(
            as_array(image),
            as_array(reference),
            self.data_range,
            rois,
            spacing_mm,
            self.figures,
            case=pair.case,
            **self.options,
        ), ()


class InstanceMetric(CaseFigures):
    """Figures of :func:`pipelines.metrics.instance_metrics`: PQ, AJI, AP and F1 by class; no voxel size is needed.

    ``y_pred`` and ``y`` are (1, *spatial), instance ids, or (2, *spatial), ids and then the class of every voxel, as
    MONAI's ``PanopticQualityMetric`` has them; all voxels of an instance have one class.

    The results have every figure twice: ``pq_cell`` is the mean over the images, ``cohort_pq_cell`` is taken once from
    the sums over all images, as MONAI and the panoptic challenges do it.

    Args:
        labels: class to name, 0 is background; None: one class, "instance", and no class channel is needed.
        figures: any of :func:`pipelines.metrics.instance_figures`.
        match_iou: a pair has to exceed it to count in PQ.
        thresholds: IoU of ``f1_``, ``ap_count_``.
        key_figure, prefix: as of :class:`SegmentationMetric`; a key may be ``cohort_pq``.

    Raises:
        UsageError: an unknown figure, ``match_iou`` or ``thresholds`` out of range; on being called, several classes
            but no class channel.
        DataError: on being called, different grids, more channels, what the function raises.
    """

    scopes = ("", "cohort_")

    def __init__(
        self,
        labels: Mapping[Any, str] | None = None,
        figures: Sequence[str] = ("pq", "sq", "rq", "aji", "f1_50", "map_count_50_95"),
        match_iou: float = 0.5,
        thresholds: Sequence[float] = (0.5, 0.75),
        key_figure: str | None = None,
        prefix: str = "",
    ) -> None:
        self.labels = None if labels is None else {int(value): name for value, name in labels.items()}
        self.match_iou, self.thresholds = match_iou, tuple(thresholds)
        nothing = np.zeros((1, 1), np.uint8)
        counts = count_instances(nothing, nothing, self.labels, nothing, nothing, match_iou=match_iou)
        valid = instance_figures(next(iter(counts.values())), self.thresholds)
        _check_figures(figures, [key for key in valid if key != "status"])
        super().__init__(tuple(counts), figures, STATUSES, None, key_figure, prefix)

    def _compare(self, pair: CasePair) -> tuple[Sequence[Row], tuple[torch.Tensor, ...]]:
        prediction, predicted_classes = _ids_and_classes(pair.prediction, pair.case)
        reference, reference_classes = _ids_and_classes(pair.reference, pair.case)
        counts = count_instances(
            prediction,
            reference,
            self.labels,
            predicted_classes,
            reference_classes,
            match_iou=self.match_iou,
            case=pair.case,
        )
        rows = [instance_figures(of_class, self.thresholds) for of_class in counts.values()]
        return rows, (torch.cat([_ledger(column, of_class) for column, of_class in enumerate(counts.values())]),)

    def _empty_buffers(self) -> list[torch.Tensor]:
        return [*super()._empty_buffers(), torch.empty(0, LEDGER_COLUMNS, dtype=torch.float64)]

    def _pooled(self, *gathered: torch.Tensor) -> dict[str, float]:
        (ledger,) = gathered
        counts = [_counts_of(ledger[ledger[:, 0] == column]) for column in range(len(self.names))]
        of_label = [instance_figures(of_class, self.thresholds) for of_class in counts]
        results = {}
        for figure in self.figures:
            of_figure = [np.nan if row[figure] is None else row[figure] for row in of_label]
            values = torch.tensor(of_figure, dtype=torch.float64)
            results[f"cohort_{figure}"] = mean_of_present(values)
            results |= {f"cohort_{figure}_{name}": float(v) for name, v in zip(self.names, values, strict=True)}
        return results


LEDGER_COLUMNS = 8
"""Class; reference instances; intersection and union of AJI, and of AJI+; unique and matched IoU.

A class of an image has one row of sums (IoU NaN), then a row of the two IoU for each predicted instance (sums 0), so
that rows of all images add up to what :class:`InstanceCounts` holds.
"""


def _ledger(column: int, counts: InstanceCounts) -> torch.Tensor:
    rows = np.zeros((1 + counts.unique_iou.size, LEDGER_COLUMNS))
    rows[:, 0] = column
    rows[0, 1:] = counts.n_reference, *counts.aji, *counts.aji_plus, np.nan, np.nan
    rows[1:, 6], rows[1:, 7] = counts.unique_iou, counts.matched_iou
    return torch.from_numpy(rows)


def _counts_of(ledger: torch.Tensor) -> InstanceCounts:
    rows = ledger.numpy()
    sums = [int(value) for value in rows[:, 1:6].sum(axis=0)]
    instances = rows[~np.isnan(rows[:, 6])]
    return InstanceCounts(sums[0], instances[:, 6], instances[:, 7], (sums[1], sums[2]), (sums[3], sums[4]))


def _ids_and_classes(image: torch.Tensor, case: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if len(image) > 2:
        raise DataError(
            f"case {case}: {len(image)} channels of instances",
            "expected ids (1, *spatial), or ids and classes (2, *spatial)",
            "give one map of ids; several masks become one map by their number",
        )
    return as_array(image[0]), as_array(image[1]) if len(image) == 2 else None


def _check_figures(figures: Sequence[str], valid: Sequence[str]) -> None:
    """Raise a ``UsageError`` unless there is at least one figure and all of them are valid."""
    if isinstance(figures, str) or not figures:
        raise UsageError(f"metric: figures {figures!r}", "expected a list of one name or more", f"such as {[valid[0]]}")
    for name in figures:
        if name not in valid:
            raise UsageError(f"metric: figure {name!r}", "it does not exist", nearest(str(name), valid))


def _group_of(figure: str) -> str | None:
    """Return the group of figures that has to be computed for one of them, None where it costs nothing."""
    if figure in DISTANCE:
        return "distance"
    return next((group for group in GROUPS if figure.startswith(group)), None)
