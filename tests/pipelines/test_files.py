"""A file appears whole or not at all: planted failures of the disk leave what stood there, and nothing beside it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from pipelines.files import sweep_temporaries, write_atomically, write_json
from transforms.errors import ResourceError


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_it_writes_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"old")
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert str(path) in caught.value.what
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize(
    ("where", "step", "failure", "raised"),
    [(Path, "replace", full_disk, ResourceError), (os, "fsync", interrupted, KeyboardInterrupt)],
)
def test_a_failed_rename_or_an_interruption_leaves_the_old_file_and_no_temporary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    step: str,
    failure: Any,
    raised: type[BaseException],
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(where, step, failure)
    with pytest.raises(raised):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder_is_three_lines_too(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"a file")
    with pytest.raises(ResourceError, match="runs/file: cannot be written"):
        write_atomically(tmp_path / "runs" / "file", b"new")


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_fails_its_check_never_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", check=lambda temporary: None)
    seen: list[bytes] = []

    def refuse(temporary: Path) -> None:
        seen.append(temporary.read_bytes())
        assert temporary.parent == path.parent  # else the move could not be atomic
        raise ResourceError("planted")

    with pytest.raises(ResourceError, match="planted"):
        write_atomically(path, b"new", check=refuse)
    assert seen == [b"new"]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_order_is_sync_check_rename_sync_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "file", b"new", check=lambda _: order.append("check"))
    assert order == ["sync file", "check", "rename", "sync folder"]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", ".hidden", "b.tmp", "inner/c"):
        write_atomically(tmp_path / name, b"x")
    kept = sorted(tmp_path.rglob("*"))
    (tmp_path / ".a.0123.tmp").write_bytes(b"half")
    (tmp_path / "inner" / ".c.4567.tmp").write_bytes(b"half")
    assert sweep_temporaries(tmp_path) == 2
    assert sorted(tmp_path.rglob("*")) == kept
    assert sweep_temporaries(tmp_path) == 0
    assert sweep_temporaries(tmp_path / "absent") == 0


def test_json_is_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"dice": 0.1, "n": None})
    assert path.read_text() == '{\n  "dice": 0.1,\n  "n": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"dice": float("nan")})
    assert "0.1" in path.read_text()
