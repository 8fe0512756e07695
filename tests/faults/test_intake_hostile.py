"""Peers that mean harm, or are only broken: a friend can still store meanwhile, and nothing of them stays behind."""

from __future__ import annotations

import gc
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import wait_for
from made_instances import SERIES, dataset, encoded
from raw_peer import RELEASE, RawPeer, pdu, pdv, request, store, store_command
from structlog.testing import capture_logs
from test_listener import Node

from node.intake.transport import DIRECT, MAXIMUM_PDU, PORCH, STOCK, Transport

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., Node]


@pytest.fixture
def transport() -> Transport:
    """The transport under test, where a test does not name both."""
    return DIRECT


@pytest.fixture
def start(tmp_path: Path, transport: Transport) -> Iterator[Start]:
    """Starts listeners; in the end nothing of any of their peers may be left."""
    threads, files = threading.active_count(), _descriptors()
    nodes: list[Node] = []

    def begin(**options: object) -> Node:
        nodes.append(Node(tmp_path, transport=transport, **options))
        return nodes[-1]

    yield begin
    for node in nodes:
        wait_for(lambda node=node: node.listener.associations == 0, 20, "associations to end")
        assert list(node.spool.root.glob("incoming/*")) == []
        node.listener.stop()
    wait_for(lambda: threading.active_count() <= threads, 20, "threads to end")
    wait_for(lambda: _descriptors() <= files, 20, "file descriptors to be closed")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def friend_stores(node: Node, n: int) -> float:
    """Seconds that an honest peer needs for an association and an instance."""
    begin = time.monotonic()
    with RawPeer(node.listener.port) as friend:
        assert friend.associate() == 2
        friend.send(store(f"{SERIES}.{n + 1}", encoded(dataset(n))))
        assert friend.status() == 0
        friend.send(RELEASE)
        assert friend.answer()[0] == 6
    return time.monotonic() - begin


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4096:
        pytest.skip("no more than 4096 open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_a_thousand_silent_connections_cost_no_thread_and_hold_up_no_friend(start: Start) -> None:
    node, threads = start(), threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", node.listener.port)) for _ in range(500)]
    # Half of them begin an association request and never come to its end.
    for n in range(500):
        silent.append(socket.create_connection(("127.0.0.1", node.listener.port)))
        silent[-1].send(request()[: 20 + n % 100])
    assert threading.active_count() == threads
    assert friend_stores(node, 0) < 5
    assert len(node.listener._server._porch) <= PORCH  # type: ignore[union-attr]
    for one in silent:
        one.close()


@pytest.mark.parametrize("transport", [DIRECT, STOCK])
def test_silence_ends_after_the_artim_timer_in_one_line(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.intake.listener.ACSE_TIMEOUT_S", 1.0)
    node = start()
    with RawPeer(node.listener.port) as silent:
        assert silent.answer() == (0, b"")


def test_half_open_probes_leave_nothing(start: Start) -> None:
    node, threads = start(), threading.active_count()
    for n in range(300):
        with socket.create_connection(("127.0.0.1", node.listener.port)) as probe:
            if n % 3 == 0:  # a reset in place of an orderly end
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert threading.active_count() <= threads + 1
    assert friend_stores(node, 0) < 5
    wait_for(lambda: not node.listener._server._porch, 5, "the probes to be gone")  # type: ignore[union-attr]


STRANGERS = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0",
    pdu(4, bytes(20)),
    b"\x01\0\xff\xff\xff\xff",
    bytes(99),
)


@pytest.mark.parametrize("first", STRANGERS)
def test_what_is_no_association_request_is_aborted_at_once(start: Start, first: bytes) -> None:
    with RawPeer(start().listener.port) as stranger:
        stranger.send(first)
        assert stranger.answer() == (7, b"\0\0\x02\x02")  # by the service provider, unexpected PDU
        assert stranger.answer() == (0, b"")


BREACHES = {
    "a PDU of 4 GB": b"\x04\0\xff\xff\xff\xff",
    "a PDU longer than negotiated": pdu(4, bytes(MAXIMUM_PDU + 1)),
    "an unknown PDU": pdu(9, bytes(4)),
    "an association within the association": request(),
    "a value longer than its PDU": pdu(4, struct.pack(">LBB", 999, 1, 3) + bytes(20)),
    "a value without a head": pdu(4, bytes(4)),
    "a value of no length": pdu(4, struct.pack(">LBB", 0, 1, 3)),
    "a data set without a command": pdu(4, pdv(2, bytes(100))),
    "another context": pdu(4, pdv(3, store_command("1.2"), context_id=3)),
    "a context that changes": pdu(4, pdv(3, store_command("1.2"))) + pdu(4, pdv(2, bytes(99), context_id=3)),
    "two commands": 2 * pdu(4, pdv(3, store_command("1.2"))),
    "a command that is none": pdu(4, pdv(3, b"\xff" * 40)),
    "a command of an unknown kind": pdu(4, pdv(3, store_command("1.2", field=0x7777, data=0x0101))),
    "a command without an end": 80 * pdu(4, pdv(1, bytes(16000))),
    "a C-ECHO with megabytes": pdu(4, pdv(3, store_command("1.2", field=0x30))) + 80 * pdu(4, pdv(0, bytes(16000))),
}


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_of_the_protocol_is_answered_with_an_abort(start: Start, breach: bytes) -> None:
    node, heard = start(), True
    with RawPeer(node.listener.port) as peer, capture_logs() as lines:
        assert peer.associate() == 2
        try:
            peer.send(breach)
        except ConnectionError:
            heard = False
        assert peer.answer()[0] in ((7,) if heard and len(breach) < 100_000 else (7, 0))
    told = [line for line in lines if line["log_level"] == "warning"]
    assert len(told) == 1
    assert told[0]["mend"]
    assert friend_stores(node, 0) < 5


@pytest.mark.parametrize("transport", [STOCK])
# pynetdicom's thread of an association dies of some of these; the listener sees that it did.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_transport_outlives_all_of_it(start: Start) -> None:
    """pynetdicom says less, and later; what was promised to others holds all the same."""
    node = start(network_timeout_s=2.0)
    tricks = ("../../etc/passwd", "/etc/passwd", "1.2\0.3", "1" * 65, "", "\n")
    raw = encoded(dataset(0))
    bad = [(False, first) for first in STRANGERS]
    bad += [(True, breach) for breach in BREACHES.values()]
    bad += [(True, store(trick, raw)) for trick in tricks]
    for associate, bytes_sent in bad:
        with RawPeer(node.listener.port) as peer, suppress(ConnectionError):
            if associate:
                assert peer.associate() == 2
            peer.send(bytes_sent)
    assert friend_stores(node, 5) < 5
    assert node.kept().keys() <= {f"{SERIES}.6"}
    gc.collect()


def test_path_tricks_and_no_data_set_are_refused_by_status(start: Start) -> None:
    node = start()
    raw = encoded(dataset(0))
    with RawPeer(node.listener.port) as peer:
        assert peer.associate() == 2
        for trick in ("../../etc/passwd", "/etc/passwd", "1.2\0.3", "1" * 65, "", "\n"):
            peer.send(store(trick, raw))
            assert peer.status() == 0xC000, trick
        peer.send(pdu(4, pdv(3, store_command("1.2", data=0x0101))))
        assert peer.status() == 0xC000
    assert {path.name for path in node.spool.root.iterdir()} == {"incoming"}


@pytest.mark.parametrize("transport", [DIRECT, STOCK])
def test_a_command_in_bits_and_values_packed_together_are_understood(start: Start) -> None:
    node, raw, uid = start(), encoded(dataset(0)), f"{SERIES}.1"
    command = store_command(uid)
    values = [
        pdv(1, command[:10]),
        pdv(1, command[10:11]),
        pdv(3, command[11:]),
        pdv(0, raw[:7]),
        pdv(0, raw[7:7]),
        pdv(2, raw[7:]),
    ]
    for together in (True, False):
        with RawPeer(node.listener.port) as peer:
            assert peer.associate() == 2
            for part in [b"".join(values)] if together else values:
                peer.send(pdu(4, part))
            assert peer.status() == 0
    assert node.kept() == {uid: raw}


def test_slow_writers_are_dropped_by_the_pdu_and_hold_up_no_friend(start: Start) -> None:
    node = start(network_timeout_s=2.0)
    whole = store(f"{SERIES}.9", encoded(dataset(8)))
    stop = threading.Event()
    ended: list[float] = []

    def drip() -> None:
        begin = time.monotonic()
        with RawPeer(node.listener.port) as peer:
            assert peer.associate() == 2
            try:
                for n in range(len(whole)):
                    peer.send(whole[n : n + 1])
                    if stop.wait(0.2):
                        return
            except OSError:
                ended.append(time.monotonic() - begin)

    writers = [threading.Thread(target=drip) for _ in range(8)]
    for writer in writers:
        writer.start()
    for n in range(5):
        assert friend_stores(node, n) < 5
    for writer in writers:
        writer.join(10)
    stop.set()
    assert len(ended) == 8
    assert f"{SERIES}.9" not in node.kept()


@pytest.mark.parametrize("transport", [DIRECT, STOCK])
def test_a_flood_of_associations_leaves_room_for_another_peer(start: Start) -> None:
    node = start(max_associations=8)
    holding, rejected = [], 0
    for _ in range(60):
        peer = RawPeer(node.listener.port)
        holding.append(peer)
        rejected += peer.associate(calling="FLOOD") == 3
    assert rejected == 60 - 6
    assert friend_stores(node, 0) < 5
    with RawPeer(node.listener.port) as more:
        more.send(request(calling="FLOOD"))
        assert more.answer() == (3, b"\0\x02\x03\x02")  # transient, local limit exceeded
    for peer in holding:
        peer.socket.close()


def test_memory_does_not_grow_with_an_instance_nor_with_one_that_never_ends(start: Start) -> None:
    node = start()
    process = psutil.Process()
    fragment = pdu(4, pdv(0, bytes(100_000)))
    with RawPeer(node.listener.port) as peer:
        assert peer.associate() == 2
        peer.send(pdu(4, pdv(3, store_command(f"{SERIES}.1"))))
        for _ in range(50):
            peer.send(fragment)
        before = process.memory_info().rss
        for _ in range(3000):  # 300 MB
            peer.send(fragment)
        assert process.memory_info().rss - before < 20 << 20
        (part,) = node.spool.root.glob("incoming/*.part")
        wait_for(lambda: part.stat().st_size > 290 << 20, 20, "the bytes to be on disk")
        node.spool._floor = 1 << 60  # from here on the disk counts as full
        for _ in range(300):
            peer.send(fragment)
        wait_for(lambda: not part.exists(), 20, "what there is of it to be dropped")
        peer.send(pdu(4, pdv(2, bytes(2))))
        assert peer.status() == 0xA700
