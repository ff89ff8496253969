"""Run a bundle by MONAI's own ``run``, from wherever the user stands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.preflight.configuration import lint
from pipelines.preflight.keys import refuse_unknown_overrides
from transforms.errors import BundleError

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
PATH_KEYS = (
    "manifest",
    "checkpoint",
    "input",
    "output_dir",
    "runs_dir",
    "cache_dir",
    "landmarks_file",
    "data_root",
    "initial_weights",
    "lesion_head",
    "compare_with",
)


def bundle_root(name: str) -> Path:
    """Return the root of a bundle, given by path or by the name of one in this repository.

    Raises:
        BundleError: neither is a bundle.
    """
    for candidate in (Path(name), BUNDLES / name):
        if (candidate / "configs").is_dir():
            return candidate.resolve()
    known = sorted(path.parent.name for path in BUNDLES.glob("*/configs"))
    raise BundleError(
        f"bundle {name!r}: not found",
        "a bundle is a folder with configs/",
        f"give a path, or one of {', '.join(known)}",
    )


def run_bundle(name: str, config: str, overrides: Mapping[str, Any], variants: Sequence[str] = ()) -> None:
    """Run ``configs/<config>.yaml`` of a bundle, its root being the working directory meanwhile.

    Args:
        name: path or name of the bundle.
        config: ``train``, ``evaluate`` or ``inference``.
        overrides: top-level keys and their values; relative paths count from the caller's folder.
        variants: further configuration files of the bundle, laid over the first.
    """
    from monai.bundle import ConfigParser, run

    root, files, values = _resolved(name, config, overrides, variants)
    with working_directory(root):
        refuse_unknown_overrides(ConfigParser.load_config_files(files), values)
        run(config_file=files, **values)


@contextlib.contextmanager
def bundle_parser(
    name: str, config: str, overrides: Mapping[str, Any], variants: Sequence[str] = ()
) -> Iterator[ConfigParser]:
    """Yield MONAI's parser of a bundle's configuration, linted; work in the bundle's root meanwhile."""
    from monai.bundle import ConfigParser

    root, files, values = _resolved(name, config, overrides, variants)
    with working_directory(root):
        parser = ConfigParser()
        parser.read_config(files)
        refuse_unknown_overrides(parser.get(), values)
        parser.update(values)
        parser.parse()
        lint(parser.get())
        yield parser


def _resolved(
    name: str, config: str, overrides: Mapping[str, Any], variants: Sequence[str]
) -> tuple[Path, list[str], dict[str, Any]]:
    root = bundle_root(name)
    files = [f"configs/{config}.yaml", *variants]
    for file in files:
        if not (root / file).is_file():
            raise BundleError(f"bundle {root}: no {file}", "the file is not there", "check the name")
    values = {key: _absolute(value) if key in PATH_KEYS and value else value for key, value in overrides.items()}
    return root, files, values


def _absolute(paths: Any) -> Any:
    return [absolute(path) for path in paths] if isinstance(paths, (list, tuple)) else absolute(paths)


def absolute(path: Any) -> str:
    """Return a path from the caller's folder as an absolute one."""
    return str(Path(str(path)).expanduser().resolve())


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Work in ``folder`` for a while: macros (``%configs/...``) start from the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
