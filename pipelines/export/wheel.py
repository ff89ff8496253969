"""The code that a bundle needs, as a wheel whose bytes follow from the sources.

Built by the project's own build backend from a copy of the sources, then packed again: with one time, one mode, in the
order of the names, and without compression, which differs between versions of zlib.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.export.archive import write_archive
from transforms.errors import BundleError

PACKAGES = ("pipelines", "transforms")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
_EPOCH = "315532800"  # 1980-01-01, the earliest that a zip file knows


@dataclass(frozen=True)
class Wheel:
    """A wheel: its file name and its bytes."""

    name: str
    content: bytes

    @property
    def package(self) -> tuple[str, str]:
        """Name and version of the package in it."""
        name, version, *_ = self.name.split("-")
        return name, version


def build_wheel(root: str | Path) -> Wheel:
    """Return the wheel of the sources in ``root`` (a checkout).

    Raises:
        BundleError: it is no checkout, or the build fails; the message ends with what the build said last.
    """
    root = Path(root)
    absent = [name for name in (*PACKAGES, *BESIDE) if not (root / name).exists()]
    if absent:
        raise BundleError(
            "export: the code's sources are not here",
            f"{', '.join(absent)} missing beside the package: this is an installed copy",
            "export from a checkout of the repository",
        )
    with tempfile.TemporaryDirectory() as scratch:
        copy, out = Path(scratch, "source"), Path(scratch, "out")
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
            shutil.copytree(root / package, copy / package, ignore=ignored)
        for name in BESIDE:
            shutil.copyfile(root / name, copy / name)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        done = subprocess.run(
            [*command, "--wheel-dir", str(out), str(copy)],
            env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        built = sorted(out.glob("*.whl")) if done.returncode == 0 else []
        if len(built) != 1:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise BundleError("export: the wheel cannot be built", last, "install pip and setuptools, then try again")
        return Wheel(built[0].name, _packed_again(built[0]))


def _packed_again(path: Path) -> bytes:
    with zipfile.ZipFile(path) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    target = io.BytesIO()
    write_archive(files, target)
    return target.getvalue()
