"""DICOM over the network: receive studies into a watched folder (C-STORE SCP), send results to an archive (SCU).

Images are kept by study in a hidden folder and handed over, by a rename, when none has come for a while: archives
send a study in one association or in a hundred. Who may send, how many at once, how much and what is limited before
anything is parsed; compressed syntaxes are not offered, so an archive decompresses. The listener is for the
hospital's inner network: it binds to this machine unless told otherwise, and encryption is a matter of the TLS
context that is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    Comprehensive3DSRStorage,
    CTImageStorage,
    MRImageStorage,
    ParametricMapStorage,
    PositronEmissionTomographyImageStorage,
    SegmentationStorage,
    Verification,
)

from pipelines.dicom.privacy import quiet_reading
from pipelines.dicom.series import digest_key
from pipelines.files import sweep_temporaries, write_atomically
from transforms.errors import DataError, FiducialError, ResourceError, UsageError

_LOG = logging.getLogger(__name__)
RECEIVED = (CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage)
SENT = (SegmentationStorage, ParametricMapStorage, Comprehensive3DSRStorage)
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
PDU_BYTES = 2**20  # we ask for 16 kB; a request with all contexts and syntaxes has some 100 kB
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND, NOT_AUTHORISED = 0x0000, 0xA700, 0xC000, 0x0124


@dataclass(frozen=True)
class Limits:
    """What the listener accepts.

    Attributes:
        associations: at the same time.
        object_bytes: of one image.
        association_bytes: of all that one association sends.
        study_objects: images of one study that is being received.
        idle_s: without a message before an association is ended; also for one message unit to arrive.
        quiet_s: without an image before a study counts as complete.
        free_bytes: of disk that must stay free.
    """

    associations: int = 4
    object_bytes: int = 64 * 2**20
    association_bytes: int = 4 * 2**30
    study_objects: int = 20_000
    idle_s: float = 60.0
    quiet_s: float = 30.0
    free_bytes: int = 2**30


class StoreListener:
    """A C-STORE SCP that leaves every study as a folder in ``incoming``.

    Args:
        incoming: where studies appear; its hidden ``.receiving`` holds what is not complete.
        ae_title: ours; senders must call it.
        callers: titles of the applications that may send; nobody else may.
        host, port: to bind to; port 0 takes a free one.
        limits: what is accepted.
        tls: encrypt, with certificates of the caller's choice; None is plain.

    Raises:
        UsageError: no callers, or a title that is none.
    """

    def __init__(
        self,
        incoming: str | Path,
        ae_title: str,
        callers: Sequence[str],
        host: str = "127.0.0.1",
        port: int = 11112,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        for title in (ae_title, *callers):
            if not 1 <= len(title.strip()) <= 16 or "\\" in title or not title.isascii():
                raise UsageError(f"AE title {title!r}", "1 to 16 ASCII characters without backslash", "correct it")
        if not callers:
            raise UsageError(
                "listen: nobody may send", "no calling AE title is given", "name the archive with --caller"
            )
        self.incoming, self.limits = Path(incoming), limits or Limits()
        self.receiving = self.incoming / ".receiving"
        self.receiving.mkdir(parents=True, exist_ok=True)
        self._address, self._tls = (host, port), tls
        self._bytes: dict[Any, list[int]] = {}
        self._last: dict[str, float] = {}
        self._images: dict[str, set[str]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._server: Any = None
        self._hand_over = threading.Thread(target=self._watch_quiet, daemon=True)
        self._ae = _application(ae_title, self.limits)
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = list(callers)
        for uid in RECEIVED:
            self._ae.add_supported_context(uid, SYNTAXES)
        self._ae.add_supported_context(Verification)

    def start(self) -> int:
        """Begin to listen in threads of its own; return the port.

        Raises:
            ResourceError: the port cannot be bound.
        """
        sweep_temporaries(self.receiving)  # an image that was half written was never confirmed to its sender
        for folder in self.receiving.iterdir():  # of a listener that ended before it handed over
            self._last[folder.name] = time.monotonic()
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_CONN_CLOSE, self._closed),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_DATA_RECV, self._data),
            (evt.EVT_C_STORE, self._store),
        ]
        try:
            self._server = self._ae.start_server(
                self._address, block=False, evt_handlers=handlers, ssl_context=self._tls
            )
        except OSError as problem:
            raise ResourceError(f"listen: port {self._address[1]}", str(problem), "choose another port") from None
        self._hand_over.start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """End all associations and hand over what is quiet; the rest waits for the next start."""
        self._stop.set()
        if self._server is not None:
            self._server.shutdown()
            self._hand_over.join()
        self._ae.shutdown()
        self.hand_over_quiet()

    def __enter__(self) -> StoreListener:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1]) if self._server is not None else self._address[1]

    def hand_over_quiet(self) -> int:
        """Move studies that nothing came for in ``quiet_s`` into ``incoming``; return how many."""
        moved = 0
        with self._lock:
            for study, last in list(self._last.items()):
                if time.monotonic() - last < self.limits.quiet_s:
                    continue
                del self._last[study]
                self._images.pop(study, None)
                number, target = 1, self.incoming / f"study-{study}"
                while target.exists():
                    number, target = number + 1, self.incoming / f"study-{study}-{number}"
                (self.receiving / study).rename(target)
                moved += 1
                _LOG.info("listen: study %s handed over", study)
        return moved

    def _watch_quiet(self) -> None:
        while not self._stop.wait(min(1.0, self.limits.quiet_s / 2)):
            try:
                self.hand_over_quiet()
            except OSError as problem:
                _LOG.error("listen: a study cannot be handed over (%s)", type(problem).__name__)

    def _opened(self, event: evt.Event) -> None:
        self._bytes[event.assoc] = [0, 0]
        association_socket: Any = event.assoc.dul.socket
        connection = association_socket.socket
        # the library's own waits for ever for what was announced, up to 4 GB, before anybody knows who sends it
        association_socket.recv = lambda count: _received(connection, count, self.limits.idle_s)

    def _rejected(self, event: evt.Event) -> None:
        calling, called = (str(title)[:16] for title in _titles(event))
        _LOG.warning("listen: association rejected, %r called %r", calling, called)

    def _closed(self, event: evt.Event) -> None:
        self._bytes.pop(event.assoc, None)

    def _data(self, event: evt.Event) -> None:
        """Count what comes in, before it is a message; end the association that sends too much."""
        counts = self._bytes.get(event.assoc)
        if counts is None:
            return
        counts[0] += len(event.data)
        counts[1] += len(event.data)
        if counts[0] > self.limits.object_bytes or counts[1] > self.limits.association_bytes:
            limit = "object" if counts[0] > self.limits.object_bytes else "association"
            _LOG.error("listen: association ended, more bytes than the limit of one %s", limit)
            self._bytes.pop(event.assoc, None)
            connection = event.assoc.dul.socket
            if connection is not None:
                connection.close()

    def _store(self, event: evt.Event) -> int:
        counts = self._bytes.get(event.assoc)
        if counts is not None:
            counts[0] = 0
        try:
            return self._keep(event)
        except (FiducialError, OSError) as problem:
            _LOG.error("listen: an image is refused (%s)", type(problem).__name__)
            return CANNOT_UNDERSTAND if isinstance(problem, DataError) else OUT_OF_RESOURCES
        except Exception as problem:  # whatever a parser raises on hostile bytes must not end the listener
            _LOG.error("listen: an image cannot be read (%s)", type(problem).__name__)
            return CANNOT_UNDERSTAND

    def _keep(self, event: evt.Event) -> int:
        if shutil.disk_usage(self.receiving).free < self.limits.free_bytes:
            return OUT_OF_RESOURCES
        with quiet_reading():
            dataset = event.dataset
            uids = [str(dataset.get(name, "")) for name in ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID")]
        request: Any = event.request
        asked = str(request.AffectedSOPInstanceUID), str(request.AffectedSOPClassUID)
        if not all(uids) or (uids[1], uids[2]) != asked:
            return CANNOT_UNDERSTAND
        study = digest_key(uids[0])
        name = hashlib.sha256(uids[1].encode()).hexdigest()[:32] + ".dcm"
        with self._lock:
            folder = self.receiving / study
            folder.mkdir(exist_ok=True)
            self._last[study] = time.monotonic()
            if study not in self._images:
                self._images[study] = {path.name for path in folder.iterdir()}
            images = self._images[study]
            if len(images | {name}) > self.limits.study_objects:
                return OUT_OF_RESOURCES
            write_atomically(folder / name, event.encoded_dataset())
            images.add(name)
            self._last[study] = time.monotonic()
        return SUCCESS


def _received(connection: socket.socket, count: int, seconds: float) -> bytearray:
    """Return ``count`` bytes; fewer where they are too many, too late or the connection has ended.

    The library closes a connection that gives it fewer bytes than it asked for.
    """
    received = bytearray()
    if count > PDU_BYTES:
        _LOG.error("listen: association ended, a message unit of %d bytes", count)
        return received
    deadline = time.monotonic() + seconds
    while len(received) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            _LOG.error("listen: association ended, a message unit stopped in the middle")
            break
        connection.settimeout(left)
        with contextlib.suppress(TimeoutError):
            block = connection.recv(min(count - len(received), 2**16))
            if not block:
                break
            received += block
    connection.settimeout(seconds)
    return received


def _titles(event: evt.Event) -> tuple[Any, Any]:
    """Return the titles of who calls and of who is called, as the request says."""
    request: Any = event.assoc.requestor.primitive
    return getattr(request, "calling_ae_title", ""), getattr(request, "called_ae_title", "")


def send(
    files: Sequence[str | Path],
    host: str,
    port: int,
    called: str,
    calling: str = "FIDUCIAL",
    tls: ssl.SSLContext | None = None,
) -> int:
    """Send results (segmentations, parametric maps, reports) to an archive; return how many.

    Args:
        files: DICOM files as ``write_back`` makes them.
        host, port, called: the archive's address and AE title.
        calling: our AE title.
        tls: encrypt; None is plain.

    Raises:
        ResourceError: the archive cannot be reached, refuses us, or does not store a file. Sending again is
            safe: the same result has the same UIDs.
    """
    application = _application(calling, Limits())
    for uid in SENT:
        application.add_requested_context(uid, SYNTAXES)
    where = f"send to {called}"
    association = application.associate(host, port, ae_title=called, tls_args=(tls, host) if tls else None)
    if not association.is_established:
        reason = "it rejects the association" if association.is_rejected else "it cannot be reached"
        raise ResourceError(where, reason, "check address, AE titles and that the archive knows us")
    try:
        for number, file in enumerate(files, start=1):
            dataset = pydicom.dcmread(file)
            try:
                status = association.send_c_store(dataset)
            except ValueError as problem:  # no context accepted for this class
                raise ResourceError(
                    f"{where}: file {number}", type(problem).__name__, "see what the archive accepts"
                ) from None
            if "Status" not in status or status.Status != SUCCESS:
                found = f"status {status.Status:#06x}" if "Status" in status else "the connection was lost"
                raise ResourceError(f"{where}: file {number} of {len(files)}", found, "send all of them again")
    finally:
        if association.is_established:
            association.release()
    return len(files)


def _application(title: str, limits: Limits) -> AE:
    application = AE(ae_title=title)
    application.maximum_associations = limits.associations
    application.maximum_pdu_size = 16384
    application.acse_timeout = application.dimse_timeout = application.network_timeout = limits.idle_s
    application.connection_timeout = 10
    return application
