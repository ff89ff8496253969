"""Figures of merit: per case and label in physical units, with one policy for empty masks, and their summaries."""

from __future__ import annotations

from pipelines.metrics.calibration import (
    CalibrationCounts,
    ReliabilityCurve,
    calibration_figures,
    count_calibration,
    pool_calibration,
    reliability_curve,
)
from pipelines.metrics.comparison import compare_runs
from pipelines.metrics.contingency import majority_classes
from pipelines.metrics.cumulative import CaseFigures, FigureOf
from pipelines.metrics.cumulative_metrics import ImageQualityMetric, InstanceMetric, SegmentationMetric
from pipelines.metrics.image_quality import (
    image_quality,
    image_quality_in_rois,
    ms_ssim,
    mutual_information,
    psnr_db,
    ssim,
    ssim_map,
)
from pipelines.metrics.image_ssim import Window
from pipelines.metrics.instance_counts import InstanceCounts, instance_figures, pool_cases, pool_counts
from pipelines.metrics.instances import count_instances, instance_metrics
from pipelines.metrics.lesions import lesion_detection
from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.metrics.statistics import bca_interval, holm, signed_rank_p
from pipelines.metrics.summary import summarise

__all__ = [
    "CalibrationCounts",
    "CaseFigures",
    "FigureOf",
    "ImageQualityMetric",
    "InstanceCounts",
    "InstanceMetric",
    "ReliabilityCurve",
    "SegmentationMetric",
    "Window",
    "bca_interval",
    "calibration_figures",
    "compare_runs",
    "count_calibration",
    "count_instances",
    "holm",
    "image_quality",
    "image_quality_in_rois",
    "instance_figures",
    "instance_metrics",
    "lesion_detection",
    "majority_classes",
    "ms_ssim",
    "mutual_information",
    "pool_calibration",
    "pool_cases",
    "pool_counts",
    "psnr_db",
    "reliability_curve",
    "segmentation_metrics",
    "signed_rank_p",
    "ssim",
    "ssim_map",
    "summarise",
]
