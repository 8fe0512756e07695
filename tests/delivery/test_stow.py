"""STOW-RS with Orthanc's DICOMweb plugin, and with servers that refuse, ail or cannot be trusted."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Orthanc, free_port, wait_for
from owed import outbox, owe, states
from pydicom import dcmread
from pydicom.uid import CTImageStorage, SegmentationStorage
from sqlalchemy import select

from node.config import Peer
from node.delivery.stow import credentials_variable
from node.ledger.store import Delivery, Ledger, Line

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
        delivery, line = session.scalars(select(Delivery)).one(), session.scalars(select(Line)).one()
    assert (delivery.state, delivery.attempts) == ("waiting", 0)
    assert "peers.pacs.stow.ca and certificate, or LUNGNODE_STOW_PACS, cannot be used" in delivery.reason
    assert line.silent_since is not None


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
