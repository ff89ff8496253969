"""Nobody reads around the gate: the same planted file is refused by every importer, by the data sets and by predict."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose

from pipelines.manifests import case_items, import_folder, import_msd, import_nnunet, items_from_path
from pipelines.training import VolumeDataset
from transforms import ForegroundMaskd, LoadCased
from transforms.errors import DataError, find_error

SHAPE = (8, 9, 7)
AFFINE = np.diag([0.5, 1.0, 3.0, 1.0])
TEXT = {"name": "cohort", "licence": "CC0", "source": "generated"}
CASES = tuple(f"p{number}" for number in range(4))
Damage = Callable[[Path], None]


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 5, size=SHAPE).astype(np.float32)


def lesion() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[3:5, 4:6, 2:4] = 1
    return label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four cases, laid out for nnU-Net and, by a second description, for the Decathlon."""
    folder = tmp_path / "cohort"
    for seed, case in enumerate(CASES):
        write(folder / "imagesTr" / f"{case}_0000.nii.gz", image(seed))
        write(folder / "labelsTr" / f"{case}.nii.gz", lesion())
    nnunet = {"channel_names": {"0": "flair"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 4}
    (folder / "dataset.json").write_text(json.dumps({**nnunet, "file_ending": ".nii.gz"}))
    training = [{"image": f"imagesTr/{case}_0000.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in CASES]
    msd = {"name": "cohort", "modality": {"0": "flair"}, "labels": {"0": "background", "1": "lesion"}}
    (folder / "msd").mkdir()
    (folder / "decathlon.json").write_text(json.dumps({**msd, "numTraining": 4, "training": training}))
    return folder


def folder_importer(root: Path) -> None:
    import_folder(root, {"flair": "imagesTr/{case}_0000.nii.gz"}, "labelsTr/{case}.nii.gz", labels=["1:lesion"], **TEXT)


def nnunet_importer(root: Path) -> None:
    import_nnunet(root, **TEXT)


def msd_importer(root: Path) -> None:
    import_msd(root / "decathlon.json", **TEXT)


def predict(root: Path) -> None:
    """As in inference.yaml: items from bare files, then the first transform of every bundle."""
    for item in items_from_path(root / "imagesTr", ["flair"]):
        LoadCased(modalities=["flair"])(item)


IMPORTERS = [folder_importer, nnunet_importer, msd_importer]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def wrong_crc(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])


def with_nan(path: Path) -> None:
    voxels = image(0)
    voxels[1, 2, 3] = np.nan
    write(path, voxels)


def patched(offset: int, layout: str, *values: float) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<" + layout, content, offset, *values)
        path.write_bytes(gzip.compress(bytes(content)))

    return damage


def four_dimensional(path: Path) -> None:
    write(path, np.stack([image(0), image(1)], axis=-1))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (truncated, "truncated"),
    "crc": (wrong_crc, "corrupt"),
    "nan": (with_nan, "NaN"),
    "affine": (patched(280, "12f", *[0.0] * 12), "not invertible"),
    "orientation": (patched(252, "2h", 0, 0), "no orientation"),
    "spacing": (patched(84, "f", 0.0), "spacing"),
    "unit": (patched(123, "B", 3), "micrometres"),
    "four_dimensional": (four_dimensional, "2 channels"),
    "bomb": (patched(42, "3h", 1200, 1200, 1200), "budget"),
    "more_declared": (patched(42, "h", 9), "bytes of voxels"),
    "overflow": (patched(112, "2f", 3e38, 3e38), "infinite"),
}


def refused(act: Callable[[], object], path: Path, word: str) -> None:
    with pytest.raises((DataError, RuntimeError)) as caught:
        act()
    error = find_error(caught.value)
    assert isinstance(error, DataError)
    assert str(path) in error.what
    assert "case p2" in error.what
    assert word in error.why
    assert error.fix


def test_the_sound_cohort_passes_everywhere(root: Path, tmp_path: Path) -> None:
    for entrance in (*IMPORTERS, predict):
        entrance(root)
    assert len(cached(root, tmp_path)()) == 4


def cached(root: Path, folder: Path) -> Callable[[], VolumeDataset]:
    """The data set that validation uses; the manifest is that of the sound files, as if they had decayed since."""
    manifest = import_folder(
        root, {"flair": "imagesTr/{case}_0000.nii.gz"}, "labelsTr/{case}.nii.gz", labels=["1:lesion"], **TEXT
    )
    items = [item for split in ("train", "validation", "test") for item in case_items(manifest, split)]
    chain = Compose([LoadCased(modalities=["flair"]), ForegroundMaskd("image")])
    return lambda: VolumeDataset(items, chain, Compose([]), str(folder / "cache"), [1])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_image_is_refused_everywhere(root: Path, tmp_path: Path, name: str) -> None:
    damage, word = DAMAGE[name]
    path = root / "imagesTr" / "p2_0000.nii.gz"
    dataset = cached(root, tmp_path)
    damage(path)
    for entrance in (*IMPORTERS, predict):
        refused(lambda entrance=entrance: entrance(root), path, word)  # type: ignore[misc]
    refused(dataset, path, word)


def test_a_label_on_another_grid_or_with_other_values_is_refused_everywhere(root: Path, tmp_path: Path) -> None:
    path = root / "labelsTr" / "p2.nii.gz"
    dataset = cached(root, tmp_path)
    shifted = AFFINE.copy()
    shifted[0, 3] = 0.01
    half = lesion().astype(np.float32) / 2
    for voxels, affine, word in (
        (lesion(), shifted, "affine differs by 0.01"),
        (lesion()[:-1], AFFINE, "shape"),
        (lesion() * 7, AFFINE, "7 (8 voxels)"),
        (half, AFFINE, "no integers"),
    ):
        write(path, voxels, affine)
        for entrance in IMPORTERS:
            refused(lambda entrance=entrance: entrance(root), path, word)  # type: ignore[misc]
        refused(dataset, path, word)
