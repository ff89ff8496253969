"""What happens to a sample: pure array functions and their MONAI-style dictionary transforms (suffix ``d``)."""

from transforms.bias_field import N4BiasFieldCorrection, N4BiasFieldCorrectiond
from transforms.gamma import RandGammaBeforeNormalize, RandGammaBeforeNormalized, refuse_gamma_after_normalisation
from transforms.geometry import CropToForegroundd, ResampleToSpacingd, ToRASd
from transforms.histogram import StandardizeHistogram, StandardizeHistogramd, StandardLandmarks, fit_landmarks
from transforms.intensity import (
    ClipIntensityPercentilesInMask,
    ClipIntensityPercentilesInMaskd,
    HUWindow,
    HUWindowd,
    MeasureIntensityInMaskd,
    NormalizeIntensityInMask,
    NormalizeIntensityInMaskd,
)
from transforms.load import LoadCased
from transforms.masks import ForegroundMask, ForegroundMaskd
from transforms.modalities import RandDropModalityd

__all__ = [
    "ClipIntensityPercentilesInMask",
    "ClipIntensityPercentilesInMaskd",
    "CropToForegroundd",
    "ForegroundMask",
    "ForegroundMaskd",
    "HUWindow",
    "HUWindowd",
    "LoadCased",
    "MeasureIntensityInMaskd",
    "N4BiasFieldCorrection",
    "N4BiasFieldCorrectiond",
    "NormalizeIntensityInMask",
    "NormalizeIntensityInMaskd",
    "RandDropModalityd",
    "RandGammaBeforeNormalize",
    "RandGammaBeforeNormalized",
    "ResampleToSpacingd",
    "StandardLandmarks",
    "StandardizeHistogram",
    "StandardizeHistogramd",
    "ToRASd",
    "fit_landmarks",
    "refuse_gamma_after_normalisation",
]
