"""From trained networks to a prediction: how windows are run and what is done to the label map afterwards."""

from pipelines.inference.backends import ExportedNetwork, exported_network, open_backend
from pipelines.inference.components import RemoveSmallComponents, RemoveSmallComponentsd, remove_small_components
from pipelines.inference.ensemble import EnsembleInferer, SplitUncertaintyd, predictive_entropy
from pipelines.inference.fusion_output import SaveFusion
from pipelines.inference.inferers import (
    AutocastInferer,
    FlipAveragingInferer,
    WholeImageInferer,
    choose_precision,
    windows_or_whole,
)
from pipelines.inference.output import SavePredictions, segmentation_nifti, uncertainty_nifti, volumes
from pipelines.inference.sampling import SamplingInferer, ddim_step, distance_to_guess, sampling_times

__all__ = [
    "AutocastInferer",
    "EnsembleInferer",
    "ExportedNetwork",
    "FlipAveragingInferer",
    "RemoveSmallComponents",
    "RemoveSmallComponentsd",
    "SamplingInferer",
    "SaveFusion",
    "SavePredictions",
    "SplitUncertaintyd",
    "WholeImageInferer",
    "choose_precision",
    "ddim_step",
    "distance_to_guess",
    "exported_network",
    "open_backend",
    "predictive_entropy",
    "remove_small_components",
    "sampling_times",
    "segmentation_nifti",
    "uncertainty_nifti",
    "volumes",
    "windows_or_whole",
]
