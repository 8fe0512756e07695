"""STOW-RS with Orthanc's DICOMweb plugin, and with servers that refuse, ail or cannot be trusted."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Orthanc, free_port, wait_for
from owed import outbox, owe, states, write_object
from pydicom import dcmread
from pydicom.uid import CTImageStorage, SegmentationStorage
from sqlalchemy import select

from node.config import ConfigError, Peer, Settings, Stow, parse
from node.delivery import stow as stow_module
from node.delivery.peer import Outgoing
from node.delivery.stow import ByStow, credentials_in_the_clear, credentials_variable
from node.ledger.ledger import Ledger
from node.ledger.tables import Delivery, PeerRecord
from node.network.associations import PeerError

pytestmark = pytest.mark.usefixtures("short_waits")

TWO = (CTImageStorage, SegmentationStorage)


def peer(url: str, **more: Any) -> Peer:
    return Peer.model_validate({"ae_title": "WEB", "host": "127.0.0.1", "port": 104, "stow": {"url": url, **more}})


@pytest.mark.peer
def test_orthanc_takes_objects_by_stow_as_they_are(ledger: Ledger, results: Path, orthanc: Orthanc) -> None:
    uids = owe(ledger, results, "pacs", classes=TWO)
    outbox(ledger, results, peer(f"{orthanc.http}/dicom-web")).work_off()
    assert states(ledger) == ["done"] * 2
    for uid, sent in zip(uids, sorted(results.rglob("*.dcm")), strict=True):
        (instance,) = orthanc.find("Instance", SOPInstanceUID=uid)
        assert orthanc.get(f"/instances/{instance}/file").content == sent.read_bytes()
    assert dcmread(sent).SOPInstanceUID == uid


@contextmanager
def web(answers: list[tuple[int | None, Any]], tls: Path | None = None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives the `answers` in turn, the last one for ever; its address and the headers it was sent.

    An answer without a status is none: the connection is closed.
    """
    heard: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            heard.append(dict(self.headers))
            status, body = answers[min(len(heard), len(answers)) - 1]
            if status is None:
                self.close_connection = True
                return
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/dicom-web", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def failed(uid: str, reason: int) -> dict[str, Any]:
    item = {"00081155": {"vr": "UI", "Value": [uid]}, "00081197": {"vr": "US", "Value": [reason]}}
    return {"00081198": {"vr": "SQ", "Value": [item]}}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (200, "done"),
        (400, "refused"),
        (415, "refused"),
        (401, "waiting"),
        (404, "waiting"),
        (429, "waiting"),
        (500, "waiting"),
        (503, "waiting"),
    ],
)
def test_http_statuses_that_pass_and_that_last(ledger: Ledger, results: Path, status: int, state: str) -> None:
    owe(ledger, results, "pacs")
    with web([(status, {})]) as (url, _):
        outbox(ledger, results, peer(url)).work_off()
    assert states(ledger) == [state]


@pytest.mark.parametrize("broken", ["ca", "certificate", "credentials"])
def test_certificates_and_credentials_that_cannot_be_used_are_said_and_waited_for(
    ledger: Ledger, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    owe(ledger, results, "pacs")
    more = {} if broken == "credentials" else {broken: str(tmp_path / "gone.pem")}
    if broken == "credentials":
        monkeypatch.setenv(credentials_variable("pacs"), "Basic Schlüssel")
    outbox(ledger, results, peer("https://127.0.0.1:9/dicom-web", **more)).work_off()
    with ledger() as session:
        delivery, line = session.scalars(select(Delivery)).one(), session.scalars(select(PeerRecord)).one()
    assert (delivery.state, delivery.attempts) == ("waiting", 0)
    assert "peers.pacs.stow.ca and certificate, or LUNGNODE_STOW_PACS, cannot be used" in delivery.reason
    assert line.unreachable_since is not None


@pytest.mark.parametrize(
    ("code", "reason", "state"),
    [
        (409, 0x0122, "refused"),
        (202, 0xA700, "waiting"),
        (409, 0x0110, "waiting"),
        (409, 0x0111, "done"),
        (202, 0x0111, "done"),
        (409, 45070, "done"),
        (409, 45071, "waiting"),
    ],
)
def test_failure_reason_of_the_object_decides(
    ledger: Ledger, results: Path, code: int, reason: int, state: str
) -> None:
    (uid,) = owe(ledger, results, "pacs")
    with web([(code, failed(uid, reason))]) as (url, _):
        outbox(ledger, results, peer(url)).work_off()
    assert states(ledger) == [state]
    with ledger() as session:
        assert f"0x{reason:04X}" in session.scalars(select(Delivery.reason)).one()


def test_repeat_after_a_lost_answer_is_delivered_where_duplicates_are_rejected(ledger: Ledger, results: Path) -> None:
    """An archive that keeps each instance, and whose first answer never arrives."""
    (uid,) = owe(ledger, results, "pacs")
    with web([(None, {}), (409, failed(uid, 0x0111))]) as (url, heard):
        outbox(ledger, results, peer(url)).work_off()
        assert states(ledger) == ["waiting"]
        wait_for(
            lambda: not outbox(ledger, results, peer(url)).work_off() and states(ledger) == ["done"], 10, "a repeat"
        )
    assert len(heard) == 2
    with ledger() as session:
        assert "stored with warning 0x0111" in session.scalars(select(Delivery.reason)).one()


def test_service_that_ails_gets_it_later(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=TWO)
    with web([(503, {}), (500, {}), (200, {})]) as (url, heard):
        while states(ledger) != ["done"] * 2:
            outbox(ledger, results, peer(url)).work_off()
    assert len(heard) == 4


def test_nobody_there_costs_no_attempt(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs")
    outbox(ledger, results, peer(f"http://127.0.0.1:{free_port()}/dicom-web")).work_off()
    with ledger() as session:
        delivery = session.scalars(select(Delivery)).one()
    assert (delivery.state, delivery.reason) == ("waiting", "object-0 to pacs: no connection: 127.0.0.1")


def test_certificate_is_checked_and_credentials_come_from_the_environment(
    ledger: Ledger, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, subject = tmp_path / "server.pem", ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            *subject,
            "-keyout",
            pem,
            "-out",
            tmp_path / "crt",
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text() + (tmp_path / "crt").read_text())
    monkeypatch.setenv(credentials_variable("pacs"), "Bearer abc")
    assert credentials_variable("my pacs-2") == "LUNGNODE_STOW_MY_PACS_2"
    owe(ledger, results, "pacs")
    with web([(200, {})], pem) as (url, heard):
        outbox(ledger, results, peer(url)).work_off()
        assert (states(ledger), heard) == (["waiting"], [])
        with ledger() as session:
            assert "certificate cannot be checked" in session.scalars(select(Delivery.reason)).one()
        while states(ledger) != ["done"]:
            outbox(ledger, results, peer(url, ca=str(tmp_path / "crt"))).work_off()
    assert [headers["Authorization"] for headers in heard] == ["Bearer abc"]


class Raw:
    """A server that answers each request with bytes of a test's choice, on its own connection."""

    def __init__(self, *pieces: bytes, every_s: float = 0.0, forever: bool = False, reads: bool = True) -> None:
        self.heard: list[bytes] = []
        self._pieces, self._every_s, self._forever, self._reads = pieces, every_s, forever, reads
        self._stop = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/dicom-web"

    def __enter__(self) -> Raw:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(0.2)
            request = b""
            while self._reads and b"--\r\n" not in request[-6:] and (block := connection.recv(1 << 16)):
                request += block
            self.heard.append(request)
            connection.settimeout(5)
            while True:
                for piece in self._pieces:
                    connection.sendall(piece)
                    if self._stop.wait(self._every_s):
                        return
                if not self._forever:
                    return


def answered(body: bytes, code: int = 200, **headers: str) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


@pytest.fixture
def item(tmp_path: Path) -> Outgoing:
    write_object(tmp_path / "object.dcm", CTImageStorage, "1.2.3")
    return Outgoing.read(tmp_path / "object.dcm")


def outcome_of(service: Stow, item: Outgoing) -> str | PeerError:
    """Either of the two; any other exception fails the test."""
    outcome: str | PeerError
    with ByStow(service, "pacs") as stow:
        try:
            outcome = stow.send(item)
        except PeerError as error:
            outcome = error
    assert len(str(outcome)) < 200
    assert str(outcome).isprintable()
    return outcome


def packed(content: bytes) -> bytes:
    return zlib.compress(content, wbits=zlib.MAX_WBITS | 16)


DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE_REASON = b'{"00081198":{"Value":[{"00081155":{"Value":["UID"]},"00081197":{"Value":[%s]}}]}}'

ANSWERS: dict[str, bytes] = {
    "nested lists": answered(DEEP),
    "nested lists, unfinished": answered(b"[" * 500_000),
    "nested objects": answered(b'{"a":' * 100_000),
    "nested lists with failures": answered(b'{"00081198":' + DEEP + b"}", 202),
    "no JSON": answered(b"\xff\xfe<html>", 202),
    "bad text": answered(b'"\xc3\x28"', 202),
    "numbers without end": answered(b"9" * 100_000, 202),
    "infinite reason": answered(HUGE_REASON % b"Infinity", 202),
    "overflowing reason": answered(HUGE_REASON % b"1e999", 202),
    "reason that is no number": answered(HUGE_REASON % b"NaN", 202),
    "reason that is a list": answered(HUGE_REASON % b"[[1]]", 202),
    "negative reason": answered(HUGE_REASON % b"-70000", 202),
    "large reason": answered(HUGE_REASON % (b"9" * 4000), 409),
    "items that are none": answered(b'{"00081198":{"Value":[1,"x",null,[]]}}', 202),
    "sequence that is none": answered(b'{"00081198":7,"00081199":"x"}', 202),
    "gzip that is none": answered(b"[]", 202, Content_Encoding="gzip"),
    "cut gzip": answered(packed(b"[]" * 1000)[:30], 202, Content_Encoding="gzip"),
    "unknown coding": answered(b"[]", 202, Content_Encoding="br"),
    "codings upon each other": answered(packed(packed(bytes(10**7))), 202, Content_Encoding="gzip, gzip"),
    "no HTTP": b"SSH-2.0-x\r\n",
    "nothing": b"",
    "bad status": b"HTTP/1.1 999999 X\r\n\r\n",
    "bad length": b"HTTP/1.1 200 X\r\nContent-Length: -1\r\n\r\n",
    "bad chunks": b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "cut answer": b"HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\n[",
    "large header": b"HTTP/1.1 200 X\r\nA: " + b"x" * 1_000_000,
    "control characters": b"HTTP/1.1 400 \x1b[2J\r\n\r\n",
    "switching": b"HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n",
    "bad redirect": b"HTTP/1.1 302 X\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_any_answer_is_an_outcome_of_the_object(item: Outgoing, answer: bytes) -> None:
    with Raw(answer.replace(b"UID", item.sop_instance_uid.encode()) if b"[{" in answer else answer) as server:
        outcome_of(Stow(url=server.url), item)
    assert server.heard


def test_deep_answer_leaves_the_worker_at_its_task(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=TWO)
    with Raw(answered(DEEP)) as server:
        outbox(ledger, results, peer(server.url)).work_off()
    assert "running" not in states(ledger)


@pytest.mark.parametrize("how", ["plain", "chunked", "gzip", "without end"])
def test_large_answer_is_read_to_a_limit(item: Outgoing, how: str) -> None:
    """A quarter of a gigabyte that unpacks from little, or what never ends, takes neither memory nor time."""
    block = b"x" * (1 << 20)
    match how:
        case "plain":
            pieces = [b"HTTP/1.1 200 X\r\nContent-Length: 1073741824\r\n\r\n", *[block] * 50]
        case "chunked":
            chunk = b"%x\r\n" % len(block) + block + b"\r\n"
            pieces = [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 50]
        case "gzip":
            packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
            bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
            pieces = [answered(bomb, Content_Encoding="gzip")]
            assert len(bomb) < 1 << 20
        case _:
            pieces = [b"HTTP/1.1 200 X\r\n\r\n", *[block] * 50]
    with Raw(*pieces) as server:
        tracemalloc.start()
        try:
            error = outcome_of(Stow(url=server.url), item)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert isinstance(error, PeerError)
    assert "more than 1024 kB" in str(error)
    assert (error.permanent, error.reached) == (False, True)
    assert peak < 16 << 20


DRIPS: dict[str, tuple[bytes, bytes]] = {
    "body": (b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "header": (b"HTTP/1.1 200 X\r\nA: ", b"x"),
    "informational answers": (b"", b"HTTP/1.1 102 X\r\n\r\n"),
    "status line": (b"HTTP/1.1 200 ", b"x"),
    "unread": (b"HTTP/1.1 500 X\r\nContent-Length: 1000000\r\n\r\n", b" "),
}


@pytest.mark.parametrize(("first", "drip"), DRIPS.values(), ids=DRIPS)
def test_answer_that_drips_is_bounded_in_time(
    item: Outgoing, monkeypatch: pytest.MonkeyPatch, first: bytes, drip: bytes
) -> None:
    """Each byte comes in time, and the last one never."""
    monkeypatch.setattr(stow_module, "TIMEOUT_S", 0.6)
    monkeypatch.setattr(stow_module, "CONNECT_S", 0.2)
    with Raw(first, *[drip] * 1000, every_s=0.05) as server:
        begin = time.monotonic()
        error = outcome_of(Stow(url=server.url), item)
        assert time.monotonic() - begin < 3
    assert isinstance(error, PeerError)
    assert not error.permanent
    if first.startswith(b"HTTP/1.1 500"):
        assert str(error) == "STOW-RS answered HTTP 500"
    else:
        assert "did not come to an end of its answer" in str(error)
        assert not error.reached


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("insecure", [False, True])
def test_redirect_carries_neither_object_nor_credentials_elsewhere(
    item: Outgoing, monkeypatch: pytest.MonkeyPatch, code: int, insecure: bool
) -> None:
    if insecure:
        monkeypatch.setenv(credentials_variable("pacs"), "Bearer secret")
    with Raw(answered(b"")) as other, Raw(answered(b"", code, Location=f"{other.url}/studies")) as server:
        error = outcome_of(Stow(url=server.url, insecure=insecure), item)
        time.sleep(0.05)
    assert isinstance(error, PeerError)
    assert str(code) in str(error)
    assert len(server.heard) == 1
    assert (b"Bearer secret" in server.heard[0]) == insecure
    assert other.heard == []


def test_credentials_do_not_go_over_http(ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(credentials_variable("pacs"), "Bearer secret")
    owe(ledger, results, "pacs")
    with web([(200, {})]) as (url, heard):
        outbox(ledger, results, peer(url)).work_off()
        assert (states(ledger), heard) == (["waiting"], [])
        with ledger() as session:
            delivery, line = session.scalars(select(Delivery)).one(), session.scalars(select(PeerRecord)).one()
        assert delivery.attempts == 0
        assert "set peers.pacs.stow.insecure: true" in delivery.reason
        assert "secret" not in delivery.reason
        assert line.unreachable_since is not None
        while states(ledger) != ["done"]:
            outbox(ledger, results, peer(url, insecure=True)).work_off()
    assert [headers["Authorization"] for headers in heard] == ["Bearer secret"]


def test_credentials_in_the_clear_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"a": ("http", False), "b": ("http", True), "c": ("https", False), "d": ("http", False)}
    peers = {name: peer(f"{scheme}://x/y", insecure=insecure) for name, (scheme, insecure) in addresses.items()}
    for name in "abc":
        monkeypatch.setenv(credentials_variable(name), "Bearer secret")
    found = {name: (what, hint) for name, what, hint in credentials_in_the_clear(Settings(peers=peers))}
    assert set(found) == {"a", "b"}
    assert "nothing is sent" in found["a"][0]
    assert "LUNGNODE_STOW_A" in found["a"][1]
    assert "go over plain http" in found["b"][0]
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pass@host",
        "https://user:pass@host/dicom-web",
        "https://user@host",
        "https://host?token=pass",
        "https://host/dicom-web?token=pass",
        "https://host/dicom-web#pass",
        "https://host\\@pass",
        "ftp://host",
        "https://",
        "https:///x",
        "file:///etc/passwd",
    ],
)
def test_address_holds_no_credentials(url: str) -> None:
    text = f"peers:\n  p: {{ae_title: A, host: h, port: 1, stow: {{url: {json.dumps(url)}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "peers.p.stow.url" in str(caught.value)
    assert "credentials are read from the environment" in str(caught.value)
    assert "pass" not in str(caught.value).replace("passwd", "")
