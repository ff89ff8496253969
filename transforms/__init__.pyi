"""What happens to a sample: pure array functions and their MONAI-style dictionary transforms (suffix ``d``)."""

from .appearance import RandAppearanced
from .bias_field import N4BiasFieldCorrection, N4BiasFieldCorrectiond
from .degraded_pairs import DegradePaird, RandDegradePaird
from .diffusion import AddDiffusionNoised, NoiseSchedule
from .fusion import FusionConditiond, FusionReferenced, MeasurePaird
from .fusion_rules import FUSION_RULES, hard_composite
from .fusion_samples import RandFuseByRuled
from .gamma import RandGammaBeforeNormalize, RandGammaBeforeNormalized, refuse_gamma_after_normalisation
from .geometry import CropToForegroundd, ResampleToSpacingd, ToRASd
from .histogram import StandardizeHistogram, StandardizeHistogramd, StandardLandmarks, fit_landmarks
from .intensity import (
    ClipIntensityPercentilesInMask,
    ClipIntensityPercentilesInMaskd,
    HUWindow,
    HUWindowd,
    MeasureIntensityInMaskd,
    NormalizeIntensityInMask,
    NormalizeIntensityInMaskd,
)
from .load import LoadCased
from .masks import ForegroundMask, ForegroundMaskd
from .modalities import RandDropModalityd
from .registration import RigidRegistrationd
from .registration_check import RegistrationCheckd
from .rois import BoneMaskd, BrainMaskd, HeadMaskd

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
