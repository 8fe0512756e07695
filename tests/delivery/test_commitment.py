"""Storage commitment with Orthanc, and with a peer that fails, delays and forgets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import accepts, free_port, running_orthanc, wait_for
from owed import outbox, owe, states
from pacs import BadPacs, bad_pacs
from pydicom import Dataset
from pydicom.uid import CTImageStorage, SegmentationStorage
from sqlalchemy import select, update

from node.config import Peer, Settings
from node.delivery import commitment
from node.delivery.outbox import Outbox
from node.installation import Node
from node.intake import closing
from node.ledger.leases import MAX_DELIVERY_ATTEMPTS
from node.ledger.ledger import Ledger
from node.ledger.tables import Commitment, Delivery, Event, PeerRecord

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

TWO = (CTImageStorage, SegmentationStorage)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commitment, "WAIT_S", 0.6)
    monkeypatch.setattr(commitment, "ASK_AGAIN_S", (0.3, 0.3))


@pytest.fixture
def listening(tmp_path: Path, ledger: Ledger) -> Iterator[int]:
    """Port of our listener, which lets 'ORTHANC' and 'BAD' in for reports alone."""
    port = free_port()
    peers = {
        name: {"ae_title": name.upper(), "host": "127.0.0.1", "port": 104, "may": ["receive"], "commitment": "on"}
        for name in ("orthanc", "bad")
    }
    me = {"host": "127.0.0.1", "port": port}
    settings = Settings.model_validate({"data": tmp_path / "var", "listener": me, "peers": peers})
    Node.open(settings)
    contexts, handlers = commitment.services(ledger, settings)
    listener = closing.intake(
        Node(settings, ledger),
        accepts,
        lambda _: None,
        contexts=contexts,
        handlers=handlers,
        reporters=commitment.reporters(settings),
    )
    listener.start()
    yield port
    listener.stop()


def due_now(ledger: Ledger) -> None:
    with ledger() as session:
        session.execute(update(Delivery).where(Delivery.state.in_(("waiting", "stored"))).values(due_at=0.0))


@pytest.mark.peer
def test_orthanc_confirms_what_it_has_and_names_what_it_lost(
    tmp_path: Path, ledger: Ledger, results: Path, listening: int
) -> None:
    knows_us = {"DicomModalities": {"us": {"AET": "LUNGNODE", "Host": "127.0.0.1", "Port": listening}}}
    with running_orthanc(tmp_path / "orthanc", **knows_us) as orthanc:
        peer = Peer(ae_title="ORTHANC", host="127.0.0.1", port=orthanc.port, commitment="required")
        owe(ledger, results, "pacs", classes=TWO)
        outbox(ledger, results, peer).work_off()
        wait_for(lambda: states(ledger) == ["confirmed"] * 2, 20, "Orthanc to confirm")

        (lost,) = owe(ledger, results, "pacs")
        lossy = peer.model_copy(update={"commitment": "off"})
        outbox(ledger, results, lossy).work_off()
        (instance,) = orthanc.find("Instance", SOPInstanceUID=lost)
        orthanc.delete(f"/instances/{instance}")
        with ledger() as session:
            again = update(Delivery).where(Delivery.state == "done")
            session.execute(again.values(state="stored", stored_at=1.0, finished_at=None))
        outbox(ledger, results, peer).work_off()
        wait_for(lambda: states(ledger)[2] == "waiting", 20, "Orthanc to say that it has not got it")

        def confirmed() -> bool:
            outbox(ledger, results, peer).work_off()
            return states(ledger) == ["confirmed"] * 3

        wait_for(confirmed, 20, "the object to be sent again and confirmed")
        assert orthanc.find("Instance", SOPInstanceUID=lost) == [instance]
    with ledger() as session:
        assert all(one.answered_at for one in session.scalars(select(Commitment)))


@pytest.mark.parametrize("answer", ["same", "later"])
def test_answer_on_the_same_association_or_later(
    ledger: Ledger, results: Path, listening: int, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(commitment, "WAIT_S", 10.0 if answer == "same" else 0.6)
    monkeypatch.setattr(commitment, "ASK_AGAIN_S", (60.0, 60.0))
    owe(ledger, results, "pacs", classes=TWO)
    with bad_pacs(BadPacs(answer=answer, listener=("127.0.0.1", listening))) as pacs:  # type: ignore[arg-type]
        outbox(ledger, results, pacs.peer(commitment="required")).work_off()
        wait_for(lambda: states(ledger) == ["confirmed"] * 2, 10, "the confirmation")
    assert len(pacs.requests) == 1


def test_object_that_is_not_kept_is_sent_again_under_a_new_transaction(ledger: Ledger, results: Path) -> None:
    first, second = owe(ledger, results, "pacs", classes=TWO)
    with bad_pacs(BadPacs(answer="same")) as pacs:
        pacs.fails = lambda uids: {second: 0x0110} if len(pacs.requests) == 1 else {}

        def confirmed() -> bool:
            outbox(ledger, results, pacs.peer(commitment="required")).work_off()
            return states(ledger) == ["confirmed"] * 2

        wait_for(confirmed, 10, "the second try")
    assert pacs.stored == [first, second, second]
    assert [uids for _, uids in pacs.requests] == [[first, second], [second]]
    assert len({uid for uid, _ in pacs.requests}) == 2


def test_class_that_is_not_kept_is_refused_and_not_sent_for_ever(ledger: Ledger, results: Path) -> None:
    _, second = owe(ledger, results, "pacs", classes=TWO)
    with bad_pacs(BadPacs(answer="same", fails=lambda _uids: {second: 0x0122})) as pacs:
        outbox(ledger, results, pacs.peer(commitment="required")).work_off()
        wait_for(lambda: states(ledger) == ["confirmed", "refused"], 10, "the answer")


@pytest.mark.parametrize(("wanted", "end"), [("on", "done"), ("required", "unconfirmed")])
def test_peer_that_commits_nothing_is_asked_and_then_it_is_said(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, end: str
) -> None:
    monkeypatch.setattr(commitment, "MAX_ASKS", 3)
    monkeypatch.setattr(commitment, "WAIT_S", 0.0)
    owe(ledger, results, "pacs")
    with bad_pacs() as pacs:
        for _ in range(5):
            due_now(ledger)
            outbox(ledger, results, pacs.peer(commitment=wanted)).work_off()
    assert states(ledger) == [end]
    assert len({uid for uid, _ in pacs.requests}) == len(pacs.requests) == 3
    assert len(pacs.stored) == 1


@pytest.mark.parametrize(("wanted", "end"), [("on", "done"), ("required", "unconfirmed")])
def test_peer_without_the_service_is_named(ledger: Ledger, results: Path, wanted: str, end: str) -> None:
    owe(ledger, results, "pacs")
    with bad_pacs(commits=False) as pacs:
        outbox(ledger, results, pacs.peer(commitment=wanted)).work_off()
    assert states(ledger) == [end]
    with ledger() as session:
        assert "offers no storage commitment" in session.scalars(select(Delivery.reason)).one()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"rejects_commitment": True}, "rejected the association"),
        ({"takes_on": None}, "no answer to N-ACTION"),
        ({"takes_on": 0x0110}, "N-ACTION answered 0x0110"),
    ],
)
def test_peer_that_takes_objects_and_no_request_gets_all_objects_and_is_asked_a_few_times(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(commitment, "MAX_ASKS", 2)
    with bad_pacs(BadPacs(**how)) as pacs:
        for _ in range(3):
            owe(ledger, results, "pacs")
            outbox(ledger, results, pacs.peer(commitment="on")).work_off()  # at once: the peer is not unreachable
            with ledger() as session:
                newest = session.scalars(select(Delivery).order_by(Delivery.id.desc())).first()
                assert newest is not None
                assert newest.reason.startswith("object-0 delivered, its confirmation not taken on: ")
                assert why in newest.reason
            due_now(ledger)
        outbox(ledger, results, pacs.peer(commitment="on")).work_off()
    assert len(pacs.stored) == 3
    assert states(ledger) == ["done"] * 2 + ["stored"]
    with ledger() as session:
        told = [event.text for event in session.scalars(select(Event))]
        assert session.scalars(select(PeerRecord.unreachable_since)).all() == [None]
    assert (
        sorted(told)
        == ["delivered, not confirmed: pacs never confirmed object-0"] * 2 + ["object-0 delivered to pacs"] * 3
    )


def test_late_answer_to_an_earlier_request_counts_when_it_is_good_news(
    ledger: Ledger, results: Path, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment, "WAIT_S", 0.0)
    monkeypatch.setattr(commitment, "ASK_AGAIN_S", (60.0, 60.0))
    (uid,) = owe(ledger, results, "pacs")
    with bad_pacs(BadPacs(listener=("127.0.0.1", listening))) as pacs:
        for _ in range(2):
            due_now(ledger)
            outbox(ledger, results, pacs.peer(commitment="required")).work_off()
        early, newest = (transaction for transaction, _ in pacs.requests)
        pacs.fails = lambda _uids: {uid: 0x0110}
        assert pacs.report(request(early, uid)) == 0x0000
        assert states(ledger) == ["stored"]  # an earlier failure is old news
        pacs.fails = lambda _uids: {}
        assert pacs.report(request("1.2.3", uid)) == commitment.INVALID_ARGUMENT
        assert states(ledger) == ["stored"]
        assert pacs.report(request(early, uid)) == 0x0000
        assert states(ledger) == ["confirmed"]
        assert pacs.report(request(newest, uid)) == 0x0000  # said twice
    assert states(ledger) == ["confirmed"]


def test_only_the_peer_that_was_asked_may_report(ledger: Ledger, listening: int) -> None:
    asked = {"1.2.1": "orthanc", "1.2.2": "bad", "1.2.3": "a name that the settings had before"}
    with ledger() as session:
        session.add_all(Commitment(transaction_uid=uid, peer=peer, asked_at=1.0) for uid, peer in asked.items())
    with bad_pacs(BadPacs(listener=("127.0.0.1", listening))) as pacs:
        answers = [pacs.report(request(uid, "1.2.9")) for uid in asked]
    assert answers == [commitment.INVALID_ARGUMENT, 0x0000, 0x0000]
    with ledger() as session:
        answered = {one.transaction_uid for one in session.scalars(select(Commitment)) if one.answered_at}
    assert answered == {"1.2.2", "1.2.3"}


def test_request_that_does_not_reach_the_peer_is_none(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs")
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    with ledger() as session:
        session.execute(update(Delivery).values(state="stored", stored_at=1.0, finished_at=None))
    outbox(ledger, results, pacs.peer(commitment="required")).work_off()
    with ledger() as session:
        assert session.scalars(select(Delivery.asks)).one() == 0
        assert session.scalars(select(Commitment)).all() == []


def test_object_that_was_taken_at_the_last_attempt_waits_for_its_confirmation(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment, "WAIT_S", 0.0)
    monkeypatch.setattr(commitment, "ASK_AGAIN_S", (60.0, 60.0))
    owe(ledger, results, "pacs")
    with ledger() as session:
        session.execute(update(Delivery).values(attempts=MAX_DELIVERY_ATTEMPTS - 1))
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer(commitment="required")).work_off()
        due_now(ledger)
        assert ledger.peers_due() == ["pacs"]
        assert states(ledger) == ["stored"]


@pytest.mark.parametrize("left", [True, False])
def test_commitment_that_was_turned_off_leaves_nothing_owed(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    monkeypatch.setattr(commitment, "WAIT_S", 0.0)
    monkeypatch.setattr(commitment, "ASK_AGAIN_S", (60.0, 60.0))
    owe(ledger, results, "pacs", classes=TWO)
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer(commitment="required")).work_off()
    assert states(ledger) == ["stored"] * 2
    due_now(ledger)
    assert ledger.peers_due() == ["pacs"]
    outbox(ledger, results, None if left else pacs.peer()).work_off()
    assert states(ledger) == ["done"] * 2
    with ledger() as session:
        assert all(one.finished_at for one in session.scalars(select(Delivery)))
        told = [event.text for event in session.scalars(select(Event).order_by(Event.id))]
    assert told[-1] == "object-1 delivered; its confirmation by pacs is no longer asked for"
    assert ledger.peers_due() == []


def test_worker_that_is_stopped_leaves_the_asking_to_the_next(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs")
    stopping = threading.Event()

    def store(_n: int, _uid: str) -> int:
        stopping.set()
        return 0x0000

    with bad_pacs(BadPacs(on_store=store, answer="same")) as pacs:
        required = pacs.peer(commitment="required")
        Outbox(ledger, results, "pacs", required, "LUNGNODE", stopping).work_off()
        assert (states(ledger), pacs.requests) == (["stored"], [])
        outbox(ledger, results, required).work_off()
        wait_for(lambda: states(ledger) == ["confirmed"], 10, "the next worker to ask")


def request(transaction: str, *uids: str) -> Dataset:
    said = Dataset()
    said.TransactionUID = transaction
    said.ReferencedSOPSequence = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
        said.ReferencedSOPSequence.append(item)
    return said
