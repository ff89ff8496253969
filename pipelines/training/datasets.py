"""Data sets over the content cache: balanced patches for training, whole cases for validation.

A sample is a function of (seed, epoch, index, phase) and of nothing else: neither the number of workers or processes
nor the order in which they run can change what the network sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch.utils.data import Dataset

from pipelines.manifests.cache import CachedCase, CaseCache
from pipelines.progress import progress
from pipelines.training.distributed import share, wait_for_all, world_size
from transforms.errors import BundleError, DataError, find_error
from transforms.gamma import refuse_gamma_after_normalisation

ATTEMPTS = 10  # cases that may fail one after another before a sample is given up
MAXIMUM_CENTRES = 20_000  # per class and case: enough to draw from, small enough to read in a millisecond


class PatchCentres:
    """Add to a preprocessed case the voxels on which a patch may be centred: ``centres_<id>``, one array per class.

    Class 0 stands for the foreground of the image (the brain), the others for the labels. At most ``MAXIMUM_CENTRES``
    per class, evenly spaced through the volume, int32 (n, spatial dims); a class that is absent has none.

    Args:
        label_ids: foreground label ids.

    Raises:
        DataError: no foreground.
    """

    def __init__(self, label_ids: Sequence[int], label_key: str = "label", foreground_key: str = "foreground") -> None:
        self.label_ids = tuple(label_ids)
        self.label_key = label_key
        self.foreground_key = foreground_key

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        data["centres_0"] = _spread(np.argwhere(np.asarray(data[self.foreground_key])[0] > 0))
        if not len(data["centres_0"]):
            raise DataError(
                f"case {data.get('case', '')}: key {self.foreground_key} is empty",
                "0 voxels on which a patch could be centred",
                "check the image and its brain mask",
            )
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
        transform: the random chain, applied to each crop; may end in a smaller spatial size, about the crop's middle.
        cache_dir: folder of the content cache.
        label_ids: foreground labels.
        crop_size: voxels of the crop along each axis; where it reaches beyond the case, it is filled with air.
        foreground_probability: share of patches centred on a labelled voxel, if the case has one (each class equally
            often); the others are centred anywhere in the image's foreground.
        seed: the run's seed.
        patch_size: voxels that the random chain keeps of the crop. The patch stays inside the case while the crop may
            reach beyond it, so that the rim of a case is learnt from too. None = the chain keeps the whole crop.
        on_bad_case: what to do when a case fails in the middle of an epoch: ``stop``, or ``skip`` it, taking another
            and counting (``bad_cases`` of the sample: pairs of case and reason).

    Raises:
        DataError: no case, a case without a label or without foreground; with ``stop``, a case that fails.
        BundleError: gamma after a signed normalisation in the whole chain, a share outside 0 to 1, a patch that is
            larger than the crop or not in its middle.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        preparation: Callable,
        transform: Compose,
        cache_dir: str,
        label_ids: Sequence[int],
        crop_size: Sequence[int],
        foreground_probability: float = 0.5,
        seed: int = 0,
        patch_size: Sequence[int] | None = None,
        on_bad_case: str = "stop",
    ) -> None:
        if on_bad_case not in ("stop", "skip"):
            raise BundleError(f"on_bad_case {on_bad_case!r}", "expected stop or skip", "correct it")
        refuse_gamma_after_normalisation([preparation, transform])
        _refuse_unlabelled(data, "training")
        if not 0 <= foreground_probability <= 1:
            raise BundleError(
                f"foreground_probability {foreground_probability}", "expected a share from 0 to 1", "correct it"
            )
        self.data = list(data)
        self.preparation = preparation
        self.transform = transform
        self.label_ids = tuple(label_ids)
        self.crop_size = tuple(int(s) for s in crop_size)
        self.margin = _margin(self.crop_size, self.crop_size if patch_size is None else patch_size)
        self.foreground_probability = float(foreground_probability)
        self.seed = int(seed)
        self.on_bad_case = on_bad_case
        self.phase = 0
        self.epoch = 0
        self.cases = prepare(CaseCache(cache_dir, preparation, PatchCentres(label_ids)), self.data, "training")

    def set_epoch(self, epoch: int, phase: int = 0) -> None:
        """Choose the epoch whose samples are drawn (counted from 1 by the trainer), and the phase (from 0)."""
        self.epoch, self.phase = int(epoch), int(phase)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = np.random.default_rng([self.seed, self.epoch, int(index), self.phase])
        bad: list[tuple[str, str]] = []
        while True:
            case = self.cases[int(draw.integers(len(self.cases)))]
            try:
                item = self._sample(case, draw)
            except MemoryError:  # not the case's fault
                raise
            except Exception as problem:
                name = str(case.values["case"])
                reason = find_error(problem) or problem
                if self.on_bad_case == "stop" or len(bad) >= ATTEMPTS:
                    raise _bad_case(name, reason) from problem
                bad.append((name, " ".join(f"{type(reason).__name__}: {reason}".split())))
            else:
                item["bad_cases"] = bad
                return item

    def _sample(self, case: CachedCase, draw: np.random.Generator) -> dict[str, Any]:
        window = crop_window(self._centre(case, draw), self.crop_size, case.array("image").shape[1:], self.margin)
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

    Of several processes each has its share; every case belongs to exactly one.

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
        self.preparation = preparation
        self.transform = transform
        self.n_cases = len(data)  # over all processes
        self.cases = share(prepare(CaseCache(cache_dir, preparation, PatchCentres(label_ids)), data, "validation"))

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = self.cases[index].whole()
        return self.transform({key: value for key, value in whole.items() if not key.startswith("centres_")})


def _bad_case(name: str, reason: BaseException) -> DataError:
    if isinstance(reason, DataError):
        return reason
    return DataError(
        f"case {name}: no patch can be made of it",
        f"{type(reason).__name__}: {reason}",
        "remove its entry from the cache, or see the case; on_bad_case: skip goes on without it and counts",
    )


def prepare(cache: CaseCache, data: Sequence[Mapping[str, Any]], name: str) -> list[CachedCase]:
    """Return every case of ``data`` from the cache, preprocessing what is not there, with progress shown.

    Several processes share the work; none goes on before all is there.
    """
    if world_size() > 1:
        for item in share(data):
            cache.get(item)
        wait_for_all()
    return [cache.get(item) for item in progress(data, f"preparing {name} cases")]


def crop_window(
    centre: np.ndarray, size: Sequence[int], shape: Sequence[int], margin: Sequence[int] | None = None
) -> tuple[slice, ...]:
    """Return the window of ``size`` voxels around ``centre``, moved until all but its ``margin`` lies inside the array.

    With size 4 on an axis of 10: centre 5 -> 3:7, centre 0 -> 0:4, centre 9 -> 6:10; with a margin of 1 on either side,
    centre 0 -> -1:3. Where the axis is shorter than the window without its margins, it stands in the window's middle:
    size 6 on an axis of 3 -> -1:5. The centre always stays inside, and never in the margin.
    """
    window = []
    for c, s, length, m in zip(centre, size, shape, margin or [0] * len(size), strict=True):
        room = length - (s - 2 * m)
        start = int(np.clip(c - s // 2, -m, room - m)) if room >= 0 else -((s - length) // 2)
        window.append(slice(start, start + s))
    return tuple(window)


def _margin(crop_size: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    if len(patch_size) != len(crop_size) or any(
        c < p or (c - p) % 2 for c, p in zip(crop_size, patch_size, strict=True)
    ):
        raise BundleError(
            f"patch_size {list(patch_size)}, crop_size {list(crop_size)}",
            "expected a crop that is larger by an even number of voxels: its middle lies between voxels otherwise",
            "take crop_size from crop_with_margin(patch_size, factor)",
        )
    return [(c - p) // 2 for c, p in zip(crop_size, patch_size, strict=True)]


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
    """Return the crop to draw for a patch: ``factor`` times as large or a little more, so that it can be rotated in it.

    The same number of voxels is added on either side: an odd difference would put every voxel of the patch between two
    of the crop, which blurs the image and breaks the label. An axis of one voxel is left alone.
    """
    return [size + 2 * math.ceil(round(size * (factor - 1) / 2, 6)) if size > 1 else 1 for size in patch_size]


def collate_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch of plain tensors: image and label stacked, case ids in a list; everything else is left behind."""
    batch: dict[str, Any] = {
        key: torch.stack([torch.as_tensor(np.asarray(sample[key])) for sample in samples]) for key in ("image", "label")
    }
    batch["case"] = [sample["case"] for sample in samples]
    batch["bad_cases"] = [bad for sample in samples for bad in sample.get("bad_cases", [])]
    return batch
