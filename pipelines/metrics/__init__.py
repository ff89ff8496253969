"""Figures of merit: per case and label in physical units, with one policy for empty masks, and their summaries."""

from __future__ import annotations

from pipelines.metrics.lesions import lesion_detection
from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.metrics.summary import summarise

__all__ = ["lesion_detection", "segmentation_metrics", "summarise"]
