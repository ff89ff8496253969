"""What ``verify`` lets pass and what it stops: flipped bytes, forged signatures, bundles that would act."""

from __future__ import annotations

import io
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_for_export import CONFIG, FILES, archive_of, new_key, with_sums, zip_of

from pipelines.export.archive import Budget, file_digests, read_archive, write_archive
from pipelines.export.signature import SIGNATURE, SUMS, sums_of
from pipelines.export.verify import verify
from transforms.errors import DataError


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    new_key(folder)
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path) -> bytes:
    return archive_of(with_sums(FILES, keys / "key"))


def written(folder: Path, content: bytes) -> Path:
    path = folder / "bundle.zip"
    path.write_bytes(content)
    return path


# ---- archives ------------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes_from_memory_and_from_disk(tmp_path: Path) -> None:
    on_disk: dict[str, Any] = {}
    for name, content in reversed(FILES.items()):
        on_disk[name] = tmp_path / name.replace("/", "_")
        on_disk[name].write_bytes(content)
        os.utime(on_disk[name], (1e9, 1e9))
    target = io.BytesIO()
    write_archive(on_disk, target)
    assert target.getvalue() == archive_of(FILES)
    assert file_digests(on_disk) == file_digests(FILES)
    with zipfile.ZipFile(target) as archive:  # any tool opens it
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    assert read_archive(written(tmp_path, archive_of(FILES))) == FILES
    assert read_archive(written(tmp_path, archive_of({}))) == {}


def test_the_sums_are_those_of_sha256sum() -> None:
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert sums_of(file_digests({"b": b"", "a": b"hello"})).startswith(f"{digest}  a\n".encode())


@pytest.mark.parametrize(
    "budget", [Budget(total_bytes=1000), Budget(files=3), Budget(name_bytes=10)], ids=["bytes", "files", "names"]
)
def test_beyond_the_budget_nothing_is_read(tmp_path: Path, budget: Budget) -> None:
    with pytest.raises(DataError, match="are allowed"):
        read_archive(written(tmp_path, archive_of(FILES)), budget)


# ---- whole bundles -------------------------------------------------------------------------------------------------


def test_a_signed_bundle_passes_and_names_its_maker(tmp_path: Path, signed: bytes, keys: Path) -> None:
    path = written(tmp_path, signed)
    verified = verify(path, keys / "allowed")
    assert verified.signer == "maker@hospital"
    assert {name: verified.files[name] for name in FILES} == FILES
    assert "SHA256:" in verify(path).signer  # without a list: the key's fingerprint
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    assert verify(folder, keys / "allowed").files == verified.files


def test_an_unsigned_bundle_passes_only_where_that_is_accepted(tmp_path: Path, keys: Path) -> None:
    path = written(tmp_path, archive_of(with_sums(FILES)))
    assert verify(path, unsigned=True).signer == ""
    for options in ({}, {"allowed_signers": keys / "allowed"}, {"allowed_signers": keys / "allowed", "unsigned": True}):
        with pytest.raises(DataError, match="not signed"):
            verify(path, **options)


def test_another_maker_is_refused(tmp_path: Path, keys: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    path = written(tmp_path, archive_of(with_sums(FILES, new_key(stranger, "maker@hospital"))))
    with pytest.raises(DataError, match="nobody in"):
        verify(path, keys / "allowed")
    assert verify(path).signer  # a valid signature, of somebody


def test_a_thousand_flipped_bytes_are_all_found(tmp_path: Path, signed: bytes, keys: Path) -> None:
    """Anywhere: content, list, signature, and the archive's own headers, where unpackers do not look."""
    draw = np.random.default_rng(0)
    path = tmp_path / "bundle.zip"
    unseen = []
    for position, bit in zip(draw.integers(len(signed), size=1000), draw.integers(8, size=1000), strict=True):
        flipped = bytearray(signed)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            verify(path)
        except DataError:
            continue
        unseen.append((int(position), int(bit)))
    assert unseen == []


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b"\0",
        lambda content: content[:-1],
        lambda content: b"#!/bin/sh\n" + content,
        lambda content: b"",
    ],
    ids=["longer", "shorter", "polyglot", "empty"],
)
def test_other_bytes_around_an_archive_are_found(
    tmp_path: Path, signed: bytes, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(DataError, match="refused"):
        verify(written(tmp_path, change(signed)))


@pytest.mark.parametrize("name", sorted(FILES))
def test_in_a_folder_every_changed_missing_or_added_file_is_found(
    tmp_path: Path, signed: bytes, keys: Path, name: str
) -> None:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(signed)) as archive:
        archive.extractall(folder)
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="is not the file that was exported"):
        verify(folder, keys / "allowed")
    file.unlink()
    with pytest.raises(DataError, match="missing"):
        verify(folder, keys / "allowed")
    file.write_bytes(content)
    (folder / "configs" / "extra.yaml").write_text("a: 1")
    with pytest.raises(DataError, match="not listed"):
        verify(folder, keys / "allowed")


# ---- bundles that would act ----------------------------------------------------------------------------------------

MARK = "/tmp/fiducial-was-here"


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def config(text: str, name: str = "configs/inference.yaml") -> dict[str, bytes]:
    return {**FILES, name: text.encode()}


def expression(text: str) -> dict[str, bytes]:
    return config(CONFIG + f'evil: "{text}"\n')


def target(name: str, **arguments: str) -> dict[str, bytes]:
    lines = "".join(f"  {key}: '{value}'\n" for key, value in arguments.items())
    return config(CONFIG + f"evil:\n  _target_: {name}\n{lines}")


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
ACTING: dict[str, dict[str, bytes]] = {
    "os.system": target("os.system", command=f"touch {MARK}"),
    "subprocess": target("subprocess.run", args=f"touch {MARK}"),
    "builtins.exec": target("builtins.exec", _args_="1"),
    "lambda": target("Lambdad", keys="image", func="$print"),
    "saves": target("SaveImaged", keys="image", output_dir="/"),
    "monai's own run": target("monai.bundle.scripts.run"),
    "download": target("monai.apps.utils.download_url", url="x"),
    "our own writer": target("pipelines.files.write_atomically", path=MARK),
    "target by expression": target("$os.system"),
    "debugger": config(CONFIG + "evil: {_target_: RandFlipd, keys: image, _mode_: debug}\n"),
    "import os": config(CONFIG.replace("$import transforms", "$import os")),
    "import in an expression": expression(f"$__import__('os').system('touch {MARK}')"),
    "eval": expression("$eval('1')"),
    "open": expression(f"$open('{MARK}', 'w')"),
    "dunder": expression("$().__class__.__bases__[0].__subclasses__()"),
    "module of a module": expression(f"$training.run.os.system('touch {MARK}')"),
    "what a module imported": expression("$training.Path('/').exists()"),
    "private": expression("$training._secret()"),
    "lambda expression": expression("$(lambda: 1)()"),
    "walrus": expression("$[x := 1, x]"),
    "format string": expression("$'{0.__class__}'.format(1)"),
    "f-string": expression("$f'{training}'"),
    "power": expression("$9 ** 9 ** 9"),
    "repetition": expression("$'x' * 999999 * 999999"),
    "call of a call": expression("$training.device_of('cpu')('x')"),
    "macro outside": config(CONFIG + "evil: '%/etc/passwd::a'\n"),
    "macro above": config(CONFIG + "evil: '%../other.yaml::a'\n"),
    "key that is an expression": config(CONFIG + "'$print(1)': 1\n"),
    "python tag": config(CONFIG + f"evil: !!python/object/apply:os.system ['touch {MARK}']\n"),
    "billion laughs": config(CONFIG + LAUGHS),
    "deep": config("a: " + "[" * 2000 + "]" * 2000),
    "second configuration": config("evil: {_target_: os.system}", "configs/other.yaml"),
    "JSON configuration": config('{"evil": {"_target_": "os.system"}}', "configs/other.json"),
    "logging arguments": config(
        f"[handler_a]\nclass=StreamHandler\nargs=(__import__('os').system('touch {MARK}'),)\n", "configs/logging.conf"
    ),
    "logging class": config("[handler_a]\nclass=handlers.SocketHandler\nargs=()\n", "configs/logging.conf"),
    "pickle": {**FILES, "models/model.pt": pickle.dumps(Payload())},
    "pickle by another name": {**FILES, "models/model.safetensors": pickle.dumps(Payload())},
    "script": {**FILES, "scripts/run.py": f"import os; os.system('touch {MARK}')".encode()},
    "shell": {**FILES, "install.sh": f"touch {MARK}".encode()},
}


@pytest.mark.parametrize("files", ACTING.values(), ids=ACTING)
def test_a_bundle_that_would_act_is_refused_and_does_not_act(
    tmp_path: Path, keys: Path, files: dict[str, bytes]
) -> None:
    """Signed by somebody who is trusted: the scan is what stops it."""
    path = written(tmp_path, archive_of(with_sums(files, keys / "key")))
    with pytest.raises(DataError, match="refused"):
        verify(path, keys / "allowed")
    assert not Path(MARK).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.zip"]


def as_link(entry: zipfile.ZipInfo) -> None:
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def as_deflated(entry: zipfile.ZipInfo) -> None:
    entry.compress_type = zipfile.ZIP_DEFLATED


HOSTILE: dict[str, bytes] = {
    "above": zip_of([("../evil.yaml", b"x")]),
    "far above": zip_of([("configs/../../evil.yaml", b"x")]),
    "absolute": zip_of([("/etc/evil.yaml", b"x")]),
    "backslash": zip_of([("configs\\..\\evil.yaml", b"x")]),
    "drive": zip_of([("C:evil.yaml", b"x")]),
    "device": zip_of([("configs/con.yaml", b"x")]),
    "trailing dot": zip_of([("configs/a.yaml.", b"x")]),
    "line break": zip_of([("configs/a\n.yaml", b"x")]),
    "twice by case": zip_of([("configs/a.yaml", b"x"), ("configs/A.yaml", b"y")]),
    "file and folder": zip_of([("configs", b"x"), ("configs/a.yaml", b"y")]),
    "link": zip_of([("configs/a.yaml", b"/etc/passwd")], as_link),
    "bomb": zip_of([("configs/a.yaml", b"\0" * (50 << 20))], as_deflated),
    "no archive": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="refused"):
        read_archive(written(tmp_path, content))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.zip"]


def test_a_link_in_a_folder_is_refused_and_not_followed(tmp_path: Path, keys: Path) -> None:
    folder = tmp_path / "unpacked"
    for name, content in with_sums(FILES, keys / "key").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "docs" / "more").symlink_to("/etc")
    with pytest.raises(DataError, match="is a link or no file"):
        verify(folder, keys / "allowed")


def test_the_signature_alone_is_not_enough_nor_the_list(tmp_path: Path, keys: Path) -> None:
    signed = with_sums(FILES, keys / "key")
    other = with_sums(config(CONFIG + "more: 1\n"))
    mixed = {**other, SIGNATURE: signed[SIGNATURE]}
    with pytest.raises(DataError, match="does not hold"):
        verify(written(tmp_path, archive_of(mixed)), keys / "allowed")
    changed = {**signed, "LICENSE": b"MIT\n"}
    with pytest.raises(DataError, match="'LICENSE' is not the file"):
        verify(written(tmp_path, archive_of(changed)), keys / "allowed")
    with pytest.raises(DataError, match=SUMS):
        verify(written(tmp_path, archive_of(FILES)), keys / "allowed")


def test_the_real_bundles_pass_the_scan() -> None:
    from pipelines.export.scan import scan_files
    from pipelines.runner import BUNDLES

    for root in sorted(path.parent for path in BUNDLES.glob("*/configs")):
        paths = [path for path in root.rglob("*") if path.is_file() and path.name != ".gitkeep"]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        # it makes the archive and stays in the repository; in an archive it would be one that writes archives
        exporting = files.pop("configs/export.yaml")
        with pytest.raises(DataError, match=r"pipelines\.export\.package"):
            scan_files({**files, "configs/export.yaml": exporting}, root.name)
        scan_files({name: content for name, content in files.items() if not name.startswith("runs/")}, root.name)
        assert "configs/train.yaml" in files
