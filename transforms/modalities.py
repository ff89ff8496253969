"""Teach a network to do without a modality that the hospital may not have."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform, Randomizable

from transforms.errors import BundleError


class RandDropModalityd(MapTransform, Randomizable):
    """Set optional channels to the background value, each with probability ``prob``; one with an image always stays.

    A channel that is background everywhere is a modality that the case lacks: it does not count as one that stays.
    At inference a missing modality arrives as a constant channel, which the z-score turns into the background value:
    the network must have seen exactly that in training.

    Args:
        keys: normalised channel-first images (C, *spatial).
        modalities: names of the channels.
        optional: the names that may be dropped; empty = the transform does nothing.
        prob: probability per optional channel.
        background: the value that the normalisation gives to the background.

    Raises:
        BundleError: an optional name that is not a modality.
    """

    def __init__(
        self,
        keys: Sequence[str],
        modalities: Sequence[str],
        optional: Sequence[str],
        prob: float = 0.2,
        background: float = 0.0,
    ) -> None:
        super().__init__(keys)
        unknown = [name for name in optional if name not in modalities]
        if unknown:
            raise BundleError(
                f"optional_modalities: {unknown[0]} is not a modality of this bundle",
                f"the modalities are {', '.join(modalities)}",
                "correct optional_modalities",
            )
        self.optional = [list(modalities).index(name) for name in optional]
        self.channels = len(modalities)
        self.prob = prob
        self.background = background
        self._drop: list[int] = []

    def randomize(self, data: Any = None) -> None:
        """Draw the channels to drop from an image (C, *spatial)."""
        drop = [channel for channel in self.optional if self.R.rand() < self.prob]
        kept = int(self.R.randint(self.channels))
        present = [channel for channel in range(self.channels) if bool((data[channel] != self.background).any())]
        if present and set(present) <= set(drop):
            drop.remove(present[kept % len(present)])
        self._drop = drop

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        result = dict(data)
        self.randomize(result[self.first_key(result)])
        if self._drop:
            for key in self.key_iterator(result):
                image = result[key].clone()
                image[self._drop] = self.background
                result[key] = image
        return result
