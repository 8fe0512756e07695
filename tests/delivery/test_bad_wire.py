"""A real Orthanc behind a wire that fails amid a PDU, in either direction: it has each object once in the end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest
from conftest import Orthanc, wait_for
from owed import outbox, owe, states
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, SecondaryCaptureImageStorage

from node.config import Peer
from node.ledger.ledger import Ledger

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

CLASSES = (CTImageStorage, SecondaryCaptureImageStorage, Comprehensive3DSRStorage)

#: Type of a P-DATA-TF PDU (PS3.8 9.3.5).
P_DATA = 4

Fault = Literal["hangs", "closes", "is late"]

#: Seconds by which what is late comes too late.
LATE_S = 3.0


class Wire:
    """Passes PDUs on; of the first connection it fails amid one P-DATA-TF, from the archive or to it."""

    def __init__(self, archive: Orthanc, fault: Fault, of_answer: bool, number: int) -> None:
        self._archive, self._fault, self._of_answer, self._number = archive, fault, of_answer, number
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._server]
        self.port = self._server.getsockname()[1]
        self.connections = 0
        self.failed = threading.Event()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._archive.port))
                self._open += [near, far]
                self.connections += 1
                fails = self.connections == 1
                for source, sink, is_answer in ((near, far, False), (far, near, True)):
                    asked = (source, sink, fails and is_answer == self._of_answer)
                    threading.Thread(target=self._pass_on, args=asked, daemon=True).start()

    def close(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _pass_on(self, source: socket.socket, sink: socket.socket, fails: bool) -> None:
        data = 0
        with suppress(OSError):
            while head := source.recv(6, socket.MSG_WAITALL):
                whole = head + source.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL)
                data += head[0] == P_DATA
                if fails and head[0] == P_DATA and data == self._number:
                    self.failed.set()
                    sink.sendall(whole[: len(whole) // 2])
                    if self._fault == "hangs":
                        return
                    if self._fault == "closes":
                        break
                    time.sleep(LATE_S)
                    sink.sendall(whole[len(whole) // 2 :])
                else:
                    sink.sendall(whole)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire(archive: Orthanc, fault: Fault, *, of_answer: bool, number: int) -> Iterator[Wire]:
    made = Wire(archive, fault, of_answer, number)
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join()


@pytest.mark.parametrize("of_answer", [True, False], ids=["response", "object"])
@pytest.mark.parametrize("fault", ["hangs", "closes", "is late"])
def test_orthanc_whose_wire_fails_amid_a_response_or_an_object_has_each_object_once(
    ledger: Ledger, results: Path, orthanc: Orthanc, fault: Fault, of_answer: bool
) -> None:
    uids = [uid for _ in range(2) for uid in owe(ledger, results, "pacs", classes=CLASSES)]
    # The second response; the data set of the second object, which goes out after its command.
    with wire(orthanc, fault, of_answer=of_answer, number=2 if of_answer else 4) as line:
        peer = Peer(ae_title=orthanc.ae_title, host="127.0.0.1", port=line.port)
        begin = time.monotonic()
        outbox(ledger, results, peer).work_off()
        assert time.monotonic() - begin < 20
        assert line.failed.is_set()

        def worked_off() -> bool:
            outbox(ledger, results, peer).work_off()
            return states(ledger) == ["done"] * len(uids)

        wait_for(worked_off, 20, "all to be delivered")
        assert line.connections >= 2
    there = [one["MainDicomTags"]["SOPInstanceUID"] for one in orthanc.get("/instances", expand="").json()]
    assert sorted(there) == sorted(uids)
