"""The listener over loopback: studies arrive whole, strangers and floods do not, results go out."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from generated_series import NAMES, stored_pixels, write_series
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import CTImageStorage, SegmentationStorage, Verification  # type: ignore[attr-defined]

from pipelines.dicom.cases import as_case_folders
from pipelines.dicom.listener import OUT_OF_RESOURCES, Limits, StoreListener, send
from pipelines.dicom.objects import Origin, to_bytes
from pipelines.dicom.privacy import names_found
from pipelines.dicom.segmentation import dicom_segmentation, labels_of_segmentation
from pipelines.dicom.series import find_series
from pipelines.dicom.volume import read_volume
from pipelines.manifests.model import Label
from transforms.errors import ResourceError, UsageError

FREE = {"free_bytes": 1, "quiet_s": 0.3, "idle_s": 10.0}


def listener(folder: Path, **limits: float) -> StoreListener:
    chosen = Limits(**{**FREE, **limits})  # type: ignore[arg-type]
    return StoreListener(folder, "FIDUCIAL", ["ARCHIVE"], port=0, limits=chosen)


def associate(
    port: int,
    calling: str = "ARCHIVE",
    called: str = "FIDUCIAL",
    syntax: str = ExplicitVRLittleEndian,
    tls: ssl.SSLContext | None = None,
) -> Association:
    application = AE(ae_title=calling)
    application.acse_timeout = application.dimse_timeout = application.network_timeout = 10
    application.add_requested_context(CTImageStorage, syntax)
    application.add_requested_context(Verification)
    tls_args = (tls, "127.0.0.1") if tls else None
    return application.associate("127.0.0.1", port, ae_title=called, tls_args=tls_args)


def store(association: Association, path: Path) -> int | None:
    status = association.send_c_store(pydicom.dcmread(path))
    return status.Status if "Status" in status else None


def until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def studies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_a_study_sent_in_two_associations_is_handed_over_once_and_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = sorted(write_series(tmp_path / "sent").iterdir())
    with caplog.at_level(logging.INFO), listener(tmp_path / "in") as receiver:
        for some in (paths[:2], paths[2:]):
            association = associate(receiver.port)
            assert association.is_established
            assert association.send_c_echo().Status == 0
            assert [store(association, path) for path in some] == [0] * len(some)
            association.release()
        assert until(lambda: len(studies(tmp_path / "in")) == 1)
    (study,) = studies(tmp_path / "in")
    assert len(list(study.iterdir())) == 5
    received = as_case_folders(study, ["ct"], tmp_path / "work").cases[0].volume
    sent = read_volume(find_series(tmp_path / "sent", tmp_path / "work").series[0])
    np.testing.assert_allclose(received.affine, sent.affine)
    np.testing.assert_array_equal(read_volume(received.series).voxels, sent.voxels)
    assert names_found(caplog.text, NAMES) == []
    assert names_found(" ".join(path.as_posix() for path in (tmp_path / "in").rglob("*")), NAMES) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_with_certificates_a_study_arrives_and_who_speaks_plainly_does_not_get_in(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=listener"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    limits = Limits(**{**FREE, "idle_s": 3.0})  # type: ignore[arg-type]
    paths = sorted(write_series(tmp_path / "sent").iterdir())
    with StoreListener(tmp_path / "in", "FIDUCIAL", ["ARCHIVE"], port=0, limits=limits, tls=serving) as receiver:
        assert not associate(receiver.port).is_established
        association = associate(receiver.port, tls=ssl.create_default_context(cafile=certificate))
        assert [store(association, path) for path in paths] == [0] * len(paths)
        association.release()
        assert until(lambda: len(studies(tmp_path / "in")) == 1)
    assert len(list(studies(tmp_path / "in")[0].iterdir())) == len(paths)


def test_only_known_callers_of_our_title_are_let_in(tmp_path: Path) -> None:
    with listener(tmp_path / "in") as receiver:
        assert associate(receiver.port, calling="STRANGER").is_rejected
        assert associate(receiver.port, called="OTHER").is_rejected
        known = associate(receiver.port)
        assert known.is_established
        known.release()
    assert studies(tmp_path / "in") == []
    with pytest.raises(UsageError, match="nobody"):
        StoreListener(tmp_path / "in", "FIDUCIAL", [])
    with pytest.raises(UsageError, match="AE title"):
        StoreListener(tmp_path / "in", "FIDUCIAL", ["A" * 17])


def test_more_associations_than_the_limit_are_rejected(tmp_path: Path) -> None:
    with listener(tmp_path / "in", associations=2) as receiver:
        open_ones = [associate(receiver.port) for _ in range(2)]
        assert [association.is_established for association in open_ones] == [True, True]
        assert associate(receiver.port).is_rejected
        open_ones[0].release()
        time.sleep(0.3)
        again = associate(receiver.port)
        assert again.is_established
        for association in (open_ones[1], again):
            association.release()


@pytest.mark.parametrize(("limits", "stored"), [({"object_bytes": 50_000}, 0), ({"association_bytes": 300_000}, 2)])
def test_a_flood_is_cut_off_and_the_listener_goes_on(limits: dict[str, float], stored: int, tmp_path: Path) -> None:
    """Images of 130 kB: one is too much for 50 kB, three are too much for 300 kB."""
    paths = sorted(write_series(tmp_path / "sent", stored_pixels(4, 256, 256)).iterdir())
    small = sorted(write_series(tmp_path / "small", change=_other_study).iterdir())
    with listener(tmp_path / "in", quiet_s=0.5, **limits) as receiver:
        association = associate(receiver.port)
        statuses: list[int | None] = []
        for path in paths:
            try:
                statuses.append(store(association, path))
            except RuntimeError:  # the association is gone
                break
        assert statuses[:stored] == [0] * stored
        assert 0 not in statuses[stored:]
        assert until(lambda: not association.is_established)
        sound = associate(receiver.port)
        assert [store(sound, path) for path in small] == [0] * 5
        sound.release()
        expected = {5} | ({stored} if stored else set())
        assert until(lambda: {len(list(study.iterdir())) for study in studies(tmp_path / "in")} == expected)


def _other_study(k: int, image: Dataset) -> None:
    image.StudyInstanceUID = "1.2.3.4.77"


def test_a_message_that_announces_gigabytes_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its length stands before the titles: anybody who reaches the port can announce 4 GB."""
    with listener(tmp_path / "in") as receiver, socket.create_connection(("127.0.0.1", receiver.port)) as stranger:
        stranger.settimeout(15)
        stranger.sendall(struct.pack(">BBL", 0x01, 0, 0xFFFFFFF0))
        sent, block = 0, bytes(2**20)
        with contextlib.suppress(OSError):  # the connection is gone
            while sent < 2**28:
                sent += stranger.send(block)
        assert sent < 2**26  # what the buffers of the system hold, and not what was announced
        sound = associate(receiver.port)
        assert sound.is_established
        sound.release()
    assert "a message unit of 4294967280 bytes" in caplog.text


@pytest.mark.parametrize("sent", [b"\x01\x00\x00", struct.pack(">BBL", 1, 0, 1000) + b"ten bytes."])
def test_messages_that_stop_in_the_middle_do_not_keep_others_out(sent: bytes, tmp_path: Path) -> None:
    with listener(tmp_path / "in", associations=2, idle_s=1.0) as receiver, contextlib.ExitStack() as opened:
        for _ in range(2):
            stalled = opened.enter_context(socket.create_connection(("127.0.0.1", receiver.port)))
            stalled.sendall(sent)

        def let_in() -> bool:
            association = associate(receiver.port)
            established = association.is_established
            association.release() if established else time.sleep(0.3)
            return established

        assert until(let_in)


def test_an_image_that_was_half_written_when_the_listener_died_is_not_handed_over(tmp_path: Path) -> None:
    study = write_series(tmp_path / "in" / ".receiving" / "0123abcd")
    (study / f".a.dcm.{'0' * 32}.tmp").write_bytes(next(study.iterdir()).read_bytes()[:300])
    with listener(tmp_path / "in"):
        assert until(lambda: len(studies(tmp_path / "in")) == 1)
    assert len(list(studies(tmp_path / "in")[0].iterdir())) == 5


def test_too_many_images_or_too_little_disk_is_said_to_the_sender(tmp_path: Path) -> None:
    paths = sorted(write_series(tmp_path / "sent").iterdir())
    with listener(tmp_path / "in", study_objects=3) as receiver:
        association = associate(receiver.port)
        assert [store(association, path) for path in [*paths, paths[0]]] == [0, 0, 0, *[OUT_OF_RESOURCES] * 2, 0]
        association.release()
    with listener(tmp_path / "full", free_bytes=2**60) as receiver:
        association = associate(receiver.port)
        assert store(association, paths[0]) == OUT_OF_RESOURCES
        association.release()


def test_compressed_images_find_no_context_so_the_archive_decompresses(tmp_path: Path) -> None:
    with listener(tmp_path / "in") as receiver:
        association = associate(receiver.port, syntax=JPEGLosslessSV1)
        assert [context.abstract_syntax for context in association.accepted_contexts] == [Verification]
        association.release()


def test_an_image_that_is_not_what_the_message_says_is_refused(tmp_path: Path) -> None:
    path = next(write_series(tmp_path / "sent").iterdir())
    with listener(tmp_path / "in") as receiver:
        association = associate(receiver.port)
        image = pydicom.dcmread(path)
        del image.StudyInstanceUID
        assert association.send_c_store(image).Status == 0xC000
        association.release()
    assert list((tmp_path / "in" / ".receiving").iterdir()) == []


def test_what_was_received_before_a_crash_is_handed_over_after_it(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / ".receiving" / "0123abcd")
    with listener(tmp_path / "in"):
        assert until(lambda: [path.name for path in studies(tmp_path / "in")] == ["study-0123abcd"])


def test_a_segmentation_is_sent_to_an_archive_and_arrives_unchanged(tmp_path: Path) -> None:
    volume = read_volume(find_series(write_series(tmp_path / "in"), tmp_path / "work").series[0])
    prediction = np.random.default_rng(0).integers(0, 2, volume.voxels.shape).astype(np.uint8)
    labels = [Label(0, "background", "#000000", (0,)), Label(1, "lesion", "#ff0000", (1,))]
    (tmp_path / "seg.dcm").write_bytes(to_bytes(dicom_segmentation(prediction, volume, labels, Origin("bundle"))))
    received: list[Dataset] = []

    def keep(event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        received.append(dataset)
        return 0 if len(received) < 2 else OUT_OF_RESOURCES

    archive = AE(ae_title="ARCHIVE")
    archive.add_supported_context(SegmentationStorage)
    server = archive.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    assert server is not None
    port = server.server_address[1]
    try:
        assert send([tmp_path / "seg.dcm"], "127.0.0.1", port, "ARCHIVE") == 1
        assert np.array_equal(labels_of_segmentation(received[0], volume), volume.to_slices(prediction))
        with pytest.raises(ResourceError, match="0xa700"):
            send([tmp_path / "seg.dcm"], "127.0.0.1", port, "ARCHIVE")
        assert received[0].SOPInstanceUID == received[1].SOPInstanceUID
    finally:
        server.shutdown()
    with pytest.raises(ResourceError, match="cannot be reached"):
        send([tmp_path / "seg.dcm"], "127.0.0.1", port, "ARCHIVE")
