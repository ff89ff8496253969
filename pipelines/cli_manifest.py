"""The commands ``fiducial manifest ...``: arguments in, one call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from transforms.errors import UsageError


def add_manifest_commands(commands: Any) -> None:
    """Add ``manifest check`` and ``manifest import folder|msd|nnunet`` to the parser of ``fiducial``."""
    manifest = commands.add_parser("manifest", help="make and check data manifests").add_subparsers(
        dest="action", required=True
    )
    check = manifest.add_parser("check", help="validate a manifest and the digest of every file")
    check.add_argument("manifest")
    check.set_defaults(call=_check_manifest)
    kinds = manifest.add_parser("import", help="make a manifest from files").add_subparsers(dest="kind", required=True)

    folder = kinds.add_parser("folder", help="files found by pattern")
    folder.add_argument("root")
    folder.add_argument(
        "--image",
        action="append",
        required=True,
        metavar="MODALITY=PATTERN",
        help="e.g. flair='{subject}/FLAIR.nii.gz'",
    )
    folder.add_argument("--label", metavar="PATTERN")
    folder.add_argument(
        "--mask", action="append", default=[], metavar="ROLE=PATTERN", help="e.g. brain='{subject}/brain.nii.gz'"
    )
    folder.add_argument(
        "--label-name", action="append", default=[], metavar="ID:NAME[=VALUES]", help="e.g. 1:lesion, 1:tumour=1+2+4"
    )
    folder.add_argument("--unit", action="append", default=[], metavar="MODALITY=UNIT", help="e.g. ct=HU")
    folder.add_argument(
        "--optional",
        action="append",
        default=[],
        metavar="KEY",
        help="a modality, mask role or `label` that a case may lack",
    )
    folder.add_argument("--missing", choices=("error", "skip"), default="error")
    folder.set_defaults(call=_import_folder)

    msd = kinds.add_parser("msd", help="a Medical Segmentation Decathlon dataset.json")
    msd.add_argument("dataset_json")
    msd.add_argument("--include-test", action="store_true", help="also the unlabelled test images")
    msd.set_defaults(call=_import_msd)

    nnunet = kinds.add_parser("nnunet", help="an nnU-Net raw folder (imagesTr, labelsTr, dataset.json)")
    nnunet.add_argument("folder")
    nnunet.set_defaults(call=_import_nnunet)

    for kind in (msd, nnunet):
        kind.add_argument(
            "--case-pattern", default="{case}", help="where a case's name holds the subject: {subject}_{session}"
        )
    for kind in (folder, msd, nnunet):
        kind.add_argument("-o", "--output", required=True, help="the manifest to write")
        kind.add_argument("--name", required=kind is folder, help="name of the cohort")
        kind.add_argument("--licence", help="what may be done with the data")
        kind.add_argument("--source", help="where the data come from")
        kind.add_argument(
            "--fractions", type=float, nargs=3, default=(0.7, 0.1, 0.2), metavar=("TRAIN", "VALIDATION", "TEST")
        )
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--folds", type=int)
        for split in ("train", "validation", "test"):
            kind.add_argument(
                f"--{split}", nargs="*", default=[], metavar="SUBJECT", help=f"subjects of the {split} split, by name"
            )


def _split_plan(options: argparse.Namespace) -> Any:
    from pipelines.manifests import SplitPlan

    named = {split: tuple(getattr(options, split)) for split in ("train", "validation", "test")}
    return SplitPlan(tuple(options.fractions), options.seed, options.folds, **named)


def _pairs(values: Sequence[str], option: str) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise UsageError(f"--{option} {value!r}", "expected NAME=VALUE", f"write --{option} NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


def _import_folder(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.manifests import import_folder

    _write(
        import_folder(
            options.root,
            _pairs(options.image, "image"),
            options.label,
            _pairs(options.mask, "mask"),
            options.label_name or (["1:lesion"] if options.label else []),
            name=options.name,
            licence=options.licence or "not stated",
            source=options.source or "not stated",
            units=_pairs(options.unit, "unit"),
            optional=options.optional,
            missing=options.missing,
            split=_split_plan(options),
            progress=_show,
        ),
        options,
    )


def _import_msd(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.manifests import import_msd

    _write(import_msd(options.dataset_json, include_test=options.include_test, **_described(options)), options)


def _import_nnunet(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.manifests import import_nnunet

    _write(import_nnunet(options.folder, **_described(options)), options)


def _described(options: argparse.Namespace) -> dict[str, Any]:
    """Return what both importers of a ``dataset.json`` take beside it."""
    text = {key: getattr(options, key) for key in ("name", "licence", "source", "case_pattern")}
    return {**text, "split": _split_plan(options), "progress": _show}


def _write(manifest: Any, options: argparse.Namespace) -> None:
    from pipelines.manifests import write_manifest
    from pipelines.manifests.describe import describe

    print(describe(write_manifest(manifest, options.output)))


def _show(done: int, total: int, case: str) -> None:
    end = "\n" if done == total else "\r"
    if sys.stderr.isatty():
        print(f"reading {done}/{total} {case:<40}", end=end, file=sys.stderr)


def _check_manifest(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.manifests import load_manifest
    from pipelines.manifests.describe import describe

    print(describe(load_manifest(options.manifest, check="sha256")))
