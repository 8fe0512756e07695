"""A real Orthanc that is killed while objects come in, and started again: it has each of them once in the end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from conftest import Orthanc, running_orthanc, wait_for
from owed import outbox, owe, states
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, SecondaryCaptureImageStorage

from node.config import Peer
from node.ledger.ledger import Ledger

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

STUDIES, CLASSES = 15, (CTImageStorage, SecondaryCaptureImageStorage, Comprehensive3DSRStorage)


def sop_instances(archive: Orthanc) -> list[str]:
    return [one["MainDicomTags"]["SOPInstanceUID"] for one in archive.get("/instances", expand="").json()]


def test_orthanc_killed_amid_a_delivery_and_started_again_has_each_object_once(
    tmp_path: Path, ledger: Ledger, results: Path
) -> None:
    uids = [uid for _ in range(STUDIES) for uid in owe(ledger, results, "pacs", classes=CLASSES)]

    def peer(archive: Orthanc) -> Peer:
        return Peer(ae_title=archive.ae_title, host="127.0.0.1", port=archive.port)

    with running_orthanc(tmp_path / "orthanc") as archive:
        worker = threading.Thread(target=outbox(ledger, results, peer(archive)).work_off)
        worker.start()
        wait_for(lambda: len(archive.get("/instances").json()) >= 5, 20, "some objects")
        archive.kill()
        worker.join(30)
        assert not worker.is_alive()
    assert {"done", "waiting"} == set(states(ledger))
    sent = states(ledger).count("done")
    with running_orthanc(tmp_path / "orthanc") as archive:
        deadline = time.monotonic() + 30
        while "waiting" in states(ledger) and time.monotonic() < deadline:
            outbox(ledger, results, peer(archive)).work_off()
            time.sleep(0.05)
        assert states(ledger) == ["done"] * len(uids)
        there = sop_instances(archive)
    assert len(there) == len(set(there))
    # What Orthanc said it has and lost as it died (its database is not synced at each object) only storage commitment
    # would show; all that came later is there.
    assert set(uids[sent + 1 :]) <= set(there) <= set(uids)
