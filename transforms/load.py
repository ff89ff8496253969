"""Read one case of a cohort: every modality as a channel, its label and its brain mask, all proven to lie on one grid.

The item is what ``pipelines.manifests.case_items`` gives: paths, no voxels. Every file passes the ingest gate of
``transforms.nifti``, so a truncated, shifted or mislabelled file stops here, by name, and never reaches a network.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import MetaKeys, SpaceKeys

from transforms.errors import DataError
from transforms.nifti import NiftiHeader, check_same_grid, read_header, read_label, read_voxels

_ABOUT_FILES = ("channels", "digests", "label_values")  # keys of an item that mean nothing once the voxels are there


class LoadCased(Transform):
    """Replace the paths of a case by channel-first ``MetaTensor`` arrays (affine in mm, RAS+ world).

    Args:
        image_key: its value is a list of paths, one per modality, in the order of the network's channels; ``None``
            stands for a modality that this case does not have. Result: (C, X, Y, Z) float32.
        label_keys: label maps; source values are translated to label ids by the item's ``label_values``
            (pairs ``[value, id]``). Result: (1, X, Y, Z) uint8.
        mask_keys: binary masks (voxels > 0.5). Result: (1, X, Y, Z) uint8.
        optional: names of the modalities that may be missing; their channel is then filled with zeros.
        modalities: names of the channels, for messages and for ``optional``.

    Keys that the item does not have, or has as None, are left out, except the image. The item's ``channels`` (same
    length as the image's list) picks one channel of a four-dimensional file.

    Raises:
        DataError: a missing, damaged, non-finite or off-grid file, a label value outside the table, a required modality
            that is absent. The message names file, case and key.
    """

    def __init__(
        self,
        image_key: str = "image",
        label_keys: Sequence[str] = ("label", "reference"),
        mask_keys: Sequence[str] = ("mask",),
        modalities: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        self.image_key = image_key
        self.label_keys = tuple(label_keys)
        self.mask_keys = tuple(mask_keys)
        self.modalities = tuple(modalities)
        self.optional = tuple(optional)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        case = str(item.get("case", ""))
        header, item[self.image_key] = self._read_image(item, case)
        table = dict(item["label_values"]) if item.get("label_values") else None
        for key in (*self.label_keys, *self.mask_keys):
            if item.get(key) is None:
                item.pop(key, None)
                continue
            check_same_grid(header, read_header(item[key], case=case, key=key), case=case, key=key)
            if key in self.label_keys:
                voxels = read_label(item[key], table, case=case, key=key)
            else:
                voxels = (read_voxels(item[key], case=case, key=key) > 0.5).astype(np.uint8)
            item[key] = _with_grid(voxels[None], header)
        return {key: value for key, value in item.items() if key not in _ABOUT_FILES}

    def _read_image(self, item: dict[Hashable, Any], case: str) -> tuple[NiftiHeader, MetaTensor]:
        paths = list(item[self.image_key])
        names = self.modalities or tuple(f"{self.image_key}[{i}]" for i in range(len(paths)))
        picks = list(item.get("channels") or [None] * len(paths))
        self._check_modalities(paths, names, case)
        present = [i for i, path in enumerate(paths) if path is not None]
        header = read_header(paths[present[0]], case=case, key=names[present[0]])
        channels = np.zeros((len(paths), *header.shape[:3]), dtype=np.float32)
        for i in present:
            check_same_grid(header, read_header(paths[i], case=case, key=names[i]), case=case, key=names[i])
            channels[i] = read_voxels(paths[i], channel=picks[i], case=case, key=names[i])
        image = _with_grid(channels, header)
        image.meta[MetaKeys.SPATIAL_SHAPE] = np.asarray(header.shape[:3])
        image.meta["filename_or_obj"] = str(paths[present[0]])
        return header, image

    def _check_modalities(self, paths: list[Any], names: Sequence[str], case: str) -> None:
        if len(paths) != len(names):
            raise DataError(
                f"case {case}: {len(paths)} images for {len(names)} modalities",
                f"expected one file each for {', '.join(names)}",
                "give one file per modality, in this order",
            )
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        required = [name for name in missing if name not in self.optional]
        if required or len(missing) == len(names):
            raise DataError(
                f"case {case}: modality {(required or missing)[0]} is missing",
                f"the bundle needs {', '.join(names)}; optional: {', '.join(self.optional) or 'none'}",
                "add the file, or train a bundle with optional_modalities",
            )


def _with_grid(array: np.ndarray, header: NiftiHeader) -> MetaTensor:
    """Wrap a channel-first array (1 or C, X, Y, Z) with the affine of the file it came from."""
    affine = torch.as_tensor(np.asarray(header.affine), dtype=torch.float64)
    meta = {MetaKeys.ORIGINAL_AFFINE: affine.clone(), MetaKeys.SPACE: SpaceKeys.RAS}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine, meta=meta)
