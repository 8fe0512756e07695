"""Storage commitment, Push Model (PS3.4 annex J): asking a peer to keep what it took, and hearing its answers.

A request names the objects under a Transaction UID that is never used twice and is recorded in the ledger before it
goes out. The answer comes by N-EVENT-REPORT, soon on the same association or later on one that the peer opens to our
listener. What the peer committed to is 'confirmed'; what it did not is sent again; what it never speaks of is asked for
again, for about a day.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import structlog
from pydicom import Dataset
from pydicom.uid import UID, generate_uid
from pynetdicom import evt
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from sqlalchemy import ScalarResult, delete, select, update
from sqlalchemy.orm import Session

from node.config import Peer, Settings
from node.ledger.events import EventKind
from node.ledger.ledger import Ledger
from node.ledger.record import move, now, record_event
from node.ledger.tables import Commitment, Delivery, Object
from node.ledger.transitions import Kind, State
from node.network.associations import NobodyThereError, PeerError, answering_association, hexadecimal, status_of
from node.telemetry.logs import plainly
from node.text import UID as UID_FORM

log = structlog.get_logger(__name__)

#: Storage Commitment Push Model SOP class and its well-known instance (PS3.4 J.3.5).
PUSH_MODEL: Final = "1.2.840.10008.1.20.1"
_INSTANCE: Final = "1.2.840.10008.1.20.1.1"

#: Seconds for which the association stays open for an answer at once.
WAIT_S = 2.0

#: Requests that a peer may leave unanswered; with the pauses below about a day.
MAX_ASKS = 18

#: Seconds after which what was not answered is asked for again; doubles each time, up to two hours.
ASK_AGAIN_S = (60.0, 7000.0)

#: Objects in one transaction.
BATCH = 500

#: N-EVENT-REPORT statuses (PS3.7 10.1.1.1.8).
SUCCESS: Final = 0x0000
PROCESSING_FAILURE: Final = 0x0110
INVALID_ARGUMENT: Final = 0x0115

#: Failure Reason (0008,1197) after which the same object would fail again: the peer does not keep its SOP class
#: (PS3.3 C.14.1.1).
_CLASS_NOT_SUPPORTED: Final = 0x0122


def ask(ledger: Ledger, name: str, peer: Peer, calling_ae: str, stopping: threading.Event) -> None:
    """Ask for all commitments of a peer that are due, until `stopping` is set; the caller has its lease.

    A peer that rejects the request in whatever way may well take objects: it is asked again later, and nothing waits.

    Raises
    ------
    NobodyThereError
        The peer was not reached. It will be asked again.
    """
    required = peer.commitment == "required"
    while not stopping.is_set() and (objects := _begin(ledger, name, uid := str(generate_uid()), required=required)):
        request = Dataset()
        request.TransactionUID = uid
        request.ReferencedSOPSequence = [_reference(*one) for one in objects]
        answered = threading.Event()

        def heard(event: Any, answered: threading.Event = answered) -> tuple[int, None]:
            status = _heard(ledger, event, lambda peer: peer == name)
            answered.set()
            return status, None

        handlers = [(evt.EVT_N_EVENT_REPORT, heard)]
        try:
            with answering_association(peer, calling_ae, [build_context(PUSH_MODEL)], handlers) as made:
                answer, _ = made.send_n_action(request, 1, UID(PUSH_MODEL), UID(_INSTANCE))
                status = status_of(answer)
                if status is None:
                    raise PeerError("no answer to N-ACTION", permanent=False, reached=False)
                if status != SUCCESS:
                    raise PeerError(f"N-ACTION answered {hexadecimal(status)}", permanent=False)
                answered.wait(WAIT_S)
        except NobodyThereError:
            _take_back(ledger, uid)
            raise
        except PeerError as error:
            if not error.permanent:
                log.warning("commitment not taken on, will be asked again", peer=name, because=str(error))
                _not_taken_on(ledger, uid, str(error))
                return
            # No presentation context: the peer does not know the service.
            reason = f"{name} offers no storage commitment; set its `commitment` to off, or enable the service there"
            _give_up(ledger, uid, reason, required=required)


def ask_no_more(ledger: Ledger, name: str) -> None:
    """End what still waits for the commitment of a peer that is not asked for any by the settings of today."""
    waits = (Delivery.peer == name, Delivery.state == State.STORED)
    with ledger.read() as session:
        if session.scalar(select(Delivery.id).where(*waits).limit(1)) is None:
            return
    with ledger() as session:
        for row in session.scalars(select(Delivery).where(*waits)):
            kind = EventKind.CONFIRMATION_DROPPED
            move(session, row, State.DONE, reason=record_event(session, row, kind, object=row.object.kind, peer=name))


def services(ledger: Ledger, settings: Settings) -> tuple[list[PresentationContext], list[tuple[Any, ...]]]:
    """Presentation contexts and handlers by which the listener takes in reports that come later."""
    if not reporters(settings):
        return [], []
    context = build_context(PUSH_MODEL)
    # The peer is the SCP of this service although it opens the association (PS3.7 D.3.3.4, role selection).
    context.scu_role, context.scp_role = False, True
    senders = {peer.ae_title for peer in settings.peers_that_may("send").values()}

    def requested(event: Any) -> None:
        if settings.listener.accept == "known" and event.assoc.requestor.ae_title not in senders:
            # Let in for its reports, not for series.
            event.assoc.acceptor.supported_contexts = [build_context(Verification), context]

    def heard(event: Any) -> tuple[int, None]:
        caller = str(event.assoc.requestor.ae_title).strip()
        names = settings.peer_names(caller) if caller in reporters(settings) else set[str]()
        # What was asked of a peer that has another name in the settings by now may come from any that reports.
        return _heard(ledger, event, lambda peer: peer in names or bool(names and peer not in settings.peers)), None

    return [context], [(evt.EVT_REQUESTED, requested), (evt.EVT_N_EVENT_REPORT, heard)]


def reporters(settings: Settings) -> set[str]:
    """AE titles that may open an association to report."""
    return {peer.ae_title for peer in settings.peers_that_may("receive").values() if peer.commitment != "off"}


def report(
    ledger: Ledger, uid: str, kept: Collection[str], failed: Mapping[str, int], may_report: Callable[[str], bool]
) -> bool:
    """Record what a peer said of a transaction, by SOP instance UID.

    False for a transaction that we never began, or began with a peer for which the caller may not report.

    An answer to an earlier request counts as well when it is good news; a failure counts only under the newest.
    """
    with ledger() as session:
        transaction = session.get(Commitment, uid)
        if transaction is None or not may_report(transaction.peer):
            return False
        transaction.answered_at = now(session)
        named = (Delivery.peer == transaction.peer, Object.sop_instance_uid.in_([*kept, *failed]))
        stored = select(Delivery).join(Delivery.object).where(*named, Delivery.state == State.STORED)
        for delivery in session.scalars(stored):
            what = {"object": delivery.object.kind, "peer": delivery.peer}
            if delivery.object.sop_instance_uid in kept:
                words = record_event(session, delivery, EventKind.CONFIRMED, **what)
                move(session, delivery, State.CONFIRMED, reason=words)
            elif delivery.transaction_uid == uid:
                _not_kept(ledger, session, delivery, failed[delivery.object.sop_instance_uid])
    return True


def _not_kept(ledger: Ledger, session: Session, delivery: Delivery, why: int) -> None:
    """Send an object again that the peer says it does not keep, unless it never will."""
    what = {"object": delivery.object.kind, "peer": delivery.peer, "failure": hexadecimal(why)}
    delivery.stored_at = None
    if why == _CLASS_NOT_SUPPORTED:
        move(session, delivery, State.REFUSED, reason=record_event(session, delivery, EventKind.NOT_KEPT, **what))
    else:
        move(session, delivery, State.WAITING, reason=record_event(session, delivery, EventKind.SENT_AGAIN, **what))
        delivery.due_at = now(session) + ledger.timeouts.backoff_s(Kind.DELIVERY, delivery.attempts)


def _begin(ledger: Ledger, name: str, uid: str, *, required: bool) -> list[tuple[str, str]]:
    """Record a transaction for what is due: (SOP class UID, SOP instance UID) of its objects."""
    with ledger() as session:
        due = (Delivery.peer == name, ledger.commitment_due())
        rows = session.scalars(select(Delivery).where(*due).order_by(Delivery.id).limit(BATCH)).all()
        tired = [row for row in rows if row.asks >= MAX_ASKS]
        for row in tired:
            _unconfirmed(session, row, f"{name} never confirmed {row.object.kind}", required=required)
        asked = [row for row in rows if row.asks < MAX_ASKS]
        first, most = ASK_AGAIN_S
        for row in asked:
            row.transaction_uid = uid
            row.due_at = now(session) + min(first * 2**row.asks, most)
            row.asks += 1
        if asked:
            session.add(Commitment(transaction_uid=uid, peer=name, asked_at=now(session)))
        return [(row.object.sop_class_uid, row.object.sop_instance_uid) for row in asked]


def _take_back(ledger: Ledger, uid: str) -> None:
    """A request that did not reach the peer is none."""
    with ledger() as session:
        session.execute(delete(Commitment).where(Commitment.transaction_uid == uid))
        mine = update(Delivery).where(Delivery.transaction_uid == uid, Delivery.state == State.STORED)
        session.execute(mine.values(asks=Delivery.asks - 1, due_at=0.0))


def _asked_for(session: Session, uid: str) -> ScalarResult[Delivery]:
    """What a transaction asked for, as far as it still waits."""
    mine = (Delivery.transaction_uid == uid, Delivery.state == State.STORED)
    return session.scalars(select(Delivery).where(*mine))


def _not_taken_on(ledger: Ledger, uid: str, reason: str) -> None:
    """Say of what a transaction asked for why it is not confirmed yet."""
    with ledger() as session:
        for row in _asked_for(session, uid):
            row.reason = f"{row.object.kind} delivered, its confirmation not taken on: {reason}"


def _give_up(ledger: Ledger, uid: str, reason: str, *, required: bool) -> None:
    """End what a transaction asked for, without the commitment."""
    with ledger() as session:
        for row in _asked_for(session, uid):
            _unconfirmed(session, row, reason, required=required)


def _unconfirmed(session: Session, row: Delivery, reason: str, *, required: bool) -> None:
    move(session, row, State.UNCONFIRMED if required else State.DONE, reason=reason)
    record_event(session, row, EventKind.UNCONFIRMED, reason=reason)


def _heard(ledger: Ledger, event: Any, may_report: Callable[[str], bool]) -> int:
    """Take in one N-EVENT-REPORT (PS3.4 J.3.3), by name of the peer that was asked; gives the status of our answer."""
    caller = {"calling_ae": event.assoc.remote["ae_title"], "address": event.assoc.remote["address"]}
    try:
        said = event.event_information
        uid = str(said.TransactionUID)
        if not UID_FORM.match(uid):
            raise ValueError("a Transaction UID that is none")
        kept = {str(item.ReferencedSOPInstanceUID) for item in said.get("ReferencedSOPSequence", ())}
        failed = {
            str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason", PROCESSING_FAILURE))
            for item in said.get("FailedSOPSequence", ())
        }
    except Exception as error:  # a report can hold anything
        log.warning("commitment report cannot be read", error=plainly(error), **caller)
        return INVALID_ARGUMENT
    try:
        known = report(ledger, uid, kept - failed.keys(), failed, may_report)
    except Exception as error:
        log.error("commitment report not recorded, the peer is asked again", error=plainly(error), **caller)
        return PROCESSING_FAILURE
    if not known:
        hint = "usually none: only the peer that was asked may report; it is asked again"
        log.warning("commitment report of a transaction that is not the caller's", transaction=uid, hint=hint, **caller)
        return INVALID_ARGUMENT
    log.info("commitment", transaction=uid, kept=len(kept), failed=len(failed))
    return SUCCESS


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
    return item
