"""From a trained network to a prediction: how windows are run and what is done to the label map afterwards."""

from pipelines.inference.components import RemoveSmallComponents, RemoveSmallComponentsd, remove_small_components
from pipelines.inference.inferers import AutocastInferer, FlipAveragingInferer, choose_precision
from pipelines.inference.output import SavePredictions, segmentation_nifti, volumes

__all__ = [
    "AutocastInferer",
    "FlipAveragingInferer",
    "RemoveSmallComponents",
    "RemoveSmallComponentsd",
    "SavePredictions",
    "choose_precision",
    "remove_small_components",
    "segmentation_nifti",
    "volumes",
]
