"""The command ``fiducial``: arguments in, one call, exit code out.

fiducial demo
fiducial manifest import folder ROOT --image flair='{subject}/FLAIR.nii.gz' --label '{subject}/lesion.nii.gz' ...
fiducial train brain_lesion_mri_segmentation --manifest cohort.json --max_epochs 50
fiducial evaluate brain_lesion_mri_segmentation --manifest cohort.json
fiducial predict brain_lesion_mri_segmentation -i scans/ -o masks/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transforms.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})  # half a word would be accepted in silence

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", "the arguments do not fit", f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (0, or as in ``transforms.errors``)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from pipelines.bundles import report

    try:
        options, rest = _parser().parse_known_args(given)
        if rest and not getattr(options, "takes_overrides", False):
            raise UsageError(f"unknown argument {rest[0]!r}", f"{options.command} does not have it", "see --help")
        options.call(options, rest)
    except (Exception, KeyboardInterrupt) as problem:
        return report(problem, debug="--debug" in given)
    return 0


def overrides_of(rest: Sequence[str]) -> dict[str, Any]:
    """Return ``--key value`` and ``--key=value`` pairs, read as MONAI's own command does: Python literals, else text.

    Raises:
        UsageError: a value without a key, or a key without a value.
    """
    from fire.parser import DefaultParseValue

    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs: dict[str, Any] = {}
    for position in range(0, len(words), 2):
        key = words[position]
        if not key.startswith("--") or position + 1 == len(words):
            raise UsageError(f"argument {key!r}", "expected pairs --key value", "write --key value")
        pairs[key[2:]] = DefaultParseValue(words[position + 1])
    return pairs


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fiducial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, config, text in (
        ("train", "train", "train a bundle on a cohort"),
        ("evaluate", "evaluate", "measure trained weights on a split"),
        ("predict", "inference", "segment new images"),
    ):
        _add_bundle_command(commands, name, config, text)
    _add_manifest_commands(commands)
    _add_landmarks_command(commands)
    _add_phantom_command(commands)
    demo = commands.add_parser("demo", help="generate the head cohort; train, evaluate and predict on it")
    demo.add_argument("--folder", default="demo", help="where cohort, runs and results go (default: demo)")
    demo.set_defaults(call=_demo)
    return parser


def _add_bundle_command(commands: Any, name: str, config: str, text: str) -> None:
    command = commands.add_parser(
        name, help=text, description=f"{text}; further --key value pairs override the bundle's hyper-parameters"
    )
    command.add_argument("bundle", help="a bundle's folder, or the name of one in this repository")
    command.add_argument(
        "--variant",
        action="append",
        default=[],
        help="a file of the bundle to lay over, e.g. configs/variant_2_5d.yaml",
    )
    if name == "predict":
        command.add_argument("-i", "--input", required=True, help="NIfTI file, case folder, or folder of cases")
        command.add_argument("-o", "--output_dir", required=True, help="where the masks and volumes go")
    command.set_defaults(call=_run_bundle, config=config, takes_overrides=True)


def _run_bundle(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.runner import run_bundle

    named = {key: getattr(options, key) for key in ("input", "output_dir") if hasattr(options, key)}
    run_bundle(options.bundle, options.config, {**overrides_of(rest), **named}, options.variant)


def _add_manifest_commands(commands: Any) -> None:
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


def _add_landmarks_command(commands: Any) -> None:
    landmarks = commands.add_parser("landmarks", help="fit histogram landmarks on a cohort's training split")
    landmarks.add_argument("bundle")
    landmarks.add_argument("-o", "--output", required=True, help="the landmarks file to write (JSON)")
    landmarks.set_defaults(call=_landmarks, takes_overrides=True)


def _landmarks(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.training.landmarks import fit_landmarks_of_bundle

    print(fit_landmarks_of_bundle(options.bundle, options.output, overrides_of(rest)))


def _add_phantom_command(commands: Any) -> None:
    phantom = commands.add_parser("phantom", help="generate the embedded head cohort")
    phantom.add_argument("folder")
    phantom.add_argument("--subjects", type=int, default=12)
    phantom.add_argument("--spacing", type=float, nargs=3, default=(2.0, 2.0, 2.0), metavar="MM")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--modalities", nargs="+", default=["flair", "t1", "t2"])
    phantom.add_argument("--no-skull", action="store_true", help="the brain alone, as after skull stripping")
    phantom.add_argument("--lesion_median", type=float, default=2.0, metavar="ML", help="median volume per subject")
    phantom.add_argument("--lesion_largest", type=float, default=20.0, metavar="ML", help="largest volume per subject")
    phantom.add_argument(
        "--lesion_t2",
        type=float,
        nargs=2,
        default=(150.0, 150.0),
        metavar="MS",
        help="T2 of a subject's lesions is drawn between these: 90 is faint in FLAIR, 150 bright",
    )
    phantom.set_defaults(call=_phantom)


def _phantom(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.demo import head_cohort
    from pipelines.phantoms import LesionPrior

    folder, spacing = Path(options.folder), tuple(options.spacing)
    lesions = LesionPrior(options.lesion_median, largest_ml=options.lesion_largest, t2_ms=tuple(options.lesion_t2))
    modalities, skull = options.modalities, not options.no_skull
    manifest = head_cohort(folder, options.subjects, spacing, options.seed, modalities, skull, lesions)
    print(f"{options.subjects} subjects in {folder}, manifest {manifest.path}")


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.demo import demo

    demo(Path(options.folder))


if __name__ == "__main__":
    sys.exit(main())
