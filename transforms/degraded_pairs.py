"""Degraded pairs as dictionary transforms: at a stated severity for evaluation, at random for training."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform

from transforms.degradation import KINDS, Severity, degrade_pair, severity_of
from transforms.errors import BundleError, DataError
from transforms.fusion import MRI, measure_mri
from transforms.masks import Array, as_numpy, case_name, like, require_finite, require_key, spacing_of

FEWEST_VOXELS = 1000  # of the head in a crop, for the percentiles .5 and 99.5 to mean something


class DegradePaird(MapTransform):
    """Degrade a pair at a stated severity, the same way whenever the same case comes: for evaluation.

    Args:
        keys: pairs (2, X, Y, Z): MRI, and CT in HU; MetaTensor, or an array with ``spacing_mm``. Returned as float32.
        severity: from 0 (nothing) to 3 for every kind, or per kind (``KINDS``): see ``severity_of``; None: of the case.
        severity_key: where the case says it: a level, or strengths by the names of ``Severity``, e.g. {shift_mm: 5}.
        seed: with the name of the scan (``scan``, else ``case``), the seed of everything drawn: a scan at a higher
            severity is more of the same.
        spacing_mm: voxel size along the axes; None = of the affine.

    Raises:
        BundleError: an unknown kind or a severity outside 0 to 3.
        DataError: not two channels in 3D, no spacing, or voxels that are not finite.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        severity: float | Mapping[str, float] | None = None,
        seed: int = 0,
        spacing_mm: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
        severity_key: str = "severity",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.severity = None if severity is None else severity_of(severity)
        self.severity_key = severity_key
        self.seed = seed
        self.spacing_mm = spacing_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the pairs degraded."""
        output = dict(data)
        for key in self.key_iterator(output):
            where = case_name(output, key)
            pair, spacing = checked_pair(output[key], self.spacing_mm, where)
            scan = f"{output.get('scan', output.get('case', where))}"
            rng = np.random.default_rng([self.seed, zlib.crc32(scan.encode())])
            output[key] = like(degrade_pair(pair, spacing, self._severity(output, where), rng), output[key])
        return output

    def _severity(self, data: Mapping[Hashable, Any], where: str) -> Severity:
        if self.severity is not None:
            return self.severity
        stated = require_key(data, self.severity_key, type(self).__name__, "the severities of the evaluation")
        if not isinstance(stated, Mapping):
            return severity_of(float(stated))
        known = {field.name for field in fields(Severity)}
        if not set(stated) <= known:
            raise BundleError(f"{where}: severity {dict(stated)}", f"known: {', '.join(sorted(known))}", "correct it")
        return Severity(**{name: float(value) for name, value in stated.items()})


class RandDegradePaird(RandomizableTransform, MapTransform):
    """Degrade a pair at random: each kind is there with its probability, at a severity of its own; for training.

    It may stand after the crop: what moves into a crop repeats its edge, for beyond it the head goes on. A scale of the
    MRI that was measured before moves as the percentiles of the crop move: noise, bias and thick slices change the
    percentiles of a whole scan in the hospital, and a network that never saw that gives back the wrong grey.

    Args:
        keys: pairs as of ``DegradePaird``; all keys are degraded alike.
        prob: probability of each kind, or per kind (``KINDS``; kinds not named are absent).
        severity: (lowest, highest), drawn uniformly for each kind that is there.
        spacing_mm: voxel size along the axes; None = of the affine.
        percentiles: those of ``MeasurePaird``, whose scale at ``scale_key`` moves; None = it stays.
        mask_key: the head, (1, X, Y, Z).

    Raises:
        BundleError: an unknown kind, a probability outside 0 to 1, or severities outside 0 to 3.
        DataError: as ``DegradePaird``.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        prob: float | Mapping[str, float] = 0.5,
        severity: tuple[float, float] = (0.0, 3.0),
        spacing_mm: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
        percentiles: tuple[float, float] | None = None,
        scale_key: str = "mri_scale",
        mask_key: str = "foreground",
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.percentiles, self.scale_key, self.mask_key = percentiles, scale_key, mask_key
        self.probabilities = dict(prob) if isinstance(prob, Mapping) else dict.fromkeys(KINDS, prob)
        self.range = (float(severity[0]), float(severity[1]))
        for level in self.range:
            severity_of(dict.fromkeys(self.probabilities, level))
        if self.range[0] > self.range[1] or not all(0 <= p <= 1 for p in self.probabilities.values()):
            raise BundleError(
                f"RandDegradePaird: prob {prob}, severity {tuple(severity)}",
                "expected probabilities from 0 to 1 and (lowest, highest)",
                "correct the degradations of the bundle",
            )
        self.spacing_mm = spacing_mm
        self.severity = Severity()
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw which kinds are there, how strong, and the seed of what they draw themselves."""
        super().randomize(None)
        draws = {kind: (self.R.rand(), self.R.uniform(*self.range)) for kind in self.probabilities}
        self._seed = int(self.R.randint(2**31))
        self.severity = severity_of({k: level for k, (draw, level) in draws.items() if draw < self.probabilities[k]})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the pairs degraded."""
        output = dict(data)
        self.randomize()
        for key in self.key_iterator(output):
            pair, spacing = checked_pair(output[key], self.spacing_mm, case_name(output, key))
            rng = np.random.default_rng(self._seed)
            degraded = degrade_pair(pair, spacing, self.severity, rng, outside=None)
            if self.percentiles is not None:
                output[self.scale_key] = self._moved_scale(output, pair[MRI], degraded[MRI])
            output[key] = like(degraded, output[key])
        return output

    def _moved_scale(self, data: Mapping[Hashable, Any], before: np.ndarray, after: np.ndarray) -> np.ndarray:
        name = type(self).__name__
        scale = as_numpy(require_key(data, self.scale_key, name, "MeasurePaird"))
        head = as_numpy(require_key(data, self.mask_key, name, "HeadMaskd"))[0] > 0
        if np.count_nonzero(head) < FEWEST_VOXELS:
            return scale
        assert self.percentiles is not None
        clean, degraded = (measure_mri(mri, head, *self.percentiles) for mri in (before, after))
        moved = scale + degraded - clean
        return moved if moved[1] > moved[0] else scale


def checked_pair(image: Array, spacing_mm: Sequence[float] | None, where: str) -> tuple[np.ndarray, list[float]]:
    """Return a pair (2, X, Y, Z) and its voxel size in mm, or raise ``DataError`` that says what it is instead."""
    pair = as_numpy(image)
    if pair.ndim != 4 or len(pair) != 2:
        raise DataError(where, f"shape {pair.shape}, expected (2, X, Y, Z): MRI and CT", "name two modalities")
    require_finite(pair, where)
    return pair, spacing_of(image, spacing_mm, where)
