"""Fused images as training samples: what a network that reads fused images has to cope with, whoever made them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform

from transforms.errors import BundleError
from transforms.fusion import CT, MRI, REFERENCE_CHANNELS, ct_display, mri_display
from transforms.fusion_rules import FUSION_RULES
from transforms.masks import as_numpy, case_name, like, require_key

NAMES = tuple(FUSION_RULES)


class RandFuseByRuled(RandomizableTransform, MapTransform):
    """Replace a pair by one fused image in display units, and its reference by the lesion.

    The image is the clean target or what one of ``FUSION_RULES`` makes of the pair as it is, degraded or not; every
    rule is as likely as another.

    Args:
        keys: the pair (2, *spatial); becomes (1, *spatial) float32.
        target_probability: of the target; 1 draws nothing.
        reference_key: of ``FusionReferenced``; becomes the lesion (1, *spatial) uint8.
        scale_key: of ``MeasurePaird``.

    Raises:
        BundleError: a probability outside 0 to 1.
    """

    def __init__(
        self,
        keys: str = "image",
        target_probability: float = 0.34,
        reference_key: str = "label",
        scale_key: str = "mri_scale",
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if not 0 <= target_probability <= 1:
            raise BundleError(
                f"RandFuseByRuled: target_probability {target_probability}", "expected 0 to 1", "correct it"
            )
        self.target_probability = float(target_probability)
        self.reference_key, self.scale_key = reference_key, scale_key
        self.rule: str | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw the rule; None is the target."""
        wanted = self.target_probability < 1 and self.R.random_sample() >= self.target_probability
        self.rule = NAMES[int(self.R.randint(len(NAMES)))] if wanted else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with image and label."""
        output = dict(data)
        name = type(self).__name__
        self.randomize()
        for key in self.key_iterator(output):
            reference = require_key(output, self.reference_key, name, "FusionReferenced")
            truth = dict(zip(REFERENCE_CHANNELS, as_numpy(reference), strict=True))
            if self.rule is None:
                fused = (truth["x0"] + 1) / 2
            else:
                pair = as_numpy(output[key])
                if len(pair) != 2:
                    raise BundleError(case_name(output, key), f"{len(pair)} channels, expected a pair", "fuse first")
                scale = as_numpy(require_key(output, self.scale_key, name, "MeasurePaird"))
                fused = FUSION_RULES[self.rule](mri_display(pair[MRI], scale), ct_display(pair[CT]), pair[CT])
            output[key] = like(np.ascontiguousarray(fused[None], dtype=np.float32), output[key])
            output[self.reference_key] = like((truth["lesion"] > 0.5)[None].astype(np.uint8), reference)
        return output
