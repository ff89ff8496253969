"""From trained networks to a prediction: how windows are run and what is done to the label map afterwards."""

from pipelines.inference.components import RemoveSmallComponents, RemoveSmallComponentsd, remove_small_components
from pipelines.inference.ensemble import EnsembleInferer, SplitUncertaintyd, predictive_entropy
from pipelines.inference.inferers import AutocastInferer, FlipAveragingInferer, choose_precision
from pipelines.inference.output import SavePredictions, segmentation_nifti, uncertainty_nifti, volumes

__all__ = [
    "AutocastInferer",
    "EnsembleInferer",
    "FlipAveragingInferer",
    "RemoveSmallComponents",
    "RemoveSmallComponentsd",
    "SavePredictions",
    "SplitUncertaintyd",
    "choose_precision",
    "predictive_entropy",
    "remove_small_components",
    "segmentation_nifti",
    "uncertainty_nifti",
    "volumes",
]
