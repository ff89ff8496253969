"""Opening a run: a new one, or one that was interrupted, for one process (or one group of processes) at a time.

Going on exactly needs the same configuration, data, code, libraries and kind of machine. What differs is refused by
name, unless it is acknowledged by name; an acknowledgement stands in the run's record.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from pipelines.files import write_atomically
from pipelines.training.distributed import from_main_process, is_main_process
from pipelines.training.run_folder import create_run, extend_record
from pipelines.training.state import state_files
from transforms.errors import BundleError, UsageError

logger = logging.getLogger(__name__)

MAY_DIFFER = frozenset(
    [
        *("resume", "resume_despite", "run_name", "runs_dir", "cache_dir", "data_root", "manifest", "check_files"),
        *("workers", "device_name", "state_interval", "mlflow_uri", "imports", "initialize", "run", "finalize"),
        *("acknowledge", "thresholds"),
    ]
)
KINDS = ("config", "manifest", "code", "versions", "machine")
RECORDED_AS = {"manifest": "manifest_digest", "code": "code_digest", "versions": "versions", "machine": "machine"}
SHOWN = 60  # characters of a value in a message
WORKERS_END_S = 10.0  # workers of a killed run may hold its lock for some seconds
_LOCKS: dict[Path, FileLock] = {}  # of the runs that this process is in; the system lets go of them when it dies


def open_run(
    runs_dir: str | Path, bundle: str, name: str = "", resume: bool | str = False, ready: Sequence[Any] = ()
) -> Path:
    """Return the folder of the run to train, locked for this process.

    Args:
        runs_dir: run folders stand in ``<runs_dir>/<bundle>``.
        bundle: its name.
        name: of the run; empty = a new name, or with ``resume`` the newest run that is not finished.
        resume: False = a new run; True = go on with one; ``auto`` = go on if there is one, else a new run.
        ready: what must have been built before; its only use is the order in which a configuration is resolved.

    Raises:
        UsageError: there is nothing to resume, or the run is finished; a new run has a name that is taken; another
            process is in the run.
        ResourceError: the folder cannot be made.
    """
    if resume not in (False, True, "auto"):
        raise UsageError(f"resume {resume!r}", "expected True, False or auto", "correct --resume")
    if not is_main_process():
        return Path(from_main_process(""))
    found = interrupted_run(runs_dir, bundle, name) if resume else None
    if found is None and resume is True:
        raise UsageError(
            f"nothing to resume in {Path(runs_dir).resolve() / bundle / str(name)}",
            "there is no run that was interrupted",
            "leave out --resume to start one, or name it with --run_name",
        )
    folder = found or create_run(runs_dir, bundle, name, ready)
    lock(folder, patience_s=WORKERS_END_S if found else 0.0)
    from_main_process(str(folder))
    return folder


def interrupted_run(runs_dir: str | Path, bundle: str, name: str = "") -> Path | None:
    """Return the run called ``name``, or the newest one that was interrupted; None where there is none.

    Raises:
        UsageError: the named run is finished.
    """
    folder = Path(runs_dir).resolve() / bundle
    if name:
        run = folder / str(name)
        if _finished(run):
            raise UsageError(
                f"run {run} is finished",
                f"it trained {_record(run)['outcome']['epochs']} epochs",
                "to train on from its weights, start a new run with --initial_weights",
            )
        return run if run.is_dir() else None
    runs = [path.parent for path in folder.glob("*/record.json") if not _finished(path.parent)]
    return max(runs, key=lambda run: (_last_written(run), run.name), default=None)


def _last_written(run: Path) -> float:
    return max(path.stat().st_mtime for path in [run / "record.json", *state_files(run / "checkpoints")])


def _record(run: Path) -> dict[str, Any]:
    path = run / "record.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _finished(run: Path) -> bool:
    return "outcome" in _record(run)


def lock(folder: Path, patience_s: float = 0.0) -> None:
    """Keep every other process out of a run until ``release``, or until this process ends.

    Raises:
        UsageError: another process is in the run.
    """
    if folder in _LOCKS:
        return
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=patience_s)
    except Timeout:
        raise UsageError(
            f"run {folder} is being trained by another process",
            "two processes would overwrite each other's checkpoints",
            "wait for it, stop it, or choose another --run_name",
        ) from None
    _LOCKS[folder] = held


def release(folder: Path) -> None:
    """Let other processes into a run."""
    held = _LOCKS.pop(folder, None)
    if held is not None:
        held.release()


def refuse_other_setup(
    folder: Path, config: Mapping[str, Any], record: Mapping[str, Any], acknowledged: Sequence[str] = ()
) -> None:
    """Compare what goes on with what was interrupted; note the resumption in the run's record.

    Args:
        folder: of the run.
        config: the resolved configuration now.
        record: what ``record.json`` would say of a new run now.
        acknowledged: kinds of difference that the user accepts: config, manifest, code, versions, machine.

    Raises:
        BundleError: something differs and is not acknowledged.
        UsageError: an acknowledgement of something that is no kind of difference.
    """
    unknown = sorted(set(acknowledged) - set(KINDS))
    if unknown:
        raise UsageError(f"resume_despite {unknown}", f"expected some of {', '.join(KINDS)}", "correct it")
    earlier = _record(folder)
    before = yaml.safe_load((folder / "config.yaml").read_text())
    differences = setup_differences(before, yaml.safe_load(yaml.safe_dump(dict(config))), earlier, record)
    for kind, texts in differences.items():
        if kind not in acknowledged:
            raise BundleError(
                f"run {folder.name}: it cannot go on exactly, its {kind} is another one",
                "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else ""),
                f"restore it, start a new run, or accept it: --resume_despite \"['{kind}']\"",
            )
        logger.warning("resuming although %s differs: %s", kind, "; ".join(texts))
    entry = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": record.get("command"), "despite": differences}
    # what was accepted once is the setup from now on; what it was before stands in the entry
    accepted = {key: record.get(key) for kind, key in RECORDED_AS.items() if kind in differences}
    extend_record(folder, {"resumed": [*earlier.get("resumed", []), entry], **accepted})
    if "config" in differences:  # only once it is on record
        write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())


def setup_differences(
    config_before: Mapping[str, Any],
    config_now: Mapping[str, Any],
    record_before: Mapping[str, Any],
    record_now: Mapping[str, Any],
) -> dict[str, list[str]]:
    """Return, per kind of difference, what differs as texts; nothing where the run can go on exactly."""
    keys = [key for key in {**config_before, **config_now} if key not in MAY_DIFFER]
    configs = (_flat({key: config[key] for key in keys if key in config}) for config in (config_before, config_now))
    found = {
        "config": _differences(*configs),
        "manifest": _differences(*({"digest": r.get(RECORDED_AS["manifest"])} for r in (record_before, record_now))),
        "code": _differences(*({"digest": r.get(RECORDED_AS["code"])} for r in (record_before, record_now))),
        "versions": _differences(record_before.get("versions", {}), record_now.get("versions", {})),
        "machine": _differences(record_before.get("machine", {}), record_now.get("machine", {})),
    }
    return {kind: texts for kind, texts in found.items() if texts}


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested values as one mapping, ``{a: {b: 1}}`` as ``{a#b: 1}``, so that a difference has a short name.

    Lists that are too long for a message are taken apart as well, by position.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and len(str(value)) > SHOWN:
            value = dict(enumerate(value))
        flat |= _flat(value, f"{above}{key}#") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return flat


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
