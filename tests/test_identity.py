"""What peers see of who lungnode is: on associations in both directions, and in every file."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import REPOSITORY
from made_instances import dataset, encoded
from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from raw_peer import RawPeer, request, store

from node.config import Peer
from node.intake.admission import ListenerOptions
from node.intake.assembly import Assembly
from node.intake.listener import Listener
from node.intake.series import Host
from node.intake.series_count import count_instances
from node.intake.spool import Spool
from node.network.associations import PeerError, echo
from node.results.makers import not_analysed

Identity = tuple[str, str]


def stated() -> Identity:
    """Implementation class UID and version name as the conformance statement has them."""
    text = (REPOSITORY / "docs" / "conformance.md").read_text()
    found = [re.search(rf"\| implementation {name} \| (\S[^|]*?) \|", text) for name in ("class UID", "version name")]
    assert all(found)
    return found[0][1], found[1][1]  # type: ignore[index]


def negotiated(pdu: bytes) -> Identity:
    """The same, of the user information of an A-ASSOCIATE-RQ or -AC (PS3.7 D.3.3.2)."""
    at, inside = 68, dict[int, bytes]()
    while at < len(pdu):
        kind, _, length = struct.unpack_from(">BBH", pdu, at)
        if kind == 0x50:  # its sub-items follow
            at += 4
            continue
        inside[kind] = pdu[at + 4 : at + 4 + length]
        at += 4 + length
    return inside[0x52].decode(), inside[0x55].decode()


def test_listener_answers_with_the_stated_identity_and_writes_it_into_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 0)
    listener = Listener(ListenerOptions("LUNGNODE", 0, "127.0.0.1"), spool, Assembly(Host(), 60.0))
    listener.start()
    try:
        with RawPeer(listener.port) as peer:
            peer.send(request())
            kind, accepted = peer.answer()
            assert kind == 2
            one = dataset(1)
            peer.send(store(one.SOPInstanceUID, encoded(one)))
            assert peer.status() == 0x0000
    finally:
        listener.stop()
    assert negotiated(accepted) == stated()
    (file,) = (tmp_path / "spool").rglob("*.dcm")
    meta = read_file_meta_info(file)
    assert (meta.ImplementationClassUID, meta.ImplementationVersionName) == stated()


@pytest.mark.parametrize(
    "associate",
    [lambda peer: echo(peer, "LUNGNODE"), lambda peer: count_instances(peer, "LUNGNODE", "1.2", "1.3")],
    ids=["association to store or to echo", "query for a count"],
)
def test_associations_that_we_open_state_the_same(associate: Callable[[Peer], object]) -> None:
    asked = list[bytes]()

    def hear() -> None:
        connection, _ = server.accept()
        with connection:
            head = connection.recv(6, socket.MSG_WAITALL)
            asked.append(connection.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hear)
        thread.start()
        with suppress(PeerError):  # the server hangs up, having heard enough
            associate(Peer(ae_title="PACS", host="127.0.0.1", port=server.getsockname()[1]))
        thread.join(10)
    assert negotiated(asked[0]) == stated()


def test_result_files_state_the_same(tmp_path: Path) -> None:
    made = not_analysed([dataset(1)], "a test", tmp_path, content_datetime=datetime(2026, 1, 2, tzinfo=UTC))
    assert made
    for one in made:
        meta = dcmread(one.path).file_meta
        assert (meta.ImplementationClassUID, meta.ImplementationVersionName) == stated()
