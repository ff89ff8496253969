"""The commands around an exported bundle: ``fiducial export|verify|selftest|state-dict|watch|listen``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pipelines.overrides import overrides_of


def add_hospital_commands(commands: Any) -> None:
    """Add them to the parser of ``fiducial``."""
    _add_export_command(commands)
    _add_verify_command(commands)
    _add_selftest_command(commands)
    _add_state_dict_command(commands)
    _add_watch_command(commands)
    _add_listen_command(commands)


def _add_export_command(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a trained run as one signed archive: weights, configuration, card, locks, golden case",
        description="further --key value pairs override the options of the bundle's configs/export.yaml",
    )
    export.add_argument("run", metavar="RUN", help="a run's folder")
    export.add_argument("-o", "--output", required=True, help="NAME.zip; the folder NAME appears beside it")
    export.add_argument("--key", default="", help="OpenSSH key to sign with")
    export.set_defaults(call=_export, takes_overrides=True)


def _export(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.export.source import bundle_of
    from pipelines.runner import absolute, run_bundle

    named = {"run_folder": absolute(options.run), "output": absolute(options.output)}
    if options.key:
        named["key"] = absolute(options.key)
    run_bundle(bundle_of(named["run_folder"]), "export", {**overrides_of(rest), **named})


def _add_trust_options(command: Any) -> None:
    command.add_argument(
        "bundle", metavar="BUNDLE", help="an exported archive, or the folder that was unpacked from it"
    )
    command.add_argument("--allowed_signers", help="OpenSSH's list of who may sign; without it any signature will do")
    command.add_argument("--unsigned", action="store_true", help="accept a bundle that nobody has signed")


def _add_verify_command(commands: Any) -> None:
    verify = commands.add_parser("verify", help="signature, hashes and a scan of an export, before anything of it runs")
    _add_trust_options(verify)
    verify.add_argument("--unpack", metavar="FOLDER", help="write its files there once it has passed")
    verify.set_defaults(call=_verify)


def _verify(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.export.archive import unpack
    from pipelines.export.verify import verify

    verified = verify(options.bundle, options.allowed_signers, options.unsigned)
    print(f"{options.bundle}: {len(verified.files)} files, signed by {verified.signer or 'nobody'}")
    if options.unpack:
        print(f"unpacked to {unpack(verified.files, options.unpack)}")


def _add_selftest_command(commands: Any) -> None:
    selftest = commands.add_parser(
        "selftest", help="verify an export, then run its golden case: does this copy compute what the original did?"
    )
    _add_trust_options(selftest)
    selftest.add_argument(
        "--backend", action="append", default=[], help="to test; default: every one that is installed"
    )
    selftest.set_defaults(call=_selftest)


def _selftest(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.export.selftest import refuse_failed, selftest, table_of

    tested = selftest(options.bundle, options.backend, options.allowed_signers, options.unsigned)
    print(table_of(tested))
    refuse_failed(tested, options.bundle)


def _add_state_dict_command(commands: Any) -> None:
    state_dict = commands.add_parser("state-dict", help="the weights of an unpacked export for MONAI's ckpt_export")
    state_dict.add_argument("bundle", metavar="FOLDER", help="an unpacked export")
    state_dict.add_argument("-o", "--output", required=True, help="the file to write, by torch.save")
    state_dict.set_defaults(call=_state_dict)


def _state_dict(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.export.state_dict import write_state_dict

    print(write_state_dict(options.bundle, options.output))


def _add_watch_command(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="run a bundle on every DICOM study that is put into a folder",
        description="results in OUT/<study>, studies to IN/done or IN/failed, log in OUT/watch.jsonl; "
        "further --key value pairs override the bundle's hyper-parameters",
    )
    watch.add_argument("incoming", metavar="IN", help="studies are put here: folders, or zip files")
    watch.add_argument("results", metavar="OUT", help="results appear here, complete")
    watch.add_argument("--bundle", required=True, help="a bundle's folder, or the name of one in this repository")
    watch.add_argument("--variant", action="append", default=[], help="a file of the bundle to lay over")
    watch.add_argument("--send_to", default="", metavar="TITLE@HOST:PORT", help="an archive that gets the results")
    watch.add_argument(
        "--settle", type=float, default=10.0, metavar="S", help="seconds without change before it is taken"
    )
    watch.add_argument("--attempts", type=int, default=3, help="at a study, where disk or network fail")
    watch.add_argument("--once", action="store_true", help="end when nothing is left to do")
    watch.set_defaults(call=_watch, takes_overrides=True)


def _watch(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.dicom.detect import require_extra

    require_extra()
    from pipelines.dicom.service import watch_bundle
    from pipelines.dicom.watch import Patience

    patience = Patience(settle_s=options.settle, attempts=options.attempts)
    finished = watch_bundle(
        options.bundle,
        options.incoming,
        options.results,
        overrides_of(rest),
        options.variant,
        options.send_to,
        patience,
        options.once,
    )
    print(f"{finished} studies finished")


def _add_listen_command(commands: Any) -> None:
    listen = commands.add_parser("listen", help="receive DICOM studies (C-STORE) into a folder, for `fiducial watch`")
    listen.add_argument("incoming", metavar="IN", help="where studies appear, one folder each")
    listen.add_argument("--ae_title", default="FIDUCIAL", help="ours; senders must call it")
    listen.add_argument("--caller", action="append", default=[], help="AE title that may send; repeat for several")
    listen.add_argument("--host", default="127.0.0.1", help="address to bind to (default: this machine only)")
    listen.add_argument("--port", type=int, default=11112)
    listen.add_argument("--quiet", type=float, default=30.0, metavar="S", help="seconds without an image: complete")
    listen.set_defaults(call=_listen)


def _listen(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipelines.dicom.detect import require_extra

    require_extra()
    from pipelines.dicom.listener import Limits
    from pipelines.dicom.service import listen

    limits = Limits(quiet_s=options.quiet)
    listen(options.incoming, options.ae_title, options.caller, options.host, options.port, limits)
