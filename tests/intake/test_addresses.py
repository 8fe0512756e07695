"""An AE title is used from its peer's addresses only: by address, network, name, and through every way around it."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from made_instances import SERIES, dataset, encoded
from pynetdicom.sop_class import Verification
from raw_peer import RawPeer, pdu, pdv, request, store, store_command
from structlog.testing import capture_logs
from test_listener import Node
from typer.testing import CliRunner

from node import __version__
from node.cli.main import app
from node.config import ADDRESSES_ENFORCED_FROM, Listener, parse
from node.intake import admission
from node.intake import listener as listener_module
from node.intake.transport import DIRECT, STOCK
from node.network import addresses as module
from node.network.addresses import PeerAddresses, entry, group, shown

pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")

#: Who is refused, and who has to come again later (PS3.8 table 9-21).
NOT_RECOGNISED, LATER = b"\0\x01\x01\x03", b"\0\x02\x01\x01"
STRANGER = "127.0.0.77"

Start = Callable[..., Node]


def bound(*peers: tuple[str, str, Any], enforce: bool = True, memory: Path | None = None) -> PeerAddresses:
    """(AE title, host, addresses) of peers whose names are their AE titles in lower case."""
    entries = [entry(f"{ae.lower()}-{n}", ae, host, addresses) for n, (ae, host, addresses) in enumerate(peers)]
    return PeerAddresses(entries, enforce=enforce, memory=memory)


@pytest.fixture(params=[DIRECT, STOCK])
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    nodes: list[Node] = []

    def begin(**options: Any) -> Node:
        nodes.append(Node(tmp_path, **{"transport": request.param, **options}))
        return nodes[-1]

    yield begin
    for one in nodes:
        one.listener.stop()


def ask(node: Node, calling: str, source: str = "127.0.0.1", **more: str) -> tuple[int, bytes]:
    with RawPeer(node.listener.port, source=source) as peer:
        peer.send(request(calling=calling, **more))
        return peer.answer()


def test_a_stranger_stores_nothing_under_a_known_ae_title(start: Start) -> None:
    for accept in (frozenset({"CT1"}), None):  # listener.accept: known, any
        node = start(addresses=bound(("CT1", "127.0.0.1", None)), known_peers=accept)
        with capture_logs() as lines:
            assert ask(node, "CT1", STRANGER) == (3, NOT_RECOGNISED)
        (line,) = (line for line in lines if line["event"] == "association rejected")
        assert (line["address"], line["calling_ae"]) == (STRANGER, "CT1")
        assert f"add {STRANGER} to peers.ct1-0.addresses" in line["hint"]
        assert ask(node, "CT1")[0] == 2
        assert ask(node, "OTHER", STRANGER)[0] == (3 if accept else 2)
        with RawPeer(node.listener.port) as peer:
            assert peer.associate() == 2
            peer.send(store(f"{SERIES}.1", encoded(dataset(0))))
            assert peer.status() == 0
        node.listener.stop()


@pytest.mark.parametrize(
    ("addresses", "source", "welcome"),
    [
        (("127.0.0.77",), STRANGER, True),
        (("127.0.0.77",), "127.0.0.1", False),
        (("192.0.2.1", "127.0.0.64/26"), STRANGER, True),
        (("127.0.0.64/26",), "127.0.0.1", False),
        (("localhost",), "127.0.0.1", True),
        (("localhost",), STRANGER, False),
        (("::1",), "127.0.0.1", True),
        (("::ffff:127.0.0.77",), STRANGER, True),
        (("::ffff:127.0.0.64/122",), STRANGER, True),
        ("any", STRANGER, True),
    ],
)
def test_addresses_networks_names_and_any(addresses: Any, source: str, welcome: bool, tmp_path: Path) -> None:
    node = Node(tmp_path, addresses=bound(("CT1", "192.0.2.9", addresses)))
    assert ask(node, "CT1", source) == ((2, ask(node, "CT1", source)[1]) if welcome else (3, NOT_RECOGNISED))
    node.listener.stop()


def test_peers_that_share_an_ae_title_may_each_call_from_their_own_addresses() -> None:
    peers = bound(("CT", "192.0.2.1", None), ("CT", "192.0.2.2", ("198.51.100.0/24",)), ("PACS", "192.0.2.3", None))
    assert peers.check("CT", "192.0.2.1") == ("own", "ct-0")
    assert peers.check("CT", "198.51.100.7") == ("own", "ct-1")
    assert peers.check("CT", "192.0.2.2")[0] == peers.check("CT", "192.0.2.3")[0] == "elsewhere"
    assert peers.check("ct", "192.0.2.1")[0] == peers.check("CT ", "192.0.2.1")[0] == "unknown"


def test_forms_of_an_address() -> None:
    peers = bound(
        ("A", "192.0.2.1", None), ("B", "2001:db8::1", None), ("C", "127.0.0.1", None), ("D", "fe80::1", None)
    )
    assert peers.check("A", "::ffff:192.0.2.1")[0] == "own"
    assert peers.check("B", "2001:DB8:0::1")[0] == "own"
    assert peers.check("C", "::1")[0] == "own"
    # A program on this machine that calls one of our own addresses comes from that very address.
    assert peers.check("C", "192.0.2.99", "192.0.2.99")[0] == "own"
    assert peers.check("C", "192.0.2.99", "192.0.2.98")[0] == "elsewhere"
    assert peers.check("D", "fe80::1%eth0")[0] == "own"
    assert peers.check("A", "no address")[0] == "elsewhere"
    assert (shown("::ffff:192.0.2.1"), shown("fe80::1%eth0")) == ("192.0.2.1", "fe80::1")
    assert group("2001:db8::1") == group("2001:db8::ffff:1") != group("2001:db8:0:1::1")
    assert group("192.0.2.1") != group("192.0.2.2")


def test_ipv6_listener_knows_the_ipv4_peer(tmp_path: Path) -> None:
    try:
        node = Node(tmp_path, host="::", addresses=bound(("CT1", "127.0.0.1", None)))
    except OSError:
        pytest.skip("no IPv6 here")
    for host, kind in (("127.0.0.1", 2), ("::1", 2)):
        with socket.create_connection((host, node.listener.port), timeout=5) as peer:
            peer.sendall(request())
            assert peer.recv(1)[0] == kind, host
    assert ask(node, "CT1", STRANGER) == (3, NOT_RECOGNISED)
    node.listener.stop()


def test_an_upgraded_node_warns_once_per_peer_and_address(start: Start) -> None:
    peers = bound(("CT1", "127.0.0.1", None), ("PACS", "127.0.0.1", ("127.0.0.1",)), enforce=False)
    node = start(addresses=peers)
    with capture_logs() as lines:
        for _ in range(3):
            assert ask(node, "CT1", STRANGER)[0] == 2
        assert ask(node, "CT1")[0] == 2
        assert ask(node, "CT1", "127.0.0.78")[0] == 2
        assert ask(node, "PACS", STRANGER) == (3, NOT_RECOGNISED)  # addresses that are named are enforced
    warned = [line for line in lines if line["event"] == "peer calls from an address that is not its own"]
    assert [line["address"] for line in warned] == [STRANGER, "127.0.0.78"]
    assert all("peers.ct1-0.addresses" in line["hint"] for line in warned)


def test_many_addresses_do_not_end_the_warnings(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_WARNED", 2)
    node = start(addresses=bound(("CT1", "127.0.0.1", None), enforce=False))
    callers = [f"127.0.0.{n}" for n in range(71, 75)]
    with capture_logs() as lines:
        assert [ask(node, "CT1", one)[0] for one in callers] == [2] * 4
    warned = [line for line in lines if line["event"] == "peer calls from an address that is not its own"]
    assert [line["address"] for line in warned] == callers


def test_the_end_of_the_warnings_is_not_forgotten() -> None:
    release = tuple(map(int, __version__.split(".")[:2]))
    ends = tuple(map(int, ADDRESSES_ENFORCED_FROM.split(".")[:2]))
    assert Listener().addresses == ("enforce" if release >= ends else "warn")


def test_names_are_looked_up_in_the_background_and_the_last_good_answer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.2)
    monkeypatch.setattr(module, "REFRESH_EARLY_S", 0.05)
    answers: dict[str, Any] = {"pacs.example": ["192.0.2.1", "2001:db8::1", "192.0.2.2"], "gone.example": None}
    hanging = threading.Event()

    def look_up(name: str, *_: Any, **__: Any) -> list[Any]:
        if name == "slow.example":
            hanging.wait(20)
        if answers.get(name) is None:
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return [(0, 0, 0, "", (one, 0)) for one in answers[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    memory = tmp_path / "addresses.json"

    def peers() -> PeerAddresses:
        made = bound(
            *((n.split(".")[0].upper(), n, None) for n in ("pacs.example", "gone.example", "slow.example")),
            memory=memory,
        )
        begin = time.monotonic()
        with capture_logs() as lines:
            made.start()
        assert time.monotonic() - begin < 2  # though one of them hangs
        told = [line for line in lines if line["event"] == "host name of a peer cannot be looked up"]
        assert {line["host"] for line in told} >= {"gone.example"}
        assert all("addresses" in line["hint"] for line in told)
        return made

    made = peers()
    try:
        for address in ("192.0.2.1", "2001:db8::1", "::ffff:192.0.2.2"):
            assert made.check("PACS", address)[0] == "own"
        begin = time.monotonic()
        assert made.check("PACS", "192.0.2.3")[0] == "elsewhere"
        assert made.check("GONE", "192.0.2.3")[0] == made.check("SLOW", "192.0.2.3")[0] == "unresolved"
        assert time.monotonic() - begin < 0.1
        # It moved: that it called from elsewhere has its name looked up again at once.
        answers["pacs.example"] = ["192.0.2.3"]
        wait_for(lambda: made.check("PACS", "192.0.2.3")[0] == "own", 5, "the new address")
        answers["pacs.example"] = None
        made.check("PACS", "192.0.2.9")
        time.sleep(0.3)
        assert made.check("PACS", "192.0.2.3")[0] == "own"  # the resolver is down
        made.stop()
        assert "192.0.2.3" in json.loads(memory.read_text())["pacs.example"]
        made = peers()  # and still is after a restart
        assert made.check("PACS", "192.0.2.3")[0] == "own"
    finally:
        hanging.set()
        made.stop()


def test_a_peer_whose_name_is_not_resolved_yet_is_asked_to_come_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    node = start(addresses=bound(("CT1", "no-such-host.invalid", None)))
    assert ask(node, "CT1") == (3, LATER)


@pytest.mark.parametrize(
    ("addresses", "what", "hint"),
    [
        ("[192.0.2.300]", "no address", "192.0.2.0/24"),
        ("[192.0.2.7/24]", "within a network", "192.0.2.0/24 for the whole network"),
        ("192.0.2.1:104", "no address", "host name"),
        ("[any]", "'any' is no address", "without a list"),
        ("[]", "names no address", "leave the key out"),
        ("['ct one']", "no address", "host name"),
    ],
)
def test_malformed_addresses_are_named_with_line_key_and_fix(addresses: str, what: str, hint: str) -> None:
    text = f"peers:\n  pacs:\n    ae_title: P\n    host: h\n    port: 1\n    addresses: {addresses}\n"
    with pytest.raises(ValueError, match=what) as caught:
        parse(text, Path("node.yaml"))
    (problem,) = caught.value.problems  # type: ignore[attr-defined]
    assert problem.line == 6
    assert problem.key.startswith("peers.pacs.addresses")
    assert hint in problem.hint


def test_hints_name_peers_without_addresses() -> None:
    peer = "{ae_title: P, host: h, port: 1"
    settings = parse(
        f"peers:\n  open: {peer}}}\n  bound: {peer}, addresses: 192.0.2.1}}\n  free: {peer}, addresses: any}}\n"
    )
    hints = settings.hints()
    assert [hint.split(":")[0] for hint in hints] == ["peers.open.addresses", "listener.addresses"]
    assert settings.peers["bound"].addresses == ("192.0.2.1",)


def test_config_check_says_what_had_better_be_set(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("peers:\n  open: {ae_title: P, host: '[h]', port: 1}\n")
    done = CliRunner().invoke(app, ["config", "check", str(file)])
    assert done.exit_code == 0
    assert "hint: peers.open.addresses: not set, so it may call from what its host '[h]' resolves to" in done.output
    assert "from version 0.3.0" in done.output


@pytest.mark.parametrize("padding", [b"\0", b" "])
def test_ae_titles_are_compared_without_their_filling(tmp_path: Path, padding: bytes) -> None:
    node = Node(tmp_path, addresses=bound(("CT1", "127.0.0.1", None)), known_peers=frozenset({"CT1"}))
    plain = request()

    def titled(called: bytes, calling: bytes) -> tuple[int, bytes]:
        with RawPeer(node.listener.port) as peer:
            peer.send(plain[:10] + called.ljust(16, padding) + calling.ljust(16, padding) + plain[42:])
            return peer.answer()

    assert titled(b"LUNGNODE", b"CT1")[0] == titled(b"  LUNGNODE", b" CT1")[0] == 2
    for calling in (b"ct1", b"CT1\x1f", b"CT1\n", b"CT\0001", b"CT1\xa0", b"", b"CT1\\"):
        assert titled(b"LUNGNODE", calling) == (3, NOT_RECOGNISED), calling
    for called in (b"lungnode", b"", b"LUNGNODE\x1f"):
        assert titled(called, b"CT1") == (3, b"\0\x01\x01\x07"), called
    node.listener.stop()


def test_control_characters_reach_no_log(tmp_path: Path) -> None:
    node, plain = Node(tmp_path), request()
    with capture_logs() as lines, RawPeer(node.listener.port) as peer:
        peer.send(plain[:10] + b"\x1b[31mEVIL".ljust(16) + b"\x1b[2JX".ljust(16) + plain[42:])
        assert peer.answer()[0] == 3
    node.listener.stop()
    assert "\x1b" not in repr(lines) + "".join(str(value) for line in lines for value in line.values())


@pytest.mark.parametrize("case", ["refused", "warned", "unknown titles"])
def test_40_idle_associations_from_one_address_lock_nobody_out(start: Start, case: str) -> None:
    peers = bound(("CT1", "127.0.0.1", None), ("PACS", "127.0.0.2", None), enforce=case == "refused")
    node = start(addresses=peers, max_associations=16)
    with ExitStack() as stack:
        held = 0
        for n in range(40):
            calling = f"ANY{n}" if case == "unknown titles" else ("CT1", "PACS")[n % 2]
            peer = stack.enter_context(RawPeer(node.listener.port, source="127.0.0.66"))
            held += peer.associate(calling=calling) == 2
        assert held == (0 if case == "refused" else 12)
        begin = time.monotonic()
        assert ask(node, "CT1")[0] == ask(node, "PACS", "127.0.0.2")[0] == 2
        assert time.monotonic() - begin < 5


def test_c_echo_keeps_few_associations_of_an_address(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "IDLE_S", 1.0)
    node = start()
    echo = pdu(4, pdv(3, store_command("1.2", sop_class=Verification, field=0x30, data=0x0101)))
    with ExitStack() as stack, capture_logs() as lines:
        peers = [stack.enter_context(RawPeer(node.listener.port, source=f"127.0.0.{2 + n // 8}")) for n in range(16)]
        assert all(peer.associate(sop_class=Verification) == 2 for peer in peers)
        ended = set[int]()
        for _ in range(6):
            for n, peer in enumerate(peers):
                try:
                    if n not in ended:
                        peer.send(echo)
                        if peer.status() is None:
                            ended.add(n)
                except OSError:
                    ended.add(n)
            time.sleep(0.4)
        # The youngest of each address stay, for as long as they please.
        assert ended == {0, 1, 2, 3, 8, 9, 10, 11}
        assert node.listener.associations == 8
    assert {line["address"] for line in lines if line["event"] == "idle association ended"} == {
        "127.0.0.2",
        "127.0.0.3",
    }


def test_who_sends_is_not_idle(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "IDLE_S", 0.5)
    node = start()
    with ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(node.listener.port)) for _ in range(6)]
        assert all(peer.associate() == 2 for peer in peers)
        for round_, (n, peer) in itertools.product(range(4), enumerate(peers)):
            peer.send(store(f"{SERIES}.{n}.{round_}", _named(f"{SERIES}.{n}.{round_}")))
            assert peer.status() == 0
            time.sleep(0.05)
        assert node.listener.associations == 6


def _named(uid: str) -> bytes:
    ds = dataset(0)
    ds.SOPInstanceUID = uid
    return encoded(ds)


def test_every_line_about_an_association_has_its_address(start: Start) -> None:
    node = start()
    with capture_logs() as lines:
        with RawPeer(node.listener.port, source=STRANGER) as peer:
            assert peer.associate() == 2
            peer.send(store(f"{SERIES}.1", b"GET / HTTP/1.1\r\n\r\n"))
            assert peer.status() == 0xC000
        wait_for(lambda: node.listener.associations == 0, 10, "the association to end")
        ask(node, "CT1", STRANGER, called="OTHER")
    events = {"association", "C-STORE refused", "association ended", "association rejected"}
    assert {line["event"] for line in lines if line.get("address") == STRANGER} == events
