"""The command ``fiducial``: arguments in, one call, exit code out.

fiducial demo
fiducial manifest import folder ROOT --image flair='{subject}/FLAIR.nii.gz' --label '{subject}/lesion.nii.gz' ...
fiducial check brain_lesion_mri_segmentation --manifest cohort.json
fiducial train brain_lesion_mri_segmentation --manifest cohort.json --max_epochs 50
fiducial evaluate brain_lesion_mri_segmentation --manifest cohort.json
fiducial predict brain_lesion_mri_segmentation -i scans/ -o masks/
fiducial report runs/brain_lesion_mri_segmentation/first runs/brain_lesion_mri_segmentation/second -o comparison/
fiducial train brain_lesion_mri_segmentation --manifest cohort.json --resume True
fiducial train brain_lesion_mri_segmentation --manifest cohort.json --folds 5 --run_name cv
fiducial predict brain_lesion_mri_segmentation -i scans/ -o masks/ --ensemble cv --uncertainty True
fiducial watch incoming/ results/ --bundle brain_lesion_mri_segmentation
fiducial export runs/brain_lesion_mri_segmentation/first -o lesion.zip --key ~/.ssh/id_ed25519
fiducial verify lesion.zip --allowed_signers signers --unpack lesion/
fiducial selftest lesion/ --allowed_signers signers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipelines.cli_hospital import add_hospital_commands
from pipelines.cli_manifest import add_manifest_commands
from pipelines.explain import report
from pipelines.overrides import overrides_of
from transforms.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})  # half a word would be accepted in silence

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", "the arguments do not fit", f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (0, or as in ``transforms.errors``)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, rest = _parser().parse_known_args(given)
        if rest and not getattr(options, "takes_overrides", False):
            raise UsageError(f"unknown argument {rest[0]!r}", f"{options.command} does not have it", "see --help")
        options.call(options, rest)
    except (Exception, KeyboardInterrupt) as problem:
        return report(problem, debug="--debug" in given)
    return 0


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
    _add_check_command(commands)
    add_manifest_commands(commands)
    _add_report_command(commands)
    _add_landmarks_command(commands)
    _add_find_rate_command(commands)
    _add_replay_command(commands)
    _add_phantom_command(commands)
    add_hospital_commands(commands)
    demo = commands.add_parser("demo", help="generate the head cohort; train, evaluate and predict on it")
    demo.add_argument("--folder", default="demo", help="where cohort, runs and results go (default: demo)")
    demo.set_defaults(call=_demo)
    return parser


_FOLDS = {
    "train": "a run <run_name>_fold<k> per fold stored in the manifest; repeat the command to go on",
    "evaluate": "every fold by its own network, in one table",
}


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
    if name == "train":
        command.add_argument("--config", help="another training of the bundle: configs/<CONFIG>.yaml")
    if name in ("train", "evaluate"):
        command.add_argument("--folds", type=int, help=f"cross-validation: {_FOLDS[name]}")
    if name == "predict":
        command.add_argument(
            "-i", "--input", required=True, help="NIfTI: file, case folder, folder of cases; DICOM: folder, zip, file"
        )
        command.add_argument("-o", "--output_dir", required=True, help="where the results go; of DICOM they are DICOM")
    command.set_defaults(call=_run_bundle, config=config, takes_overrides=True)


def _run_bundle(options: argparse.Namespace, rest: Sequence[str]) -> None:
    overrides = overrides_of(rest)
    if getattr(options, "folds", None) is not None:
        _cross_validate(options, overrides)
        return
    if options.command == "predict" and _predicts_dicom(options, overrides):
        return
    from pipelines.runner import run_bundle

    named = {key: getattr(options, key) for key in ("input", "output_dir") if hasattr(options, key)}
    run_bundle(options.bundle, options.config, {**overrides, **named}, options.variant)


def _predicts_dicom(options: argparse.Namespace, overrides: dict[str, Any]) -> bool:
    """Predict on DICOM if the input is that; return whether it was."""
    from pipelines.dicom.detect import is_dicom, require_extra

    if not is_dicom(options.input):
        return False
    require_extra()
    from pipelines.dicom.predict import check_request, predict_dicom

    request = check_request(options.bundle, overrides, options.variant)
    for path in predict_dicom(request, options.input, options.output_dir, print):
        print(path)
    return True


def _add_check_command(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="run the preflight without training: findings as a table, a page and JSON",
        description="exit code 0, or 3 (data) or 4 (configuration) of the first error that is not acknowledged; "
        "further --key value pairs override the bundle's hyper-parameters",
    )
    check.add_argument("bundle", help="a bundle's folder, or the name of one in this repository")
    check.add_argument(
        "-o", "--output", help="folder for preflight.html and preflight.json (default: preflight/BUNDLE)"
    )
    check.add_argument("--config", default="train", help="another training of the bundle: configs/<CONFIG>.yaml")
    check.add_argument("--variant", action="append", default=[], help="a file of the bundle to lay over")
    check.add_argument("--smoke", action="store_true", help="also the rules that run real steps, under a minute")
    check.add_argument(
        "--memory", type=float, metavar="GB", help="that the suggestions may use (default: the GPU's, or 8)"
    )
    check.set_defaults(call=_check, takes_overrides=True)


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    overrides = overrides_of(rest)
    from pipelines.preflight.check import Asked, check_bundle

    asked = Asked(options.bundle, options.config, overrides, options.variant, options.smoke, options.memory)
    check_bundle(asked, options.output)


def _cross_validate(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from pipelines.cross_validation import evaluate_folds, train_folds

    run = train_folds if options.command == "train" else evaluate_folds
    run(options.bundle, options.folds, overrides, options.variant)


def _add_report_command(commands: Any) -> None:
    report = commands.add_parser("report", help="one HTML file of a run's results, or of several runs side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a metrics folder")
    report.add_argument("-o", "--output", help="folder for the report; of a single run by itself: report/ in the run")
    report.set_defaults(call=_report)


def _report(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.reports import write_report

    print(write_report(options.runs, options.output))


def _add_landmarks_command(commands: Any) -> None:
    landmarks = commands.add_parser("landmarks", help="fit histogram landmarks on a cohort's training split")
    landmarks.add_argument("bundle")
    landmarks.add_argument("-o", "--output", required=True, help="the landmarks file to write (JSON)")
    landmarks.set_defaults(call=_landmarks, takes_overrides=True)


def _landmarks(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.training.landmarks import fit_landmarks_of_bundle

    print(fit_landmarks_of_bundle(options.bundle, options.output, overrides_of(rest)))


def _add_find_rate_command(commands: Any) -> None:
    find_rate = commands.add_parser("find-rate", help="learning-rate range test: the loss against a growing rate")
    find_rate.add_argument("bundle")
    find_rate.add_argument("-o", "--output", required=True, help="folder for rates.csv and its plot")
    find_rate.add_argument("--steps", type=int, default=100, help="steps from the first rate to the last")
    find_rate.set_defaults(call=_find_rate, takes_overrides=True)


def _find_rate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.training.rate_finder import find_rate_of_bundle

    test = find_rate_of_bundle(options.bundle, options.output, overrides_of(rest), options.steps)
    print(f"--learning_rate {test.suggestion:.2g}   (rates and plot in {options.output})")


def _add_replay_command(commands: Any) -> None:
    replay = commands.add_parser("replay", help="run a step again whose loss or gradient was not finite")
    replay.add_argument("batch", help="runs/<bundle>/<run>/batches/batch-....safetensors")
    replay.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="instead of the run's own")
    replay.set_defaults(call=_replay)


def _replay(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.training.replay import replay

    print(replay(options.batch, options.precision))


def _add_phantom_command(commands: Any) -> None:
    phantom = commands.add_parser("phantom", help="generate the embedded head cohort")
    phantom.add_argument("folder")
    phantom.add_argument("--subjects", type=int, default=12)
    phantom.add_argument("--spacing", type=float, nargs=3, default=(2.0, 2.0, 2.0), metavar="MM")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--modalities", nargs="+", default=["flair", "t1", "t2"])
    phantom.add_argument("--pairs", action="store_true", help="clean pairs of each MRI modality and the CT, for fusion")
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
    phantom.add_argument(
        "--tissue_sd", type=float, default=0.015, help="relative spread of every tissue property over subjects"
    )
    phantom.set_defaults(call=_phantom)


def _phantom(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.embedded import head_cohort, pair_cohort
    from pipelines.phantoms import LesionPrior

    lesions = LesionPrior(options.lesion_median, largest_ml=options.lesion_largest, t2_ms=tuple(options.lesion_t2))
    folder, spacing, modalities = Path(options.folder), tuple(options.spacing), options.modalities
    count, seed, spread = options.subjects, options.seed, options.tissue_sd
    if options.pairs:
        manifest = pair_cohort(folder, count, spacing, seed, modalities, lesions, spread)
    else:
        skull = not options.no_skull
        manifest = head_cohort(folder, count, spacing, seed, modalities, skull, lesions, spread)
    print(f"{options.subjects} subjects in {folder}, manifest {manifest.path}")


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.demo import demo

    demo(Path(options.folder))


if __name__ == "__main__":
    sys.exit(main())
