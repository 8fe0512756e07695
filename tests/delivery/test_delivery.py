"""Pushing to real peers: DCMTK's storescp and Orthanc, and what is said when they refuse."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import Orthanc, free_port, running_orthanc, tool, wait_for
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from node.config import Peer
from node.delivery.peer import Outgoing
from node.delivery.push import push, push_all
from node.network.associations import PeerError, echo

#: pynetdicom drops the socket of a connection that failed without closing it; Python closes it, and warns.
REFUSED = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "objects"
    folder.mkdir()
    study, series = generate_uid(), generate_uid()
    for n in range(60):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = study, series, "P"
        ds.Rows = ds.Columns = 64
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 12, 11, 0, 1
        ds.PhotometricInterpretation, ds.InstanceNumber = "MONOCHROME2", n + 1
        ds.PixelData = np.full((64, 64), n, np.uint16).tobytes()
        ds.save_as(folder / f"{n:03d}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


@pytest.fixture
def storescp(tmp_path: Path) -> Iterator[tuple[Peer, Path]]:
    program, port, folder = tool("storescp"), free_port(), tmp_path / "received"
    folder.mkdir()
    process = subprocess.Popen(
        [program, "--aetitle", "STORE", "--output-directory", folder, str(port)],
        env={**os.environ, "TCP_NODELAY": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peer = Peer(ae_title="STORE", host="127.0.0.1", port=port)

    def listens() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_for(listens, 10, "storescp")
        yield peer, folder
    finally:
        process.terminate()
        process.wait(10)


@REFUSED
@pytest.mark.peer
def test_many_objects_on_one_association_arrive_as_they_are(objects: list[Path], storescp: tuple[Peer, Path]) -> None:
    peer, folder = storescp
    outcomes: list[PeerError | None] = []
    push_all([Outgoing.read(path) for path in objects], peer, "LUNGNODE", lambda _item, error: outcomes.append(error))
    assert outcomes == [None] * len(objects)
    received = {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in folder.iterdir()}
    assert received == {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in objects}


@pytest.mark.peer
def test_orthanc_takes_one_object(objects: list[Path], orthanc: Orthanc) -> None:
    peer = Peer(ae_title=orthanc.ae_title, host="127.0.0.1", port=orthanc.port)
    echo(peer, "LUNGNODE")
    assert push(objects[0], peer, "LUNGNODE") == ""
    assert orthanc.get("/statistics").json()["CountInstances"] == 1


@REFUSED
@pytest.mark.peer
def test_orthanc_that_is_called_otherwise_says_whose_setting_to_look_at(tmp_path: Path) -> None:
    with running_orthanc(tmp_path / "orthanc", DicomCheckCalledAet=True) as archive:
        peer = Peer(ae_title="WRONG", host="127.0.0.1", port=archive.port)
        with pytest.raises(PeerError, match="Called AE title not recognised; is the peer's `ae_title` in our settings"):
            echo(peer, "LUNGNODE")


@pytest.mark.peer
def test_file_whose_meta_lacks_its_uid_is_sent_too(objects: list[Path], storescp: tuple[Peer, Path]) -> None:
    peer, folder = storescp
    lacking = dcmread(objects[0])
    del lacking.file_meta.MediaStorageSOPInstanceUID
    lacking.save_as(objects[0])
    (objects[0].parent / "notes.txt").write_text("no DICOM")
    items = Outgoing.below(objects[0].parent)
    assert len(items) == len(objects)
    assert push(objects[0], peer, "LUNGNODE") == ""
    (received,) = folder.iterdir()
    assert dcmread(received).PixelData == lacking.PixelData


@REFUSED
@pytest.mark.peer
def test_class_that_the_peer_does_not_know_is_refused_for_good(
    objects: list[Path], storescp: tuple[Peer, Path], tmp_path: Path
) -> None:
    peer, _ = storescp
    unknown = dcmread(objects[0])
    unknown.SOPClassUID = unknown.file_meta.MediaStorageSOPClassUID = "1.2.826.0.1.3680043.8.498.1"
    unknown.save_as(tmp_path / "unknown.dcm")
    with pytest.raises(PeerError, match="does not accept") as caught:
        push(tmp_path / "unknown.dcm", peer, "LUNGNODE")
    assert caught.value.permanent
    assert str(SegmentationStorage) not in str(caught.value)


@REFUSED
def test_nobody_there_is_said_and_passes() -> None:
    peer = Peer(ae_title="NOBODY", host="127.0.0.1", port=free_port())
    with pytest.raises(PeerError, match=r"no connection to NOBODY at 127\.0\.0\.1:") as caught:
        echo(peer, "LUNGNODE")
    assert not caught.value.permanent
