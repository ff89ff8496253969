"""Data sets over the content cache: balanced patches for training, whole cases for validation.

A sample is a function of (seed, epoch, index) and of nothing else: neither the number of workers nor the order in which
they run can change what the network sees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch.utils.data import Dataset

from pipelines.manifests.cache import CachedCase, CaseCache
from pipelines.progress import progress
from transforms.errors import BundleError, DataError
from transforms.gamma import refuse_gamma_after_normalisation

logger = logging.getLogger(__name__)

MAXIMUM_CENTRES = 20_000  # per class and case: enough to draw from, small enough to read in a millisecond


class PatchCentres:
    """Add to a preprocessed case the voxels on which a patch may be centred: ``centres_<id>``, one array per class.

    Class 0 stands for the foreground of the image (the brain), the others for the labels. At most ``MAXIMUM_CENTRES`` per
    class, evenly spaced through the volume, int32 (n, spatial dims); a class that is absent has none.

    Args:
        label_ids: foreground label ids.
    """

    def __init__(self, label_ids: Sequence[int], label_key: str = "label", foreground_key: str = "foreground") -> None:
        self.label_ids = tuple(label_ids)
        self.label_key = label_key
        self.foreground_key = foreground_key

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        data["centres_0"] = _spread(np.argwhere(np.asarray(data[self.foreground_key])[0] > 0))
        for label in self.label_ids:
            if self.label_key in data:
                data[f"centres_{label}"] = _spread(np.argwhere(np.asarray(data[self.label_key])[0] == label))
        return data


def _spread(coordinates: np.ndarray) -> np.ndarray:
    step = max(1, -(-len(coordinates) // MAXIMUM_CENTRES))
    return coordinates[::step].astype(np.int32)


class PatchDataset(Dataset):
    """Random patches of the training cases, balanced between the labels and the rest of the foreground.

    Args:
        data: items of ``case_items``.
        preparation: the deterministic chain (cached by content).
        transform: the random chain, applied to each patch; may end in a smaller spatial size than the crop.
        cache_dir: folder of the content cache.
        label_ids: foreground labels.
        crop_size: voxels of the crop along each axis; where a case is smaller, the patch is padded by the random chain.
        samples_per_epoch: length of the data set.
        foreground_probability: share of patches centred on a labelled voxel, if the case has one (each class equally
            often); the others are centred anywhere in the image's foreground.
        seed: the run's seed.

    Raises:
        DataError: no case, or no case with a label.
        BundleError: gamma after a signed normalisation in the whole chain.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        preparation: Callable,
        transform: Compose,
        cache_dir: str,
        label_ids: Sequence[int],
        crop_size: Sequence[int],
        samples_per_epoch: int,
        foreground_probability: float = 0.5,
        seed: int = 0,
    ) -> None:
        refuse_gamma_after_normalisation([preparation, transform])
        _refuse_unlabelled(data, "training")
        if not 0 <= foreground_probability <= 1:
            raise BundleError(
                f"foreground_probability {foreground_probability}", "expected a share from 0 to 1", "correct it"
            )
        self.data = list(data)
        self.transform = transform
        self.label_ids = tuple(label_ids)
        self.crop_size = tuple(int(s) for s in crop_size)
        self.samples_per_epoch = int(samples_per_epoch)
        self.foreground_probability = float(foreground_probability)
        self.seed = int(seed)
        self.epoch = 0
        self.cases = prepare(CaseCache(cache_dir, preparation, PatchCentres(label_ids)), self.data, "training")

    def __len__(self) -> int:
        return self.samples_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose samples are drawn (counted from 1 by the trainer)."""
        self.epoch = int(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = np.random.default_rng([self.seed, self.epoch, int(index)])
        case = self.cases[int(draw.integers(len(self.cases)))]
        window = crop_window(self._centre(case, draw), self.crop_size, case.array("image").shape[1:])
        item: dict[str, Any] = {"case": case.values["case"]}
        for key in case.arrays:
            if not key.startswith("centres_"):
                # what has an affine is an image of the case; the rest (its statistics) belongs to the case as a whole
                item[key] = case.crop(key, None if case.affine(key) is None else window)
        self.transform.set_random_state(seed=int(draw.integers(2**31)))
        return self.transform(item)

    def _centre(self, case: CachedCase, draw: np.random.Generator) -> np.ndarray:
        """Return the voxel on which the patch is centred."""
        wanted = draw.random() < self.foreground_probability
        present = [label for label in self.label_ids if len(case.array(f"centres_{label}"))]
        label = present[int(draw.integers(len(present)))] if wanted and present else 0
        centres = case.array(f"centres_{label}")
        return np.asarray(centres[int(draw.integers(len(centres)))])


class VolumeDataset(Dataset):
    """Whole preprocessed cases, from the same cache as the patches, for validation during training.

    Args:
        data: items of ``case_items``; may be empty (no validation then).
        preparation: the deterministic chain.
        transform: what follows on every access (the normalisation).
        cache_dir: folder of the content cache.
        label_ids: foreground labels; the same as in training, so that both share entries.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        preparation: Callable,
        transform: Callable,
        cache_dir: str,
        label_ids: Sequence[int],
    ) -> None:
        if data:
            _refuse_unlabelled(data, "validation")
        self.data = list(data)
        self.transform = transform
        self.cases = prepare(CaseCache(cache_dir, preparation, PatchCentres(label_ids)), self.data, "validation")

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = self.cases[index].whole()
        return self.transform({key: value for key, value in whole.items() if not key.startswith("centres_")})


def prepare(cache: CaseCache, data: Sequence[Mapping[str, Any]], name: str) -> list[CachedCase]:
    """Return every case of ``data`` from the cache, preprocessing what is not there, with progress shown."""
    return [cache.get(item) for item in progress(data, f"preparing {name} cases")]


def crop_window(centre: np.ndarray, size: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the window of ``size`` voxels around ``centre``, moved inside the array; the whole axis where it is shorter.

    The centre stays inside the window. With size 4 on an axis of 10: centre 5 -> 3:7, centre 0 -> 0:4, centre 9 -> 6:10.
    """
    starts = [int(np.clip(c - s // 2, 0, max(length - s, 0))) for c, s, length in zip(centre, size, shape, strict=True)]
    return tuple(slice(a, min(a + s, length)) for a, s, length in zip(starts, size, shape, strict=True))


def _refuse_unlabelled(data: Sequence[Mapping[str, Any]], split: str) -> None:
    if not data:
        raise DataError(
            f"split {split} is empty", "0 cases, at least 1 expected", "import the cohort with a share for it"
        )
    for item in data:
        if item.get("label") is None:
            raise DataError(
                f"case {item.get('case', '')}: key label is missing in split {split}",
                "a case without a label cannot be learnt from",
                "give its label file, or move the case to the test split",
            )


def crop_with_margin(patch_size: Sequence[int], factor: float) -> list[int]:
    """Return the crop to draw for a patch: ``factor`` times as large, rounded up, so that a rotated patch stays inside it."""
    return [-(-int(size * factor * 1000) // 1000) if size > 1 else 1 for size in patch_size]


def collate_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch of plain tensors: image and label stacked, case ids in a list; everything else is left behind."""
    batch: dict[str, Any] = {
        key: torch.stack([torch.as_tensor(np.asarray(sample[key])) for sample in samples]) for key in ("image", "label")
    }
    batch["case"] = [sample["case"] for sample in samples]
    return batch
