"""What happens to a sample: pure array functions and their MONAI-style dictionary transforms (suffix ``d``)."""

from transforms.appearance import RandAppearanced
from transforms.bias_field import N4BiasFieldCorrection, N4BiasFieldCorrectiond
from transforms.degraded_pairs import DegradePaird, RandDegradePaird
from transforms.diffusion import AddDiffusionNoised, NoiseSchedule
from transforms.fusion import FusionConditiond, FusionReferenced, MeasurePaird
from transforms.fusion_rules import FUSION_RULES, hard_composite
from transforms.fusion_samples import RandFuseByRuled
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
from transforms.registration import RigidRegistrationd
from transforms.registration_check import RegistrationCheckd
from transforms.rois import BoneMaskd, BrainMaskd, HeadMaskd

__all__ = [
    "FUSION_RULES",
    "AddDiffusionNoised",
    "BoneMaskd",
    "BrainMaskd",
    "ClipIntensityPercentilesInMask",
    "ClipIntensityPercentilesInMaskd",
    "CropToForegroundd",
    "DegradePaird",
    "ForegroundMask",
    "ForegroundMaskd",
    "FusionConditiond",
    "FusionReferenced",
    "HUWindow",
    "HUWindowd",
    "HeadMaskd",
    "LoadCased",
    "MeasureIntensityInMaskd",
    "MeasurePaird",
    "N4BiasFieldCorrection",
    "N4BiasFieldCorrectiond",
    "NoiseSchedule",
    "NormalizeIntensityInMask",
    "NormalizeIntensityInMaskd",
    "RandAppearanced",
    "RandDegradePaird",
    "RandDropModalityd",
    "RandFuseByRuled",
    "RandGammaBeforeNormalize",
    "RandGammaBeforeNormalized",
    "RegistrationCheckd",
    "ResampleToSpacingd",
    "RigidRegistrationd",
    "StandardLandmarks",
    "StandardizeHistogram",
    "StandardizeHistogramd",
    "ToRASd",
    "fit_landmarks",
    "hard_composite",
    "refuse_gamma_after_normalisation",
]
