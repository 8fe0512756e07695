"""What a peer says in words reaches neither the ledger nor an error: only its codes, and UIDs that are some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from conftest import free_port
from owed import outbox, owe
from pydicom import Dataset
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt
from pynetdicom.pdu_primitives import A_ASSOCIATE
from sqlalchemy import select
from test_stow import peer as web_peer
from test_stow import web

from node.config import Peer
from node.delivery import commitment
from node.delivery.peer import contexts_for
from node.ledger.ledger import Ledger
from node.ledger.tables import Delivery, Event
from node.network.associations import PeerError, association

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the hostile values, of pydicom
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

HOSTILE = "\x1b[2K\x9b31m\u202e[red]DOE^MARKER"


def told(ledger: Ledger, lines: list[Any]) -> str:
    """All that the ledger and the log say."""
    with ledger.read() as session:
        texts = [*(event.text for event in session.scalars(select(Event))), *session.scalars(select(Delivery.reason))]
    return "".join([*texts, *map(repr, lines)])


@pytest.mark.parametrize("status", [0xA900, 0xA700, 0xB000])
def test_an_error_comment_is_not_passed_on(ledger: Ledger, results: Any, status: int) -> None:
    def store(_event: evt.Event) -> Dataset:
        answer = Dataset()
        answer.Status, answer.ErrorComment, answer.OffendingElement = status, HOSTILE[:60], [0x00100010]
        return answer

    entity, port = AE("BAD"), free_port()
    entity.add_supported_context(CTImageStorage)
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    owe(ledger, results, "pacs")
    with structlog.testing.capture_logs() as lines:
        outbox(ledger, results, Peer(ae_title="BAD", host="127.0.0.1", port=port)).work_off()
    server.shutdown()
    said = told(ledger, lines)
    assert f"0x{status:04X}" in said
    assert said.isprintable()
    assert "MARKER" not in said


def test_the_reason_of_a_rejection_is_of_the_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    port, entity = free_port(), AE("BAD")
    entity.add_supported_context(CTImageStorage)
    entity.require_called_aet = True
    server = entity.start_server(("127.0.0.1", port), block=False)
    monkeypatch.setattr(A_ASSOCIATE, "reason_str", property(lambda _: HOSTILE * 1000))
    peer = Peer(ae_title="OTHER", host="127.0.0.1", port=port)
    item: Any = SimpleNamespace(sop_class_uid=CTImageStorage, transfer_syntax_uid="1.2.840.10008.1.2.1")
    with pytest.raises(PeerError) as caught, association(peer, "US", contexts_for([item])):
        pass
    server.shutdown()
    assert "rejected" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("where", ["transaction", "instance", "reason", "nothing"])
def test_a_commitment_report_of_anything_is_answered_and_not_quoted(ledger: Ledger, where: str) -> None:
    failed = Dataset()
    failed.ReferencedSOPInstanceUID = HOSTILE if where == "instance" else "1.2.3"
    if where == "reason":
        failed.add_new(0x00081197, "LO", HOSTILE)
    said = Dataset()
    said.TransactionUID = HOSTILE * 10_000 if where == "transaction" else "1.2.3"
    said.FailedSOPSequence = [failed]
    with structlog.testing.capture_logs() as lines:
        event = SimpleNamespace(
            event_information=said if where != "nothing" else Dataset(),
            assoc=SimpleNamespace(remote={"ae_title": "PACS", "address": "127.0.0.1"}),
        )
        status = commitment._heard(ledger, event, lambda _: True)
    assert status == commitment.INVALID_ARGUMENT
    assert repr(lines).isprintable()
    assert "MARKER" not in repr(lines)
    assert len(repr(lines)) < 500


@pytest.mark.parametrize("status", [200, 202, 400, 409, 500])
def test_a_stow_answer_is_not_quoted(ledger: Ledger, results: Any, status: int) -> None:
    owe(ledger, results, "pacs")
    body = {"00081198": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [HOSTILE]}}]}, "x": HOSTILE}
    with structlog.testing.capture_logs() as lines, web([(status, body)]) as (url, _):
        outbox(ledger, results, web_peer(url)).work_off()
    said = told(ledger, lines)
    assert said.isprintable()
    assert "MARKER" not in said
