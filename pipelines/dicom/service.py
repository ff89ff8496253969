"""What runs for days: a bundle on a watched folder, and the listener that fills it."""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dicom.listener import Limits, StoreListener, send
from pipelines.dicom.predict import DicomRequest, check_request, predict_dicom
from pipelines.dicom.watch import FolderWatcher, Patience, Process
from transforms.errors import UsageError

_LOG = logging.getLogger(__name__)
_NO_MATTER = {"device_name", "runs_dir", "run_name", "checkpoint", "ensemble"}  # where: the weights are named
_ARCHIVE = re.compile(r"(?P<title>[^@\\]{1,16})@(?P<host>[^@:\s]+):(?P<port>\d{1,5})")


def watch_bundle(
    bundle: str,
    incoming: str | Path,
    results: str | Path,
    overrides: Mapping[str, Any],
    variants: Sequence[str] = (),
    send_to: str = "",
    patience: Patience | None = None,
    once: bool = False,
) -> int:
    """Run a bundle on every study that is put into a folder, until the process is asked to stop.

    The bundle is checked at once: what is wrong with it must not fail every study.

    SIGTERM ends it after the study in work, an interrupt at once; either way the study is taken up again next time.

    Args:
        bundle: name or path.
        incoming, results: as ``FolderWatcher``.
        overrides, variants: as ``predict_dicom``.
        send_to: archive that gets the results, ``TITLE@host:port``; empty sends nothing.
        patience: how long to wait.
        once: end when nothing is left to do.

    Returns:
        How many studies were finished.

    Raises:
        UsageError: ``send_to`` of another form, or without a word on identity; as ``FolderWatcher``.
        FiducialError: as ``check_request``.
        ResourceError: the folder is watched already.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    address = _ARCHIVE.fullmatch(send_to) if send_to else None
    if send_to and address is None:
        raise UsageError(f"archive {send_to!r}", "expected TITLE@host:port", "for example ARCHIVE@10.0.0.5:104")
    if send_to and "dicom_keep_identity" not in overrides:
        raise UsageError(
            f"archive {send_to!r}: nothing says whether the results carry the patient",
            "a study has one patient; results without are for an archive of studies without",
            "--dicom_keep_identity True for the archive that the studies come from, else False",
        )
    request = check_request(bundle, overrides, variants)
    watcher = FolderWatcher(incoming, results, _process(request, address), patience, _maker(request))
    return watcher.run(once, _stopped_by_signal())


def _maker(request: DicomRequest) -> dict[str, Any]:
    """Return what results depend on beside the study, as JSON has it."""
    given = {**request.overrides, **{f"dicom_{key}": value for key, value in request.options.items()}}
    settings = {key: value for key, value in given.items() if key not in _NO_MATTER}
    about = {"bundle": request.name, "weights": request.weights, "variants": request.variants, "settings": settings}
    return dict(json.loads(json.dumps(about, default=str)))


def _process(request: DicomRequest, address: re.Match[str] | None) -> Process:
    """Return what the watcher does with a study: predict, and send the DICOM results where that is asked for.

    A result that could not be sent is made and sent again; it has the same UIDs, so the archive has it once.
    """

    def process(study: Path, out: Path) -> None:
        written = predict_dicom(request, study, out, scratch=out)  # what a kill leaves is swept with the results
        if address is not None:
            objects = [path for path in written if path.suffix == ".dcm"]
            send(objects, address["host"], int(address["port"]), address["title"])

    return process


def listen(
    incoming: str | Path, ae_title: str, callers: Sequence[str], host: str, port: int, limits: Limits | None = None
) -> None:
    """Receive studies into a folder until the process is asked to stop; arguments as ``StoreListener``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # what it refuses, we log ourselves
    stop = _stopped_by_signal()
    with StoreListener(incoming, ae_title, callers, host, port, limits) as listener:
        _LOG.info("listen: %s on %s:%d", ae_title, host, listener.port)
        while not stop.wait(1.0):
            pass


def _stopped_by_signal() -> threading.Event:
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop
