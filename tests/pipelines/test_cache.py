"""The content cache: equal content is one entry, any change of file, argument or code another; none is half."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Lambdad, OneOf, RandFlipd, ScaleIntensityd, SpatialPadd, Transform

import pipelines.manifests.cache as module
from pipelines.manifests import Manifest, case_items
from pipelines.manifests.cache import CaseCache, chain_digest, item_digest
from transforms import CropToForegroundd, ForegroundMaskd, LoadCased, ResampleToSpacingd, ToRASd
from transforms.errors import BundleError, DataError, ResourceError

ITEM = {
    "case": "p01",
    "image": ["/here/flair.nii.gz"],
    "channels": [None],
    "label_values": [[0, 0], [1, 1]],
    "digests": {"image": ["ab12"]},
}


class Ramp(Transform):
    """Stands for reading a file: a ramp of x + 10 y + 100 z, in voxels of 0.5 x 1 x 3 mm at (1, 2, 3) mm."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[str] = []

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        x, y, z = np.meshgrid(np.arange(6), np.arange(5), np.arange(4), indexing="ij")
        affine = torch.diag(torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64))
        affine[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
        ramp = torch.as_tensor(self.factor * (x + 10 * y + 100 * z), dtype=torch.float32)[None]
        label = MetaTensor(torch.ones(1, 6, 5, 4, dtype=torch.uint8), affine=affine)
        image = MetaTensor(torch.cat([ramp, -ramp]), affine=affine)
        return {"case": data["case"], "image": image, "label": label, "statistics": np.array([[1.5, 2.5]], np.float32)}


def chain(spacing: float = 2.0, optional: tuple[str, ...] = (), *more: Any) -> Compose:
    """The deterministic part of a bundle, small."""
    return Compose(
        [
            LoadCased(modalities=("flair", "t1"), optional=optional),
            ToRASd(["image", "label", "mask"]),
            ForegroundMaskd("image"),
            ResampleToSpacingd("image", ["label", "mask", "foreground"], [spacing] * 3),
            CropToForegroundd(["image", "label", "mask", "foreground"]),
            *more,
        ]
    )


@pytest.fixture
def cache(tmp_path: Path) -> CaseCache:
    return CaseCache(tmp_path / "cache", Ramp())


def entries(cache: CaseCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_an_entry_is_made_once_and_equals_the_chain(tmp_path: Path, tiny_cohort: Manifest) -> None:
    item = case_items(tiny_cohort, "train")[0]
    cache = CaseCache(tmp_path, chain())
    first, second = cache.get(item), CaseCache(tmp_path, chain()).get(item)
    assert first == second
    assert len(entries(cache)) == 1
    fresh, whole = chain()(item), second.whole()
    assert whole["case"] == "s0"
    assert whole["subject"] == "s0"
    for key in ("image", "label", "mask", "foreground"):
        torch.testing.assert_close(whole[key].as_tensor(), fresh[key].as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(whole[key].affine, fresh[key].affine, rtol=0, atol=0)
        assert whole[key].dtype == fresh[key].dtype


def test_the_second_time_the_chain_does_not_run(cache: CaseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get(ITEM)
    monkeypatch.setattr(cache, "chain", None)
    assert cache.get(ITEM).array("image").shape == (2, 6, 5, 4)


@pytest.mark.parametrize("change", ["case", "channels", "label_values", "digests", "annotated", "subject"])
def test_whatever_a_case_contributes_makes_another_entry(cache: CaseCache, change: str) -> None:
    cache.get(ITEM)
    other: dict[str, Any] = {
        "case": "p02",
        "channels": [1],
        "label_values": [[0, 0], [2, 1]],
        "digests": {"image": ["cd34"]},  # other bytes in the file
        "annotated": [1],
        "subject": "p",
    }
    cache.get({**ITEM, change: other[change]})
    assert len(entries(cache)) == 2


def test_another_place_is_the_same_entry(cache: CaseCache) -> None:
    cache.get(ITEM)
    cache.get({**ITEM, "image": ["/there/flair.nii.gz"]})
    assert len(entries(cache)) == 1


def test_a_file_that_is_not_used_does_not_count_but_its_absence_does() -> None:
    digests = {"image": ["ab12"], "mask": "ef"}
    with_mask = {**ITEM, "mask": "/here/brain.nii.gz", "digests": digests}
    assert item_digest({**ITEM, "digests": digests}) == item_digest(ITEM)  # the mask is known, and left aside
    assert item_digest(with_mask) != item_digest(ITEM)


def test_an_item_without_digests_is_refused() -> None:
    with pytest.raises(DataError, match="case p01: no file digests"):
        item_digest({key: value for key, value in ITEM.items() if key != "digests"})


def scale(factor: float) -> Callable[[float], float]:
    return lambda value: value * factor


CHANGES = [
    (chain(), chain(1.5)),
    (chain(), chain(2.0, ("t1",))),
    (chain(), chain(2.0, (), ScaleIntensityd("image"))),
    (chain(2.0, (), ScaleIntensityd("image")), chain(2.0, (), ScaleIntensityd("image", maxv=2.0))),
    (Ramp(1.0), Ramp(2.0)),
    (Ramp(0.5), Ramp("0.5")),  # type: ignore[arg-type]
    (Lambdad("image", scale(2.0)), Lambdad("image", scale(3.0))),
    (Lambdad("image", lambda v: v + 1), Lambdad("image", lambda v: v + 2)),
    (Lambdad("image", partial(np.clip, a_min=0)), Lambdad("image", partial(np.clip, a_min=1))),
    (Lambdad("image", Ramp(1.0).__call__), Lambdad("image", Ramp(2.0).__call__)),
    (SpatialPadd("image", (4, 4, 4)), SpatialPadd("image", (4, 4, 5))),
]


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_another_chain_is_another_digest(first: Any, second: Any) -> None:
    assert chain_digest(first) != chain_digest(second)


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_cache as t; print(t.chain_digest(t.CHANGES[2][1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert done.stdout == chain_digest(CHANGES[2][1]) + "\n"


def test_another_library_or_source_is_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = chain_digest(chain())
    with monkeypatch.context() as patch:
        patch.setattr(module, "version", lambda name: "0")
        assert chain_digest(chain()) != before
    with monkeypatch.context() as patch:
        patch.setattr(module, "_source_digest", lambda module: "changed")
        assert chain_digest(chain()) != before
    assert chain_digest(chain()) == before


def test_the_source_digest_covers_what_a_transform_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a helper beside the transform decides what it does: a change there must count
    package = tmp_path / "planted_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("FACTOR = 1\n")
    (package / "thing.py").write_text("from planted_package.helper import FACTOR\n")
    monkeypatch.syspath_prepend(tmp_path)
    import planted_package.thing  # type: ignore[import-not-found]

    module._source_digest.cache_clear()
    before = module._source_digest(planted_package.thing)
    (package / "helper.py").write_text("FACTOR = 2\n")
    module._source_digest.cache_clear()
    assert module._source_digest(planted_package.thing) != before


@pytest.mark.parametrize(
    "random", [RandFlipd("image"), OneOf([ScaleIntensityd("image"), ScaleIntensityd("image", 0, 2)])]
)
def test_a_random_transform_is_refused_by_name(tmp_path: Path, random: Any) -> None:
    with pytest.raises(BundleError, match=type(random).__name__):
        CaseCache(tmp_path, Compose([Ramp(), Compose([random])]))


def test_a_state_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    class Sealed:
        __slots__ = ("value",)

    with pytest.raises(BundleError, match="Sealed in the deterministic chain cannot be described"):
        CaseCache(tmp_path, Compose([Ramp(Sealed())]))  # type: ignore[arg-type]


def test_two_processes_leave_one_valid_entry(cache: CaseCache) -> None:
    context = multiprocessing.get_context("fork")
    both_are_done = context.Barrier(2)

    def build() -> None:
        chain = cache.chain

        def at_the_same_moment(item: dict[str, Any]) -> dict[str, Any]:
            data = chain(item)
            both_are_done.wait(timeout=20)
            return data

        cache.chain = at_the_same_moment
        assert float(cache.get(ITEM).array("image").sum()) == 0.0  # the ramp and its negative

    processes = [context.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (entry,) = cache.folder.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["entry.json", "image.npy", "label.npy", "statistics.npy"]


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("planted")]
)
def test_a_crash_while_building_leaves_nothing(
    cache: CaseCache, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    saved: list[str] = []

    def crash(path: Path, array: np.ndarray) -> None:
        saved.append(str(path))
        if len(saved) == 2:
            raise problem
        path.write_bytes(b"half")

    monkeypatch.setattr(np, "save", crash)
    with pytest.raises(ResourceError if isinstance(problem, OSError) else type(problem)):
        cache.get(ITEM)
    assert entries(cache) == []
    monkeypatch.undo()
    assert cache.get(ITEM).array("label").sum() == 120


def test_a_cache_that_cannot_be_written_names_the_case(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="case p01 cannot be stored"):
        CaseCache(tmp_path / "file", Ramp()).get(ITEM)


def test_a_crop_equals_slicing_and_moves_the_origin(cache: CaseCache) -> None:
    case = cache.get(ITEM)
    crop = case.crop("image", (slice(2, 5), slice(0, 3), slice(1, 4)))
    torch.testing.assert_close(crop.as_tensor(), case.whole()["image"].as_tensor()[:, 2:5, 0:3, 1:4])
    # voxel (2, 0, 1) of 0.5 x 1 x 3 mm from (1, 2, 3) mm lies at (1 + 1, 2 + 0, 3 + 3) mm
    np.testing.assert_allclose(crop.affine[:3, 3], [2.0, 2.0, 6.0])
    np.testing.assert_allclose(crop.affine[:3, :3], np.diag([0.5, 1.0, 3.0]))


def test_a_crop_beyond_the_edge_is_air(cache: CaseCache) -> None:
    case = cache.get(ITEM)
    window = (slice(-2, 2), slice(1, 3), slice(2, 6))  # 2 voxels missing before x = 0, 2 behind z = 3
    image, label = case.crop("image", window), case.crop("label", window)
    assert image.shape == (2, 4, 2, 4)
    assert label.shape == (1, 4, 2, 4)
    torch.testing.assert_close(image[:, 2:, :, :2], case.whole()["image"].as_tensor()[:, 0:2, 1:3, 2:4])
    # the lowest inside: x + 10 y + 100 z at (0, 1, 2) is 210; of the negative, at (1, 2, 3), it is -321
    assert [float(image[0, 0, 0, 0]), float(image[1, 3, 1, 3])] == [210.0, -321.0]
    assert label[0, :, 0, 0].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(image.affine[:3, 3], [1 - 1, 2 + 1, 3 + 6])


def test_memory_maps_are_read_without_a_warning_and_never_written(cache: CaseCache) -> None:
    case = cache.get(ITEM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = case.whole()
        crop = case.crop("image", (slice(0, 2),) * 3)
    assert not case.array("image").flags.writeable
    whole["image"] += 1  # copies: the entry stays as it is
    crop += 1
    assert float(case.array("image").sum()) == 0.0
    assert not isinstance(whole["statistics"], MetaTensor)  # it had no affine
    np.testing.assert_array_equal(whole["statistics"], [[1.5, 2.5]])


def test_an_entry_says_what_it_holds(cache: CaseCache) -> None:
    (entry,) = [cache.get(ITEM).folder]
    content = json.loads((entry / "entry.json").read_text())
    assert set(content["arrays"]) == {"image", "label", "statistics"}
    assert content["values"] == {"case": "p01"}


@pytest.mark.parametrize("how", ["truncated", "longer", "gone", "torn record", "record of another kind"])
def test_a_damaged_entry_is_made_again_and_said(cache: CaseCache, how: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = cache.get(ITEM).whole()
    folder = cache.get(ITEM).folder
    array, record = folder / "image.npy", folder / "entry.json"
    if how == "truncated":
        array.write_bytes(array.read_bytes()[:-1])
    elif how == "longer":
        array.write_bytes(array.read_bytes() + b"0")
    elif how == "gone":
        array.unlink()
    else:
        record.write_text(record.read_text()[:-5] if how == "torn record" else "{}")
    with caplog.at_level(logging.WARNING):
        again = cache.get(ITEM)
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert "case p01 is made again" in warning
    assert ("entry.json" if "record" in how else "image.npy") in warning
    torch.testing.assert_close(again.whole()["image"].as_tensor(), whole["image"].as_tensor(), rtol=0, atol=0)
    caplog.clear()
    cache.get(ITEM)
    assert caplog.records == []
