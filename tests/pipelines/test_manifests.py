"""A sound manifest loads, writes back byte for byte, and yields items; every way to break one is planted and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifests import case_items, load_manifest, validate_manifest, write_manifest
from transforms.errors import DataError, ResourceError, UsageError

REPOSITORY = Path(__file__).parents[2]


def file_entry(path: str, content: bytes, **more: Any) -> dict[str, Any]:
    return {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content), **more}


def case_of(subject: str, split: str, session: str = "a", **more: Any) -> dict[str, Any]:
    stem = f"{subject}/{session}"
    return {
        "id": f"{subject}_{session}",
        "subject": subject,
        "split": split,
        "spacing": [0.5, 1.0, 3],
        "shape": [5, 4, 3],
        "images": {
            "flair": file_entry(f"{stem}/flair.nii.gz", f"flair {stem}".encode()),
            "t1": file_entry(f"{stem}/t1.nii.gz", f"t1 {stem}".encode()),
        },
        "label": file_entry(f"{stem}/lesion.nii.gz", b"one label for all"),
        "masks": {"brain": file_entry(f"{stem}/brain.nii.gz", b"one mask for all")},
        **more,
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    """Three subjects, one of them scanned twice; t1 is optional and missing once."""
    cases = [case_of("p1", "train"), case_of("p1", "train", "b"), case_of("p2", "validation"), case_of("p3", "test")]
    del cases[2]["images"]["t1"]
    del cases[3]["label"]
    return {
        "schema_version": 1,
        "name": "cohort",
        "licence": "CC-BY-4.0",
        "source": "here",
        "task": "segmentation",
        "root": "data",
        "modalities": [
            {"name": "flair", "unit": "a.u.", "optional": False},
            {"name": "t1", "unit": "a.u.", "optional": True},
        ],
        "labels": [
            {"id": 0, "name": "background", "colour": "#000000", "values": [0]},
            {"id": 1, "name": "lesion", "colour": "#e69f00", "values": [1, 4], "roi": "lesion"},
        ],
        "splits": {"scheme": "explicit"},
        "cases": cases,
    }


def with_folds(raw: dict[str, Any]) -> dict[str, Any]:
    raw["splits"]["folds"] = 2
    for case, fold in zip(raw["cases"][:3], (0, 0, 1), strict=True):
        case["fold"] = fold
    return raw


def save(raw: dict[str, Any], folder: Path) -> Path:
    """Write the manifest and all the files it names."""
    contents = {"flair": "flair {}", "t1": "t1 {}", "lesion": "one label for all", "brain": "one mask for all"}
    for case in raw["cases"]:
        stem = case["images"]["flair"]["path"].rsplit("/", 1)[0]
        for key, content in contents.items():
            path = folder / "data" / stem / f"{key}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.format(stem).encode())
    path = folder / "cohort.json"
    path.write_text(json.dumps(raw))
    return path


def refused(raw: dict[str, Any], *words: str) -> DataError:
    with pytest.raises(DataError) as caught:
        validate_manifest(raw, "cohort.json")
    for word in ("cohort.json", *words):
        assert word in str(caught.value)
    assert caught.value.why
    assert caught.value.fix
    return caught.value


def test_the_schema_stands_once() -> None:
    link = REPOSITORY / "data_manifests" / "schema.json"
    assert link.resolve() == REPOSITORY / "pipelines" / "manifests" / "schema.json"
    assert json.loads(link.read_text())["additionalProperties"] is False


def test_a_manifest_loads(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path), check="sha256")
    assert manifest.root == (tmp_path / "data").resolve()
    assert [case.id for case in manifest.cases] == ["p1_a", "p1_b", "p2_a", "p3_a"]
    assert manifest.cases[0].spacing == (0.5, 1.0, 3.0)
    assert manifest.label_values() == {0: 0, 1: 1, 4: 1}


def test_writing_and_loading_change_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(with_folds(raw), tmp_path))
    again = write_manifest(manifest, tmp_path / "again.json")
    first = (tmp_path / "again.json").read_bytes()
    loaded = load_manifest(tmp_path / "again.json")
    assert loaded == again
    assert loaded.digest == manifest.digest
    write_manifest(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "cohort.json", "data"]


def test_root_is_written_relative_to_the_manifest_or_absolute(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    write_manifest(manifest, tmp_path / "below" / "relative.json")
    write_manifest(manifest, tmp_path / "below" / "absolute.json", absolute_root=True)
    relative = json.loads((tmp_path / "below" / "relative.json").read_text())
    absolute = json.loads((tmp_path / "below" / "absolute.json").read_text())
    assert relative["root"] == "../data"
    assert absolute["root"] == str((tmp_path / "data").resolve())
    assert load_manifest(tmp_path / "below" / "relative.json").root == load_manifest(tmp_path / "cohort.json").root


def test_one_cohort_on_two_machines_has_one_digest(raw: dict[str, Any], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    first = load_manifest(save(raw, here))
    (there / "cohort.json").write_text(json.dumps({**raw, "root": "elsewhere"}))
    second = load_manifest(there / "cohort.json", root=here / "data")
    assert first.digest == second.digest
    assert second.root == first.root


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["cases"][0].update(subject="p9"),
        lambda raw: raw["cases"][0]["images"]["flair"].update(sha256="0" * 64),
        lambda raw: raw["labels"][1].update(values=[1]),
        lambda raw: raw["modalities"].reverse(),
        lambda raw: raw["cases"][0].update(spacing=[0.5, 1.0, 3.5]),
    ],
)
def test_what_matters_changes_the_digest(
    raw: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    before = load_manifest(save(raw, tmp_path), check="none").digest
    raw["cases"].pop(1)
    without = load_manifest(save(raw, tmp_path), check="none").digest
    change(raw)
    assert len({before, without, load_manifest(save(raw, tmp_path), check="none").digest}) == 3


def test_how_a_number_is_written_does_not_change_the_digest(raw: dict[str, Any], tmp_path: Path) -> None:
    first = load_manifest(save(raw, tmp_path)).digest
    raw["cases"][0]["spacing"] = [0.5, 1, 3.0]
    raw["left_out"] = []
    assert load_manifest(save(raw, tmp_path)).digest == first


def test_a_failed_write_leaves_nothing(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    write_manifest(manifest, tmp_path / "out" / "m.json")
    before = (tmp_path / "out" / "m.json").read_bytes()

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(ResourceError, match="No space left"):
        write_manifest(manifest, tmp_path / "out" / "m.json", absolute_root=True)
    assert (tmp_path / "out" / "m.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.json"]


def test_an_absent_manifest_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.json"):
        load_manifest(tmp_path / "nothing.json")


def test_an_unknown_check_names_the_nearest(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'sha256'"):
        load_manifest(save(raw, tmp_path), check="sha265")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": }', ["line 1", "not JSON"]),
        ("[1, 2]", ["list", "expected an object"]),
        ('{"name": "a", "name": "b"}', ["'name'", "2 times"]),
        ('{"cases": [{"id": "p7", "split": "train", "split": "test"}]}', ["'split'", "p7"]),
        ('{"size": NaN}', ["NaN"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "cohort.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_manifest(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets the value at the path ``keys[:-1]`` to ``keys[-1]``."""

    def change(raw: dict[str, Any]) -> None:
        target: Any = raw
        for key in keys[:-2]:
            target = target[key]
        target[keys[-2]] = keys[-1]

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        target: Any = raw
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("licence"), ["key /licence", "no such key"]),
        (put("schema_version", 2), ["key /schema_version", "found 2", "const 1"]),
        (put("lables", []), ["key /lables", "did you mean 'labels'"]),
        (put("cases", 1, "splitt", "train"), ["case p1_b", "key /cases/1/splitt", "did you mean 'split'"]),
        (put("cases", 2, "split", "valid"), ["case p2_a", "key /cases/2/split", '"valid"', '"validation"']),
        (put("cases", 0, "images", {}), ["case p1_a", "key /cases/0/images", "minProperties"]),
        (put("cases", 0, "images", "flair", "sha256", "abc"), ["/cases/0/images/flair/sha256", "64 lower-case"]),
        (put("cases", 0, "images", "flair", "path", "/etc/passwd"), ["/cases/0/images/flair/path", "never leaving"]),
        (put("cases", 0, "images", "flair", "path", "a/../../b"), ["/cases/0/images/flair/path", "never leaving"]),
        (put("cases", 0, "images", "flair", "path", "a\\b"), ["/cases/0/images/flair/path", "forward slashes"]),
        (put("cases", 0, "images", "flair", "size", 0), ["/cases/0/images/flair/size", "minimum 1"]),
        (put("cases", 0, "spacing", [1.0, 0.0, 1.0]), ["case p1_a", "key /cases/0/spacing/1", "exclusiveMinimum 0"]),
        (put("cases", 0, "shape", [5, 4]), ["/cases/0/shape", "minItems 3"]),
        (put("cases", 0, "id", "a/b"), ["/cases/0/id", "slash"]),
        (put("cases", 3, "case without keys"), ["case number 3", "key /cases/3"]),
        (put("labels", 1, "colour", "red"), ["key /labels/1/colour", "#rrggbb"]),
        (put("labels", 1, "values", []), ["key /labels/1/values"]),
        (put("cases", []), ["key /cases", "minItems"]),
    ],
)
def test_the_schema_names_case_and_key(
    raw: dict[str, Any], change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    change(raw)
    refused(raw, *words)


def test_a_slash_in_a_modality_is_escaped_in_the_pointer(raw: dict[str, Any]) -> None:
    raw["cases"][0]["images"]["flair/2"] = {}
    refused(raw, "/cases/0/images/flair~12/path")


def test_several_schema_errors_are_counted(raw: dict[str, Any]) -> None:
    for case in raw["cases"]:
        case["split"] = "training"
    refused(raw, "/cases/0/split", "3 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("cases", 1, "id", "p1_a"), ["case p1_a", "/cases/1/id", "two cases"]),
        (put("cases", 1, "split", "test"), ["case p1_b", "/cases/1/split", "leakage", "'p1'", "in test", "in train"]),
        (
            put("cases", 3, "images", "flair", "sha256", hashlib.sha256(b"flair p1/a").hexdigest()),
            ["case p3_a", "/cases/3/images/flair", "leakage", "flair of case p1_a in train"],
        ),
        (put("cases", 0, "images", "t2", file_entry("t2.nii", b"t2")), ["case p1_a", "/cases/0/images/t2", "'t1'"]),
        (drop("cases", 2, "images", "flair"), ["case p2_a", "/cases/2/images"]),
        (put("labels", 1, "values", [0, 1]), ["/labels/1", "value 0", "'background'"]),
        (put("labels", 1, "id", 0), ["/labels/1", "id 0"]),
        (put("labels", 1, "name", "background"), ["/labels/1", "name 'background'"]),
        (drop("labels", 0), ["/labels", "expected id 0"]),
        (put("modalities", 1, "name", "flair"), ["/modalities/1/name", "'flair'", "twice"]),
        (put("modalities", 0, "optional", True), ["/modalities", "optional"]),
        (put("cases", 0, "annotated", [0, 5]), ["case p1_a", "/cases/0/annotated", "[5]"]),
        (put("cases", 0, "fold", 0), ["case p1_a", "/cases/0/fold", "expected no fold"]),
    ],
)
def test_what_contradicts_itself_is_refused(
    raw: dict[str, Any], change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    change(raw)
    refused(raw, *words)


def test_a_required_modality_that_is_missing_is_named(raw: dict[str, Any]) -> None:
    raw["modalities"][1]["optional"] = False
    refused(raw, "case p2_a", "/cases/2/images", "'t1'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("cases", 1, "fold", 1), ["case p1_b", "leakage", "fold 1", "fold 0"]),
        (drop("cases", 2, "fold"), ["case p2_a", "/cases/2/fold", "found no fold"]),
        (put("cases", 2, "fold", 2), ["case p2_a", "fold 2", "from 0 to 1"]),
        (put("cases", 3, "fold", 0), ["case p3_a", "expected no fold"]),
    ],
)
def test_folds_are_checked_like_splits(
    raw: dict[str, Any], change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    with_folds(raw)
    validate_manifest(raw)
    change(raw)
    refused(raw, *words)


def test_an_empty_training_split_is_refused_unless_all_is_test(raw: dict[str, Any]) -> None:
    raw["cases"] = raw["cases"][2:]
    refused(raw, "/cases", "training split is empty")
    raw["cases"][0]["split"] = "test"
    validate_manifest(raw)


def test_the_same_label_and_mask_in_two_splits_are_no_leakage(raw: dict[str, Any]) -> None:
    entries = {case["masks"]["brain"]["sha256"] for case in raw["cases"]}
    assert len(entries) == 1
    validate_manifest(raw)


def test_missing_files_are_counted_and_the_first_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    path = save(raw, tmp_path)
    (tmp_path / "data/p1/b/flair.nii.gz").unlink()
    (tmp_path / "data/p2/a/lesion.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        load_manifest(path)
    # 4 flair + 3 t1 + 3 labels + 4 masks
    for word in ("p1/b/flair.nii.gz", "case p1_b", "images/flair", "2 of the 14 files"):
        assert word in str(caught.value)
    assert load_manifest(path, check="none").name == "cohort"


def test_a_changed_size_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    path = save(raw, tmp_path)
    (tmp_path / "data/p2/a/brain.nii.gz").write_bytes(b"short")
    with pytest.raises(DataError, match=r"case p2_a, key masks/brain(.|\n)*5 bytes, the manifest records 16"):
        load_manifest(path)


def test_changed_bytes_of_the_same_size_need_the_digest(raw: dict[str, Any], tmp_path: Path) -> None:
    path = save(raw, tmp_path)
    (tmp_path / "data/p3/a/flair.nii.gz").write_bytes(b"FLAIR p3/a")
    load_manifest(path, check="size")
    with pytest.raises(DataError, match=r"case p3_a, key images/flair(.|\n)*sha256"):
        load_manifest(path, check="sha256")


def test_items_of_a_split(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    item = case_items(manifest, "train")[0]
    root = (tmp_path / "data").resolve()
    assert [item["case"], item["subject"]] == ["p1_a", "p1"]
    assert item["image"] == [str(root / "p1/a/flair.nii.gz"), str(root / "p1/a/t1.nii.gz")]
    assert item["channels"] == [None, None]
    assert item["label"] == str(root / "p1/a/lesion.nii.gz")
    assert item["mask"] == str(root / "p1/a/brain.nii.gz")
    assert item["label_values"] == [[0, 0], [1, 1], [4, 1]]
    assert item["digests"]["image"][1] == hashlib.sha256(b"t1 p1/a").hexdigest()
    assert set(item["digests"]) == {"image", "label", "mask"}
    assert json.loads(json.dumps(item)) == item


def test_modalities_choose_and_order_the_channels(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    item = case_items(manifest, "validation", modalities=["t1", "flair"], label_key="lesion")[0]
    assert item["image"][0] is None
    assert item["image"][1].endswith("p2/a/flair.nii.gz")
    assert item["digests"]["image"][0] is None
    assert "label" not in item
    assert item["lesion"].endswith("p2/a/lesion.nii.gz")
    assert item["digests"]["lesion"] == hashlib.sha256(b"one label for all").hexdigest()


def test_what_a_case_lacks_its_item_lacks(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["cases"][3]["masks"] = {}
    raw["cases"][3]["annotated"] = [0, 1]
    raw["cases"][3]["images"]["flair"]["channel"] = 2
    item = case_items(load_manifest(save(raw, tmp_path)), "test")[0]
    assert not {"label", "mask"} & set(item)
    assert set(item["digests"]) == {"image"}
    assert item["annotated"] == [0, 1]
    assert item["channels"] == [2, None]


def test_folds_replace_train_and_validation(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(with_folds(raw), tmp_path))

    def ids(split: str, fold: int) -> list[str]:
        return [item["case"] for item in case_items(manifest, split, fold=fold)]

    assert ids("validation", 0) == ["p1_a", "p1_b"] == ids("train", 1)
    assert ids("validation", 1) == ["p2_a"] == ids("train", 0)
    assert ids("test", 0) == ids("test", 1) == ["p3_a"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("fold", [2, -1])
def test_a_fold_that_is_not_stored_is_refused(raw: dict[str, Any], tmp_path: Path, split: str, fold: int) -> None:
    manifest = load_manifest(save(with_folds(raw), tmp_path))
    with pytest.raises(UsageError, match=rf"fold {fold}(.|\n)*folds 0 to 1"):
        case_items(manifest, split, fold=fold)


def test_a_fold_without_stored_folds_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stores no folds"):
        case_items(load_manifest(save(raw, tmp_path)), "train", fold=0)


def test_unknown_names_are_refused_with_the_nearest(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    with pytest.raises(UsageError, match="did you mean 'flair'"):
        case_items(manifest, "train", modalities=["flare"])
    with pytest.raises(UsageError, match="did you mean 'train'"):
        case_items(manifest, "training")


def test_no_training_case_is_an_error_and_no_validation_case_is_not(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["cases"] = raw["cases"][3:]
    manifest = load_manifest(save(raw, tmp_path))
    assert case_items(manifest, "validation") == []
    assert len(case_items(manifest, "test")) == 1
    with pytest.raises(DataError, match="split train"):
        case_items(manifest, "train")


def test_a_manifest_that_contradicts_itself_is_not_written(raw: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(save(raw, tmp_path))
    with pytest.raises(DataError, match="two cases have this id"):
        write_manifest(replace(manifest, cases=manifest.cases + manifest.cases[:1]), tmp_path / "broken.json")
    assert not (tmp_path / "broken.json").exists()
