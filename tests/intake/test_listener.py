"""The listener before real senders: DCMTK's, pynetdicom's, and those that speak no DICOM."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, tool, wait_for
from made_instances import SERIES, STUDY, dataset, dataset_bytes, encoded, host, save, send_raw
from pydicom import DataElement, Dataset
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification

from node.intake.admission import ListenerOptions
from node.intake.assembly import Assembly, ClosedSeries
from node.intake.contexts import TRANSFER_SYNTAXES
from node.intake.listener import Listener
from node.intake.spool import Spool
from node.intake.transport import DIRECT, STOCK

#: A peer that goes away may leave pynetdicom a socket that nobody closes; Python closes it, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")


class Node:
    """A listener on loopback with its spool and what it closed."""

    def __init__(self, folder: Path, floor_bytes: int = 0, **options: Any) -> None:
        self.closed: list[ClosedSeries] = []
        self.spool = Spool(folder / "spool", floor_bytes)
        around = host(
            closed=self.closed.append,
            recall=lambda study, series: [(i.header, i.path) for i in self.spool.series(study, series)],
            ended=self.spool.end,
            adopt=self.spool.adopt,
        )
        self.assembly = Assembly(around, 1.5, grace_s=0.2)
        values = {"ae_title": "LUNGNODE", "port": 0, "host": "127.0.0.1", **options}
        self.listener = Listener(ListenerOptions(**values), self.spool, self.assembly)
        self.listener.start()

    def kept(self, study: str = STUDY, series: str = SERIES) -> dict[str, bytes]:
        folder = self.spool.root / study / series
        return {path.stem: dataset_bytes(path.read_bytes()) for path in folder.glob("*.dcm")}

    def close_one(self) -> ClosedSeries:
        wait_for(lambda: bool(self.closed), 10, "a closed series")
        return self.closed[-1]


@pytest.fixture(params=[DIRECT, STOCK])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def start(**options: Any) -> Node:
        nodes.append(Node(tmp_path, transport=request.param, **options))
        return nodes[-1]

    yield start
    for one in nodes:
        one.listener.stop()


def dcmtk(program: str, node: Node, *arguments: object, called: str = "LUNGNODE", calling: str = "CT1") -> str:
    """Output of a DCMTK sender; without TCP_NODELAY it waits 45 ms an object on Nagle's algorithm."""
    command = [tool(program), "-v", "-aet", calling, "-aec", called, "127.0.0.1", node.listener.port, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "TCP_NODELAY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return done.stdout.decode("latin-1")


@contextmanager
def associated(node: Node, sop_class: str, *transfer_syntaxes: str, calling: str = "CT1") -> Iterator[Association]:
    ae = AE(calling)
    ae.add_requested_context(sop_class, list(transfer_syntaxes) or None)
    association = ae.associate("127.0.0.1", node.listener.port, ae_title="LUNGNODE")
    yield association
    if association.is_established:
        association.release()


def slices(folder: Path, count: int) -> list[Path]:
    return [save(dataset(n), folder / f"{n:03d}.dcm") for n in range(count)]


@pytest.mark.peer
def test_echo_and_a_series_from_dcmtk(node: Callable[..., Node], tmp_path: Path) -> None:
    one = node()
    assert "Received Echo Response (Success)" in dcmtk("echoscu", one)
    dcmtk("storescu", one, *slices(tmp_path, 12))
    assert one.kept() == {dataset(n).SOPInstanceUID: encoded(dataset(n)) for n in range(12)}
    closed = one.close_one()
    assert closed.reason == "slices tile space from z=0.0 to z=11.0 every 1.0 mm, and the association ended"
    assert (closed.complete, closed.calling_ae, closed.called_ae) == (True, "CT1", "LUNGNODE")
    assert {path.stem for path in closed.paths} == set(one.kept())


def test_a_sender_that_keeps_its_association_open_by_echo_keeps_no_series_open(node: Callable[..., Node]) -> None:
    one = node()
    entity = AE("CT1")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", one.listener.port, ae_title="LUNGNODE")
    for n in range(3):
        request = {"AffectedSOPClassUID": CTImageStorage, "AffectedSOPInstanceUID": dataset(n).SOPInstanceUID}
        send_raw(association, encoded(dataset(n)), request)
        wait_for(lambda n=n: len(one.kept()) == n + 1, 5, "the instance")
    deadline = time.monotonic() + 10
    while not one.closed and time.monotonic() < deadline:
        assert association.send_c_echo().Status == 0x0000
        time.sleep(0.3)
    assert one.closed[0].reason.endswith("no instance came for 1.5 s")
    assert association.is_established
    association.release()


@pytest.mark.peer
@pytest.mark.parametrize("option", ["-xe", "-xi", "-xb", "-xd"])
def test_bytes_are_kept_as_a_bit_preserving_storescp_keeps_them(
    node: Callable[..., Node], tmp_path: Path, option: str
) -> None:
    one, file = node(), save(dataset(0, size=64), tmp_path / "0.dcm")
    dcmtk("storescu", one, option, file)
    assert list(one.kept().values()) == as_storescp_keeps_them(tmp_path / "reference", option, [file])


@pytest.mark.peer
@pytest.mark.data
def test_compressed_slices_come_as_they_are_sent(node: Callable[..., Node], tmp_path: Path, data_dir: Path) -> None:
    one = node()
    files = sorted((data_dir / "ct-series" / "covid-ct-md" / "P001").glob("*.dcm"))[:12]
    dcmtk("storescu", one, "-xs", *files)
    closed = one.close_one()
    kept = one.kept(closed.study_instance_uid, closed.series_instance_uid)
    assert sorted(kept.values()) == as_storescp_keeps_them(tmp_path / "reference", "-xs", files)


def as_storescp_keeps_them(folder: Path, option: str, files: list[Path]) -> list[bytes]:
    """What storescu sends, kept bit by bit by DCMTK: storescu encodes data sets anew, so its files are no measure."""
    folder.mkdir()
    port = free_port()
    reference = subprocess.Popen([tool("storescp"), "+xa", "+B", "-od", folder, str(port)])
    try:
        wait_for(lambda: answers(port), 10, "storescp")
        command = [tool("storescu"), option, "127.0.0.1", str(port), *files]
        subprocess.run(command, check=True, env={**os.environ, "TCP_NODELAY": "1"})
    finally:
        reference.terminate()
        reference.wait(10)
    return sorted(dataset_bytes(path.read_bytes()) for path in folder.iterdir())


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.peer
def test_who_is_not_known_is_turned_away(node: Callable[..., Node]) -> None:
    one = node(known_peers=frozenset({"CT1", "PACS"}))
    assert "Calling AE Title Not Recognized" in dcmtk("echoscu", one, calling="STRANGER")
    assert "Called AE Title Not Recognized" in dcmtk("echoscu", one, called="SOMEONE")
    assert "Received Echo Response (Success)" in dcmtk("echoscu", one, calling="PACS")


def test_a_listener_that_nobody_may_use_is_not_begun(node: Callable[..., Node]) -> None:
    with pytest.raises(ValueError, match="no peer may send"):
        node(known_peers=frozenset())


@pytest.mark.peer
def test_one_association_too_many_is_asked_to_come_again(node: Callable[..., Node]) -> None:
    one = node(max_associations=2)
    with associated(one, CTImageStorage), associated(one, CTImageStorage):
        said = dcmtk("echoscu", one)
        assert "Rejected Transient, Source: Service Provider (Presentation Related)" in said
        assert "Local Limit Exceeded" in said
    wait_for(lambda: one.listener.associations == 0, 5, "the associations to end")
    wait_for(lambda: "(Success)" in dcmtk("echoscu", one), 5, "room for an association")


def test_uncompressed_is_preferred_then_lossless_and_what_cannot_be_read_is_refused(node: Callable[..., Node]) -> None:
    one = node()
    for proposed, accepted in (
        ((JPEGBaseline8Bit, ImplicitVRLittleEndian, ExplicitVRLittleEndian), [ExplicitVRLittleEndian]),
        ((JPEGBaseline8Bit, JPEGLosslessSV1), [JPEGLosslessSV1]),
        ((JPEGBaseline8Bit,), [JPEGBaseline8Bit]),
        (("1.2.840.113619.5.2", ExplicitVRBigEndian), [ExplicitVRBigEndian]),
    ):
        with associated(one, CTImageStorage, *proposed) as association:
            assert association.accepted_contexts[0].transfer_syntax == accepted
    assert len(set(TRANSFER_SYNTAXES)) == len(TRANSFER_SYNTAXES)
    # Abstract syntaxes that are no storage, and a private transfer syntax that nobody can read.
    ae = AE("CT1")
    ae.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    ae.add_requested_context(CTImageStorage, "1.2.840.113619.5.2")
    association = ae.associate("127.0.0.1", one.listener.port, ae_title="LUNGNODE")
    assert sorted(cx.result for cx in association.rejected_contexts) == [3, 4]


@pytest.mark.parametrize("sop_class", ["1.3.12.2.1107.5.9.1", "1.2.840.10008.5.1.4.1.1.9999", "1.2.3.4.5"])
def test_private_and_future_objects_are_kept_too(node: Callable[..., Node], tmp_path: Path, sop_class: str) -> None:
    one, ds = node(), dataset(0)
    ds.SOPClassUID = UID(sop_class)
    raw = encoded(ds)
    assert status(one, ds).Status == 0x0000
    assert list(one.kept().values()) == [raw]


def status(node: Node, ds: Dataset, **request: Any) -> Dataset:
    """Answer to a C-STORE; `request` overrides what the request says of the data set."""
    raw, seen = encoded(ds), []
    with associated(node, ds.SOPClassUID, ExplicitVRLittleEndian) as association:
        association.bind(evt.EVT_DIMSE_RECV, lambda event: seen.append(event.message.command_set))
        primitive = {"AffectedSOPClassUID": ds.SOPClassUID, "AffectedSOPInstanceUID": ds.SOPInstanceUID, **request}
        send_raw(association, raw if "raw" not in primitive else primitive.pop("raw"), primitive)
        wait_for(lambda: bool(seen), 10, "the C-STORE response")
    return seen[0]


def test_each_refusal_has_its_status_and_says_why(node: Callable[..., Node]) -> None:
    one, ds = node(), dataset(0)
    answers = {
        "other instance": status(one, ds, AffectedSOPInstanceUID="1.2.3"),
        "other class": status(one, ds, AffectedSOPClassUID="1.2.840.10008.5.1.4.1.1.4"),
        "no DICOM": status(one, ds, raw=b"GET / HTTP/1.1\r\n\r\n"),
        "cut off": status(one, ds, raw=encoded(ds)[:-100]),
        "path for UID": status(one, _with(ds, StudyInstanceUID="../../etc")),
    }
    assert {name: (answer.Status, answer.ErrorComment) for name, answer in answers.items()} == {
        "other instance": (0xA900, "SOP instance of data set and request differ"),
        "other class": (0xA900, "SOP class of data set and request differ"),
        "no DICOM": (0xC000, "the data set ends within an element"),
        "cut off": (0xC000, "the data set ends within its pixel data"),
        "path for UID": (0xC000, "a UID is not digits and dots of at most 64 characters (PS3.5 9.1"),
    }
    assert one.kept() == {}


def test_other_content_under_a_known_uid_is_a_warning_and_the_first_is_kept(node: Callable[..., Node]) -> None:
    one, ds = node(), dataset(0)
    first = encoded(ds)
    assert status(one, ds).Status == 0x0000
    assert status(one, ds).Status == 0x0000
    answer = status(one, _with(ds, PatientName="CORRECTED"))
    assert (answer.Status, answer.ErrorComment) == (0xB000, "instance known with other content; first one kept")
    assert list(one.kept().values()) == [first]


@pytest.mark.peer
def test_a_full_disk_and_a_broken_one(node: Callable[..., Node], tmp_path: Path) -> None:
    full = node(floor_bytes=int(shutil.disk_usage(tmp_path).free * 1.5))
    answer = status(full, dataset(0))
    assert (answer.Status, answer.ErrorComment) == (0xA700, "out of disk space")
    assert full.assembly.open_series == 1  # which lacks the one that was refused
    assert "Temporary Congestion" in dcmtk("echoscu", node(floor_bytes=1 << 60))
    (full.spool.root / "1.9").write_text("in the way")
    fine = node()
    assert status(fine, _with(dataset(0), StudyInstanceUID="1.9")).Status == 0x0110
    assert status(fine, dataset(0)).Status == 0x0000


def _with(ds: Dataset, **changes: str) -> Dataset:
    """The data set with changed values, which are written as they are, whether they may be or not."""
    for keyword, value in changes.items():
        vr = dictionary_VR(keyword)
        ds[keyword] = DataElement(keyword, vr, value, validation_mode=IGNORE)
    return ds


@pytest.mark.peer
def test_a_connection_lost_within_an_object_leaves_nothing_of_it(node: Callable[..., Node], tmp_path: Path) -> None:
    one = node()
    files = [*slices(tmp_path, 5), save(dataset(5, size=2048), tmp_path / "big.dcm")]
    with lossy_wire(one.listener.port, 1_000_000) as port:
        subprocess.run(
            [tool("storescu"), "-aec", "LUNGNODE", "127.0.0.1", str(port), *files],
            env={**os.environ, "TCP_NODELAY": "1"},
            stderr=subprocess.DEVNULL,
            check=False,
        )
    closed = one.close_one()
    why = "the association was aborted, so its end may be missing"
    assert closed.reason == f"incomplete: {why}; no instance came for 1.5 s"
    assert set(one.kept()) == {dataset(n).SOPInstanceUID for n in range(5)}
    assert [path.name for path in one.spool.root.glob("incoming/*")] == []
    # The sender comes back and sends all again.
    dcmtk("storescu", one, *files)
    wait_for(lambda: len(one.closed) == 2, 10, "the whole series")
    assert (len(one.closed[1].instances), one.closed[1].complete) == (6, True)


@contextmanager
def lossy_wire(target: int, limit: int) -> Iterator[int]:
    """A port that passes on to `target` until `limit` bytes have gone there, then hangs up on both."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def carry() -> None:
            near, _ = server.accept()
            with near, socket.create_connection(("127.0.0.1", target)) as far:
                back = threading.Thread(target=pump, args=(far, near, 1 << 40))
                back.start()
                pump(near, far, limit)
                for end in (near, far):
                    end.shutdown(socket.SHUT_RDWR)
                back.join()

        thread = threading.Thread(target=carry)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def pump(source: socket.socket, sink: socket.socket, limit: int) -> None:
    try:
        while limit > 0 and (data := source.recv(min(limit, 65536))):
            sink.sendall(data)
            limit -= len(data)
    except OSError:
        return


@pytest.mark.peer
def test_a_killed_sender_does_not_hold_its_association(node: Callable[..., Node], tmp_path: Path) -> None:
    one = node()
    command = [tool("storescu"), "-aec", "LUNGNODE", "+sd", "127.0.0.1", str(one.listener.port), str(tmp_path / "many")]
    (tmp_path / "many").mkdir()
    slices(tmp_path / "many", 400)
    sender = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "TCP_NODELAY": "1"})
    wait_for(lambda: len(one.kept()) > 20, 20, "some instances")
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    wait_for(lambda: one.listener.associations == 0, 10, "the association to end")
    assert not one.close_one().complete
    assert len(one.closed[-1].instances) == len(one.kept()) < 400


@pytest.mark.peer
def test_a_stalled_peer_is_dropped_and_probes_do_no_harm(node: Callable[..., Node]) -> None:
    one = node(network_timeout_s=1.0, max_associations=4)
    threads = threading.active_count()
    for _ in range(20):
        socket.create_connection(("127.0.0.1", one.listener.port)).close()
    with socket.create_connection(("127.0.0.1", one.listener.port)) as other:
        other.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with socket.create_connection(("127.0.0.1", one.listener.port)) as stalled:
        stalled.sendall(b"\x01\x00\x00\x00\x01\x00only the beginning of an A-ASSOCIATE-RQ")
        wait_for(lambda: threading.active_count() <= threads, 20, "the threads of the probes to end")
    assert "(Success)" in dcmtk("echoscu", one)


def test_an_idle_association_is_ended_and_its_series_is_whole(node: Callable[..., Node]) -> None:
    one = node(network_timeout_s=2.0)
    with associated(one, CTImageStorage, ExplicitVRLittleEndian) as association:
        for n in range(4):
            assert association.send_c_store(_explicit(dataset(n))).Status == 0x0000
        wait_for(lambda: one.listener.associations == 0, 10, "the idle association to be ended")
    closed = one.close_one()
    assert (closed.complete, len(closed.instances)) == (True, 4)


def _explicit(ds: Dataset) -> Dataset:
    encoded(ds)
    return ds


def test_stopping_waits_for_who_is_sending_and_closes_no_series_whose_sender_it_keeps_out(
    node: Callable[..., Node],
) -> None:
    one = node()
    with associated(one, CTImageStorage, ExplicitVRLittleEndian) as other:
        with associated(one, CTImageStorage, ExplicitVRLittleEndian) as association:
            for n in range(4):
                association.send_c_store(_explicit(dataset(n)))
            stopping = threading.Thread(target=one.listener.stop)
            stopping.start()
            assert association.send_c_store(_explicit(dataset(4))).Status == 0x0000
        # Longer than the grace for a sender's next association, which finds nobody here.
        time.sleep(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", one.listener.port))
        assert other.send_c_store(_explicit(dataset(0, series=f"{STUDY}.3"))).Status == 0x0000
    stopping.join()
    assert one.closed == []
    assert one.spool.ended(STUDY, SERIES, 5)


def test_deflated_data_sets_are_understood(node: Callable[..., Node]) -> None:
    one, ds = node(), dataset(0)
    raw = encoded(ds, DeflatedExplicitVRLittleEndian)
    with associated(one, CTImageStorage, DeflatedExplicitVRLittleEndian) as association:
        send_raw(association, raw, {"AffectedSOPClassUID": CTImageStorage, "AffectedSOPInstanceUID": ds.SOPInstanceUID})
        wait_for(lambda: bool(one.kept()), 5, "the instance")
    assert list(one.kept().values()) == [raw]


def test_a_faulty_assembly_is_told_to_the_sender(node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one = node()
    with monkeypatch.context() as patched:
        patched.setattr(one.assembly, "received", lambda *_: 1 / 0)
        assert status(one, dataset(0)).Status == 0x0110
    assert status(one, dataset(1)).Status == 0x0000
