"""Peers that mean harm, or are only broken: a friend can still store meanwhile, and nothing of them stays behind."""

from __future__ import annotations

import gc
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from conftest import wait_for
from made_instances import SERIES, dataset, encoded
from pynetdicom.sop_class import Verification
from raw_peer import RELEASE, RawPeer, pdu, pdv, request, store, store_command
from structlog.testing import capture_logs
from test_listener import Node

from node.intake.listener import Listener
from node.intake.transport import DIRECT, STOCK, Transport
from node.intake.transport.pdu import MAXIMUM_PDU
from node.intake.transport.request import MAXIMUM_REQUEST
from node.intake.transport.server import MAXIMUM_PENDING
from node.network.addresses import PeerAddresses, entry
from node.telemetry.quota import IN_ALL, PER_ADDRESS, LogQuota

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
    assert len(node.listener._server._pending) <= MAXIMUM_PENDING  # type: ignore[union-attr]
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
    wait_for(lambda: not node.listener._server._pending, 5, "the probes to be gone")  # type: ignore[union-attr]


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
    assert told[0]["hint"]
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


ECHO = pdu(4, pdv(3, store_command("1.2", sop_class=Verification, field=0x30, data=0x0101)))
#: C-FIND-RQ with an identifier of 900 kB, for which no context was accepted; it is answered after those before it.
FIND = pdu(4, pdv(3, store_command("1.2", sop_class=Verification, field=0x20))) + b"".join(
    pdu(4, pdv(2 if n == 8 else 0, bytes(100_000))) for n in range(9)
)


def test_requests_that_are_not_answered_do_not_pile_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may send one request at a time (PS3.7 D.3.3.3); each may have a megabyte."""
    slow = threading.Event()
    monkeypatch.setattr(Listener, "_on_echo", lambda _self, _event: 0 * slow.wait(20))
    node = start()
    with RawPeer(node.listener.port) as peer, capture_logs() as lines:
        assert peer.associate(sop_class=Verification) == 2
        with suppress(ConnectionError):
            peer.send(ECHO, *[FIND] * 20)
        wait_for(lambda: any(line["event"] == "association aborted" for line in lines), 10, "the abort")
        slow.set()
    assert "more requests come than are answered" in {line.get("reason") for line in lines}
    assert friend_stores(node, 0) < 5


def test_requests_that_come_together_are_answered_at_once(start: Start) -> None:
    node = start()
    with RawPeer(node.listener.port) as peer:
        assert peer.associate(sop_class=Verification) == 2
        begin = time.monotonic()
        peer.send(ECHO * 4)
        assert [peer.status() for _ in range(4)] == [0] * 4
        assert time.monotonic() - begin < 2


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


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def large_request(calling: str, contexts: int, syntaxes: int, classes: int = 0, roles: int = 0) -> bytes:
    """A-ASSOCIATE-RQ with so many contexts, transfer syntaxes in each, and items of extended negotiation."""
    context = item(0x30, b"1.2.840.10008.5.1.4.1.1.2") + item(0x40, b"1.2.840.10008.1.2.1")
    context += b"".join(item(0x40, f"1.2.840.10008.1.2.4.{n % 90}".encode()) for n in range(syntaxes - 1))
    body = b"".join(item(0x20, bytes(((2 * n + 1) % 256, 0, 0, 0)) + context) for n in range(contexts))
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3")
    user += item(0x56, struct.pack(">H", 3) + b"1.2" + b"\0") * classes
    user += item(0x54, struct.pack(">H", 3) + b"1.2" + b"\0\1") * roles
    plain = request(calling=calling)
    return pdu(1, plain[6:74] + item(0x10, b"1.2.840.10008.3.1.1.1") + body + item(0x50, user))


def known(**more: object) -> dict[str, object]:
    peers = PeerAddresses([entry("ct1", "CT1", "127.0.0.1", None)], enforce=True)
    return {"addresses": peers, "known_peers": frozenset({"CT1"}), **more}


def cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


@pytest.mark.parametrize(
    ("length", "kind"), [(MAXIMUM_REQUEST + 1, 7), (1 << 20, 7), (0xFFFFFFFF, 7), (67, 7), (MAXIMUM_REQUEST, 0)]
)
def test_a_request_that_is_too_long_is_refused_by_its_head(start: Start, length: int, kind: int) -> None:
    node = start()
    with RawPeer(node.listener.port, timeout=0.5) as peer:
        peer.send(struct.pack(">BBL", 1, 0, length))
        if kind:
            assert peer.answer()[0] == kind
        else:
            with pytest.raises(TimeoutError):
                peer.answer()


def test_what_a_stranger_asks_for_is_never_parsed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start(**known())
    parsed: list[object] = []
    monkeypatch.setattr("node.intake.transport.server.Handler", lambda *_: parsed.append(1))
    monkeypatch.setattr("node.intake.transport.server.fault_in", lambda *_: parsed.append(1))
    whole = large_request("NOBODY", 128, 40)
    with RawPeer(node.listener.port) as peer:
        peer.send(whole[:-1])
        wait_for(lambda: any(one.answer for one in node.listener._server._pending.values()), 5, "the refusal")  # type: ignore[union-attr]
        assert all(len(one.received) <= 74 for one in node.listener._server._pending.values())  # type: ignore[union-attr]
        peer.send(whole[-1:])
        assert peer.answer() == (3, b"\0\1\1\3")
        assert peer.answer() == (0, b"")
    assert parsed == []


@pytest.mark.parametrize(
    ("contexts", "syntaxes", "classes", "roles", "welcome"),
    [
        (128, 40, 128, 128, True),
        (129, 1, 0, 0, False),
        (64, 200, 0, 0, False),
        (1, 1, 1100, 0, False),
        (1, 1, 0, 1100, False),
    ],
)
def test_items_of_a_request_are_bounded(
    start: Start, contexts: int, syntaxes: int, classes: int, roles: int, welcome: bool
) -> None:
    node, whole = start(**known()), large_request("CT1", contexts, syntaxes, classes, roles)
    assert len(whole) <= MAXIMUM_REQUEST or not welcome
    begin = cpu_s()
    with RawPeer(node.listener.port) as peer, suppress(ConnectionError):
        peer.send(whole)
        assert peer.answer()[0] == (2 if welcome else 7)
    assert welcome or cpu_s() - begin < 0.1


@pytest.mark.parametrize(
    "fault",
    [
        lambda whole: whole[:76] + b"\xff\xff" + whole[78:],  # an item longer than the request
        lambda whole: pdu(1, whole[6:] + b"\x20\0"),  # an item without an end
        lambda whole: pdu(1, whole[6:74] + item(0x20, b"\1\0\0\0" + b"\x40\0\0\x40")),
    ],
)
def test_a_malformed_request_is_aborted_before_it_has_a_thread(start: Start, fault: Callable[[bytes], bytes]) -> None:
    node, threads = start(), threading.active_count()
    with RawPeer(node.listener.port) as peer, capture_logs() as lines:
        peer.send(fault(request()))
        assert peer.answer() == (7, b"\0\0\2\2")
        wait_for(lambda: bool(lines), 5, "the log line")
    assert threading.active_count() == threads
    assert [line["reason"] for line in lines] == ["an association request is malformed"]


def test_a_request_in_single_bytes_is_understood(start: Start) -> None:
    node = start(**known())
    with RawPeer(node.listener.port) as peer:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for one in request():
            peer.send(bytes((one,)))
        assert peer.answer()[0] == 2


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("calling", ["NOBODY", "CT1"])
def test_1500_connections_that_ask_and_stay_cost_no_threads_and_few_lines(start: Start, calling: str) -> None:
    """A stranger, and one who uses the AE title of a known peer."""
    node, threads, most = start(**known()), threading.active_count(), 0
    held, memory = list[RawPeer](), psutil.Process().memory_info().rss
    with capture_logs() as lines:
        for n in range(1500):
            held.append(RawPeer(node.listener.port, source=f"127.0.1.{1 + n % 3}"))
            held[-1].send(request(calling=calling))
            if n % 100 == 0:
                most = max(most, threading.active_count())
        assert most <= threads
        assert friend_stores(node, 0) < 5
        assert all(peer.answer()[0] in (3, 0) for peer in held)
    told = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert 3 <= len(told) <= 3 * PER_ADDRESS
    assert {line["address"] for line in told} == {"127.0.1.1", "127.0.1.2", "127.0.1.3"}
    assert psutil.Process().memory_info().rss - memory < 64 << 20
    for peer in held:
        peer.socket.close()


def test_one_address_pushes_no_other_out_of_those_that_wait(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.intake.transport.server.MAXIMUM_PENDING", 20)
    node, whole = start(), request()
    with RawPeer(node.listener.port, source="127.0.0.9") as slow, ExitStack() as stack:
        slow.send(whole[:50])  # it came first, and is slow
        wait_for(lambda: len(node.listener._server._pending) == 1, 5, "the first")  # type: ignore[union-attr]
        for _ in range(100):
            stack.enter_context(RawPeer(node.listener.port, source="127.0.0.8"))
        wait_for(lambda: len(node.listener._server._pending) == 20, 5, "the others")  # type: ignore[union-attr]
        slow.send(whole[50:])
        assert slow.answer()[0] == 2


@pytest.mark.parametrize("transport", [DIRECT, STOCK])
def test_failures_of_a_known_peer_fill_no_log(start: Start) -> None:
    node = start(**known())
    with RawPeer(node.listener.port) as peer, capture_logs() as lines:
        assert peer.associate() == 2
        for _ in range(100):
            peer.send(store(f"{SERIES}.1", b"GET / HTTP/1.1\r\n\r\n"))
            assert peer.status() == 0xC000
        assert len([line for line in lines if line["event"] == "C-STORE refused"]) == PER_ADDRESS
        node.listener.quota._since -= 61
        wait_for(lambda: any(line["event"] == "log lines left out" for line in lines), 5, "the count of the rest")
    (count,) = (line for line in lines if line["event"] == "log lines left out")
    assert count["count"] == 100 - PER_ADDRESS
    assert "127.0.0.1 (90)" in count["most_from"]


def test_lines_about_many_addresses_are_bounded_too() -> None:
    written: list[str] = []

    class Log:
        def warning(self, event: str, **_: object) -> None:
            written.append(event)

    now = 0.0
    quota = LogQuota(Log(), lambda address: address, lambda: now)  # type: ignore[arg-type]
    for n in range(5000):
        quota.warning("x", f"192.0.{n // 250}.{n % 250}")
    assert len(written) == IN_ALL
    assert len(quota._left_out) <= IN_ALL + 1
    now = 61.0
    quota.flush()
    assert written[IN_ALL:] == ["log lines left out"]


def test_an_association_that_cannot_be_started_leaves_its_place(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start(max_associations=4)
    with monkeypatch.context() as patched:
        patched.setattr("pynetdicom.association.Association.start", lambda _: 1 / 0)
        for _ in range(10):
            with RawPeer(node.listener.port) as peer:
                peer.send(request())
                assert peer.answer() == (0, b"")
    wait_for(lambda: node.listener.associations == 0, 5, "the places to be free")
    assert friend_stores(node, 0) < 5
