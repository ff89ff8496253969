"""Several networks as one: their probabilities are averaged, and where they disagree is kept voxel by voxel.

A member is one network with everything that the configuration wraps around it (windows, precision, flips). Members run
one after another and only sums are kept, so that ten members need no more memory than two.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform

from transforms.errors import BundleError

UNCERTAINTY = ("entropy", "mutual_information")
"""What ``EnsembleInferer`` appends to the probabilities, in this order, and ``SplitUncertaintyd`` takes off again."""


def predictive_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return Shannon's entropy in nats: H(p) = -sum_k p_k ln p_k, with 0 ln 0 = 0; from 0 (certain) to ln K.

    Args:
        probabilities: (B, K, *spatial), summing to 1 over K; (B, 1, *spatial) is the probability of yes against no.

    Returns:
        (B, 1, *spatial), same dtype and device.
    """
    if probabilities.shape[1] == 1:
        return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return torch.special.entr(probabilities).sum(dim=1, keepdim=True)


class EnsembleInferer(Inferer):
    """Mean probabilities of several networks, and on request how uncertain they are.

    With members m = 1 ... M of probabilities p_m and their mean p = 1/M sum_m p_m, in nats:

    * predictive entropy H(p) = -sum_k p_k ln p_k: all the uncertainty there is;
    * mutual information of label and network I = H(p) - 1/M sum_m H(p_m): the part that comes from the members'
      disagreement, which more training data would reduce; 0 <= I <= H(p) <= ln K. What is left of the entropy is
      ambiguity on which the members agree.

    Of one network I is 0. Flips are averaged inside of a member: they are views of the image, not other networks.

    Sources: Houlsby et al., Bayesian active learning for classification and preference learning, arXiv:1112.5745, 2011,
    eq. 2 (I); Depeweg et al., Decomposition of uncertainty in Bayesian deep learning, ICML 2018 (the two parts);
    Lakshminarayanan et al., Deep ensembles, NeurIPS 2017 (mean of probabilities).

    Args:
        inferer: gives probabilities (B, K, *spatial) of one network for an image (B, C, *spatial).
        uncertainty: whether entropy and mutual information are appended as channels K and K + 1.

    Returns:
        (B, K, *spatial) float32, or (B, K + 2, *spatial). ``network`` is one network, or a ``ModuleList`` of members.

    Raises:
        BundleError: an empty list of members.
    """

    def __init__(self, inferer: Inferer, uncertainty: bool = False) -> None:
        super().__init__()
        self.inferer = inferer
        self.uncertainty = uncertainty

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        members = list(network) if isinstance(network, torch.nn.ModuleList) else [network]
        if not members:
            raise BundleError("ensemble without members", "at least one network expected", "name its weights")
        probabilities: torch.Tensor | None = None
        entropies: torch.Tensor | None = None
        for member in members:
            single = self.inferer(inputs, member, *args, **kwargs)
            probabilities = _added(probabilities, single)
            if self.uncertainty:
                entropies = _added(entropies, predictive_entropy(single))
        assert probabilities is not None  # there is a member
        mean = probabilities / len(members)
        if entropies is None:
            return mean
        entropy = predictive_entropy(mean)
        # 0 <= I <= H holds for real numbers; rounding may miss it by 1e-7
        information = torch.minimum((entropy - entropies / len(members)).clamp_min(0), entropy)
        return torch.cat([mean, entropy, information], dim=1)


def _added(total: torch.Tensor | None, single: torch.Tensor) -> torch.Tensor:
    return single.clone() if total is None else total.add_(single)


class SplitUncertaintyd(MapTransform):
    """Take the two channels of :class:`EnsembleInferer` off the probabilities, under keys of their own.

    It stands after the way back to the image's grid, which so resamples probabilities and uncertainty alike.

    Args:
        keys: probabilities and uncertainty (K + 2, *spatial).
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy with probabilities (K, *spatial), and ``entropy`` and ``mutual_information`` (1, *spatial)."""
        result = dict(data)
        for key in self.key_iterator(result):
            channels = result[key]
            if channels.shape[0] <= len(UNCERTAINTY):
                raise BundleError(
                    f"{key}: {channels.shape[0]} channels",
                    "expected probabilities and two channels of uncertainty",
                    "use EnsembleInferer with uncertainty",
                )
            result[key] = channels[: -len(UNCERTAINTY)]
            for number, name in enumerate(UNCERTAINTY, start=channels.shape[0] - len(UNCERTAINTY)):
                result[name] = channels[number : number + 1].clamp_min(0)  # resampling may have rounded below 0
        return result
