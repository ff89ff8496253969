"""Small bundles as archives: a healthy one, and what a thief of trust would make of it."""

from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.export.archive import FILE_MODE, FIXED_TIME, file_digests, write_archive
from pipelines.export.signature import SIGNATURE, SUMS, sign, sums_of

CONFIG = """
imports:
- "$import transforms"
- "$import pipelines.training as training"
spacing: [1.0, 1.0, 2.0]
device: "$training.device_of('cpu')"
crop: "$[size + 8 for size in @spacing if size > 0]"
preprocessing:
  _target_: Compose
  transforms:
  - {_target_: transforms.ToRASd, keys: [image]}
  - {_target_: RandFlipd, keys: image, prob: 0.5}
network: {_target_: pipelines.networks.segmentation_network, dimensions: 3}
"""
FILES = {
    "configs/inference.yaml": CONFIG.encode(),
    "configs/metadata.json": b'{"version": "1.0.0"}',
    "configs/logging.conf": b"[handlers]\nkeys=console\n[handler_console]\nclass=StreamHandler\nargs=(sys.stderr,)\n",
    "models/model.safetensors": bytes(range(256)) * 4,
    "docs/README.md": "Läsionen\n".encode(),
    "LICENSE": b"Apache-2.0\n",
}


@dataclass(frozen=True)
class Exported:
    """A run, its archive, the folder of the same content, and the key that signed it."""

    run: Path
    archive: Path
    folder: Path
    keys: Path


def new_key(folder: Path, name: str = "maker@hospital") -> Path:
    """Make a key pair and the list of allowed signers that holds it."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)], check=True)
    public = (folder / "key.pub").read_text().split()
    (folder / "allowed").write_text(f"{name} {public[0]} {public[1]}\n")
    return key


def with_sums(files: dict[str, bytes], key: Path | None = None) -> dict[str, bytes]:
    sums = sums_of(file_digests(files))
    signed = {} if key is None else {SIGNATURE: sign(sums, key)}
    return {**files, SUMS: sums, **signed}


def archive_of(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    write_archive(files, target)
    return target.getvalue()


def zip_of(entries: list[tuple[str, bytes]], change: Callable[[zipfile.ZipInfo], None] = lambda entry: None) -> bytes:
    """An archive by hand, in which names and modes may be what they like."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries:
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.create_system, entry.external_attr = 3, FILE_MODE << 16
            change(entry)
            archive.writestr(entry, content)
    return target.getvalue()
