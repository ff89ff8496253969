"""From a trained run to one archive: a MONAI bundle with everything that a hospital needs to trust and to run it.

    fiducial export runs/brain_lesion_mri_segmentation/first -o lesion.zip --key ~/.ssh/id_ed25519

The archive and the folder of the same content appear complete or not at all, and have passed ``verify`` before. No time
of the export stands in them: the same run, exported twice by the same code, gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.export.archive import file_digests, write_archive
from pipelines.export.card import render_card
from pipelines.export.checks import RULES
from pipelines.export.formats import FILES, write_formats
from pipelines.export.golden import FIXED, golden_files
from pipelines.export.lock import LICENCES, LOCKS, Pin, read_lock
from pipelines.export.metadata import export_metadata, input_channels, metadata_schema
from pipelines.export.parity import measure_bundle, require_parity
from pipelines.export.privacy import Pseudonyms, pseudonyms_of, refuse_private
from pipelines.export.results import json_bytes, provenance_files, result_files
from pipelines.export.sbom import bill_of_materials, undeclared
from pipelines.export.signature import SIGNATURE, SUMS, sign, sums_of
from pipelines.export.source import TrainedRun, read_run
from pipelines.export.verify import verify
from pipelines.export.wheel import Wheel, build_wheel
from pipelines.preflight.battery import Battery, run_battery
from pipelines.preflight.inspection import TASKS, Inspection
from pipelines.runner import bundle_parser, bundle_root
from pipelines.training.checkpoints import load_weights
from pipelines.training.run_folder import code_digest
from transforms.errors import BundleError, ResourceError, UsageError

logger = logging.getLogger(__name__)

NOISY = ("onnxscript", "onnx_ir", "torch.onnx")  # they say every step of a conversion
REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS, PARITY_FILE = "models/model.safetensors", "models/parity.json"
NOT_EXPORTED = frozenset(["export.yaml", "metadata.json"])  # the first is for a repository, the second is made
NEEDS_WEIGHTS = ("inference.yaml", "evaluate.yaml")
FROM_REPOSITORY = {  # name in the export: name in the repository
    "LICENSE": "LICENSE",
    "CHANGELOG.md": "CHANGELOG.md",
    "docs/hospital.md": "docs/hospital.md",
    "docs/dicom.md": "docs/dicom.md",
    **{f"locks/{name}.txt": f"locks/{name}.txt" for name in LOCKS},
}
REQUIRED = (
    *("LICENSE", "CHANGELOG.md", "configs/inference.yaml", "configs/common.yaml", "configs/metadata.json"),
    *("configs/logging.conf", WEIGHTS, "docs/README.md", "docs/data_license.txt", "docs/metadata.schema.json"),
    *("golden/golden.json", "golden/response.safetensors", "locks/cpu.txt", "locks/cuda.txt"),
    *("sbom/cpu.cdx.json", "sbom/cuda.cdx.json", "provenance/run.json", "provenance/config.json"),
    *("provenance/cohort.json", "provenance/export.json"),
)
_CHECKPOINT = re.compile(r"^checkpoint: ''", re.MULTILINE)
_MANIFEST = re.compile(r"^manifest: \S+", re.MULTILINE)


def export_run(
    run_folder: str,
    output: str,
    manifest: str = "",
    key: str = "",
    formats: Sequence[str] = (),
    parity_scans: str = "",
    acknowledge: Sequence[str] = (),
    out_of_scope: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> Path:
    """Export a run and return the path of the archive.

    Args:
        run_folder: of the run.
        output: the archive to write, NAME.zip; the folder beside it is NAME.
        manifest: of the cohort, if it is not where the run says.
        key: private OpenSSH key to sign with; empty = not signed.
        formats: of the network beside the safetensors: pt2, onnx, torchscript.
        parity_scans: scans, as for ``predict``, on which they are compared with the weights; empty = the golden case.
        acknowledge: findings to accept, ``<rule>: <reason>`` each.
        out_of_scope, limits: sentences of the model card.

    Raises:
        UsageError: no run, no place for the archive, or something stands there already.
        BundleError: the run is not finished, lacks something, or would take names or paths with it; or a format does
            not answer like the weights.
        DataError: the key cannot sign, or the result does not pass ``verify``.
    """
    archive, folder = _places(output)
    run = read_run(run_folder, manifest)
    bundle = bundle_root(str(run.contract.get("bundle", "")))
    pins = {name: _pins(name) for name in LOCKS}
    battery = run_battery(RULES, _inspection(run, bundle, pins["cpu"]), acknowledge)
    battery.raise_if_stopping()
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{archive.name}.", dir=archive.parent) as scratch:
            made = Path(scratch, "bundle")
            _assemble(
                made,
                run,
                bundle,
                pins,
                battery,
                (formats, parity_scans),
                {"out_of_scope": out_of_scope, "limits": limits},
            )
            files = _files(made)
            measured = run.summary is not None
            refuse_incomplete([*files], formats, measured)
            refuse_private(files, _names(run), _places_of_this_machine(run, scratch))
            whole = Path(scratch, "archive.zip")
            _seal(made, files, key, whole)
            verify(whole, unsigned=not key)
            os.replace(made, folder)
            os.replace(whole, archive)
    except OSError as problem:
        raise ResourceError(
            f"export {archive}: cannot be written", str(problem), "free space or fix the permissions"
        ) from problem
    logger.info("exported %s: %d files, %.1f MB%s", archive, len(files) + 1 + bool(key),
                archive.stat().st_size / 1e6, "" if key else ", not signed (--key)")  # fmt: skip
    return archive


def refuse_incomplete(names: Sequence[str], formats: Sequence[str], measured: bool) -> None:
    """R42: refuse an export that lacks a file that it has to have.

    Args:
        names: of its files.
        formats: that were asked for.
        measured: whether the run was evaluated.

    Raises:
        BundleError: names the first file, and counts the others.
    """
    required = [
        *REQUIRED,
        *(f"models/{FILES[name]}" for name in formats),
        *([PARITY_FILE] if formats else []),
    ]
    required += ["results/summary.json", "results/per_case.csv", "results/report.html"] if measured else []
    missing = [name for name in required if name not in names]
    if not any(name.startswith("wheels/") and name.endswith(".whl") for name in names):
        missing.append("wheels/*.whl")
    for part in ("golden/input/", "golden/expected/"):
        if not any(name.startswith(part) for name in names):
            missing.append(part)
    if missing:
        raise BundleError(
            f"R42: the export lacks {missing[0]}",
            f"{len(missing)} of {len(required) + 3} parts are missing: {', '.join(missing)}",
            "restore them in the repository or in the run, then export again",
        )


def with_weights(text: str, where: str) -> str:
    """Return a configuration that uses the weights beside it, and has no cohort of ours as its default.

    Raises:
        BundleError: it has no option ``checkpoint`` to name them with.
    """
    named, times = _CHECKPOINT.subn(f"checkpoint: {WEIGHTS}", text)
    if times != 1:
        raise BundleError(
            f"{where}: no line `checkpoint: ''`",
            "the export names its weights there",
            "add the option, see the contract",
        )
    return _MANIFEST.sub("manifest: ''", named)


def _assemble(
    made: Path,
    run: TrainedRun,
    bundle: Path,
    pins: Mapping[str, list[Pin]],
    battery: Battery,
    formats: tuple[Sequence[str], str],
    words: Mapping[str, Sequence[str]],
) -> None:
    """Write everything into the folder but the sums: first what runs, then what it answers, then what is said of it."""
    metadata = export_metadata(bundle, run.contract, run.summary, pins["cpu"])
    for path in sorted((bundle / "configs").iterdir()):
        if path.name not in NOT_EXPORTED and path.is_file():
            text = path.read_text(encoding="utf-8")
            _write(made, f"configs/{path.name}", with_weights(text, path.name) if path.name in NEEDS_WEIGHTS else text)
    _write(made, "configs/metadata.json", json_bytes(metadata))
    _write(made, WEIGHTS, run.weights.read_bytes())
    _write_all(made, golden_files(made, run.contract))
    if formats[0]:
        _write_formats(made, run.contract, *formats)

    names = _names(run)
    wheel = build_wheel(REPOSITORY)
    licences = json.loads((REPOSITORY / "locks" / LICENCES).read_text())
    _write(made, f"wheels/{wheel.name}", wheel.content)
    for name in LOCKS:
        _write(made, f"sbom/{name}.cdx.json", json_bytes(_bill(pins[name], licences, bundle.name, metadata, wheel)))
    for name, source in FROM_REPOSITORY.items():
        if (REPOSITORY / source).is_file():
            _write(made, name, (REPOSITORY / source).read_bytes())
    _write(made, "docs/data_license.txt", (bundle / "docs" / "data_license.txt").read_bytes())
    _write(made, "docs/metadata.schema.json", json_bytes(metadata_schema(bundle)))
    _write_all(made, result_files(run, names))
    said = {
        "code_digest": code_digest(),
        "weights_sha256": run.weights_sha256,
        "findings": battery.record(),
        "licence_not_declared": {name: undeclared(pins[name], licences) for name in LOCKS},
    }
    _write_all(made, provenance_files(run, names, said))
    card = render_card(run, names, metadata, battery.record(), words, [*_files(made)])
    _write(made, "docs/README.md", card)


def _write_formats(made: Path, contract: Mapping[str, Any], formats: Sequence[str], scans: str) -> None:
    """Write the network in other formats, and what they were measured to differ by; refuse those that differ."""
    with bundle_parser(str(made), "inference", {"device_name": "cpu"}) as parser:
        network = load_weights(parser.get_parsed_content("network_def"), made / WEIGHTS)
        known = {key: value for key, value in FIXED.items() if key in parser.get()}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    write_formats(network, len(input_channels(contract)), contract["patch_size"], made / "models", formats)
    source = Path(scans).expanduser() if scans else made / "golden" / "input"
    record = measure_bundle(made, made / WEIGHTS, source, threads=1, overrides=known)
    require_parity(record)
    _write(made, PARITY_FILE, json_bytes(_numbered(record) if scans else record))


def _numbered(parity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parity record in which cases have numbers: the scans are somebody's."""
    backends = {
        name: {
            **{key: value for key, value in measured.items() if key != "reason"},
            "cases": [{**figures, "case": f"case {n}"} for n, figures in enumerate(measured["cases"], start=1)],
            **({"reason": "beyond a gate"} if "reason" in measured else {}),
        }
        for name, measured in parity["backends"].items()
    }
    return {**parity, "backends": backends}


def _seal(made: Path, files: Mapping[str, Path], key: str, whole: Path) -> None:
    """Add the sums, and the signature where there is a key; write the archive."""
    sums = sums_of(file_digests(files))
    sealed: dict[str, bytes | Path] = {**files, SUMS: sums}
    _write(made, SUMS, sums)
    if key:
        signature = sign(sums, key)
        sealed[SIGNATURE] = signature
        _write(made, SIGNATURE, signature)
    with whole.open("wb") as target:
        write_archive(sealed, target)
        target.flush()
        os.fsync(target.fileno())


def _places(output: str) -> tuple[Path, Path]:
    archive = Path(output).expanduser().resolve()
    if archive.suffix != ".zip":
        raise UsageError(f"output {output!r}", "expected the name of an archive, NAME.zip", "write -o NAME.zip")
    folder = archive.with_suffix("")
    for place in (archive, folder):
        if place.exists():
            raise UsageError(f"{place} exists already", "an export overwrites nothing", "name another, or remove it")
    return archive, folder


def _inspection(run: TrainedRun, bundle: Path, pins: Sequence[Pin]) -> Inspection:
    task = "fusion" if "schedule" in run.contract else "segmentation"
    assert task in TASKS
    return Inspection(
        task=task, bundle=bundle.name, cohort=run.cohort, contract=run.contract, extra={"run": run, "pins": pins}
    )


def _pins(name: str) -> list[Pin]:
    path = REPOSITORY / "locks" / f"{name}.txt"
    if not path.is_file():
        raise BundleError(f"R42: locks/{name}.txt is missing", "an export carries its environment", "make locks")
    return read_lock(path.read_text(), path.name)


def _bill(
    pins: Sequence[Pin], licences: Mapping[str, str], name: str, metadata: Mapping[str, Any], wheel: Wheel
) -> dict[str, Any]:
    digest = file_digests({wheel.name: wheel.content})[wheel.name]
    return bill_of_materials(pins, licences, name, metadata["version"], wheel.package, digest)


def _names(run: TrainedRun) -> Pseudonyms:
    return pseudonyms_of(run.cohort, run.rows)


def _places_of_this_machine(run: TrainedRun, scratch: str) -> list[str]:
    places = [run.folder, run.cohort.root, REPOSITORY, Path.home(), Path.cwd(), Path(scratch)]
    return sorted({f"{place.resolve()}{os.sep}" for place in (*places, Path(tempfile.gettempdir()))})


def _files(made: Path) -> dict[str, Path]:
    return {path.relative_to(made).as_posix(): path for path in sorted(made.rglob("*")) if path.is_file()}


def _write_all(made: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        _write(made, name, content)


def _write(made: Path, name: str, content: bytes | str) -> None:
    path = made / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
