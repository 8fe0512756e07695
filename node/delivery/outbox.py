"""The outbox: the objects that are due for one peer, sent in order, over as few associations as will do.

One worker at a time sends to a peer (`Ledger.peer_lease`), so that a peer that hangs holds up one thread and no object
of another peer. A peer that cannot be reached costs no object an attempt: the peer is not due for a while, and all of
its objects wait. Within a study objects go out in the order in which they were made; one that the peer keeps failing
holds back the rest of its study for its first few attempts, no longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog
from pydicom.errors import InvalidDicomError
from sqlalchemy import select

from node.config import Peer
from node.delivery import commitment, fallback
from node.delivery.peer import ByAssociation, Outgoing, contexts_for
from node.delivery.stow import ByStow
from node.images.elements import HeaderError
from node.ledger.events import EventKind, render
from node.ledger.leases import Lease, PeerLease
from node.ledger.ledger import Ledger
from node.ledger.record import move_all, now, record_event
from node.ledger.tables import AnalysisJob, Delivery, Object, Series
from node.ledger.transitions import PUT_BACK, TAKEN, State
from node.network.associations import MAX_CONTEXTS, PeerError, association
from node.paths import UnsafePathError, within
from node.telemetry.logs import plainly

log = structlog.get_logger(__name__)

#: Seconds for which an association stays open after the last object: those of the next series often follow soon.
LINGER_S = 2.0

#: Objects read from the ledger at a time.
BATCH = 100

#: Attempts for which an object holds back the later ones of its study: with the backoff of deliveries over a minute.
ORDERED_ATTEMPTS = 5


class Way(Protocol):
    """An open way to a peer."""

    def carries(self, item: Outgoing) -> bool:
        """Whether the object can be sent this way; else another has to be opened."""

    def send(self, item: Outgoing) -> str:
        """Send it; gives '' or the peer's warning, raises `PeerError`."""


@dataclass(frozen=True)
class Parcel:
    """One delivery that is due."""

    row: int
    kind: str
    study_uid: str
    #: Relative to the results' folder, as the ledger has it.
    path: str
    stopped: str | None


@dataclass(frozen=True)
class Outbox:
    """The objects that are due for one peer of the settings.

    Parameters
    ----------
    peer
        None when the settings name no such peer any more.
    results
        Folder that the paths of objects are relative to.
    stopping
        Set when the worker is to end: what is under way is finished, the rest is left to the next.
    """

    ledger: Ledger
    results: Path
    name: str
    peer: Peer | None
    calling_ae: str
    stopping: threading.Event = field(default_factory=threading.Event)

    def work_off(self) -> None:
        """Send all that is due, and ask for the commitments that are due; returns at once when another does."""
        with self.ledger.peer_lease(self.name) as held:
            if held is None:
                return
            try:
                if not self._confirms:
                    commitment.ask_no_more(self.ledger, self.name)
                while not self.stopping.is_set() and (batch := self.due()):
                    self._send(batch, held)
                if self.peer is not None and self._confirms:
                    commitment.ask(self.ledger, self.name, self.peer, self.calling_ae, self.stopping)
            except PeerError as error:
                log.warning("peer does not answer, will be tried again", peer=self.name, because=str(error))
                held.unreachable(str(error))

    @property
    def _confirms(self) -> bool:
        """Whether the peer is asked to commit to what it took."""
        return self.peer is not None and self.peer.commitment != "off"

    def due(self) -> list[Parcel]:
        """What can be sent now: urgent studies first, then those without failures, each in its order."""
        held, troubled = set[str](), set[str]()
        found: list[tuple[bool, Parcel]] = []
        outdated = False
        unsent = (Delivery.peer == self.name, Delivery.state.in_((*TAKEN, *PUT_BACK)))
        # Columns, not rows: after a long outage tens of thousands are due, and an analysis' summary is large.
        made = (
            Object.kind,
            Object.path,
            Object.stopped,
            Object.superseded_by,
            AnalysisJob.urgent,
            Series.study_instance_uid,
        )
        query = (
            select(Delivery.id, Delivery.attempts, *made, self.ledger.claimable(Delivery))
            .join(Delivery.object)
            .join(Object.analysis)
            .join(AnalysisJob.series)
            .where(*unsent)
            .order_by(AnalysisJob.urgent.desc(), Delivery.id)
        )
        with self.ledger.read() as session:
            rows = session.execute(query, execution_options={"yield_per": BATCH})
            for row, attempts, kind, path, stopped, superseded_by, urgent, study_uid, is_free in rows:
                if superseded_by is not None and is_free:
                    outdated = True
                elif study_uid not in held and is_free:
                    found.append((not urgent, Parcel(row, kind, study_uid, path, stopped)))
                    if attempts:
                        troubled.add(study_uid)
                elif attempts < ORDERED_ATTEMPTS:
                    held.add(study_uid)
                if len(found) == BATCH:
                    break
        if outdated:
            self._end_superseded()
        # A study on which the peer failed goes last: it may be what makes it fail.
        return [one for _, one in sorted(found, key=lambda pair: (pair[1].study_uid in troubled, pair[0]))]

    def _end_superseded(self) -> None:
        """Objects that those of a newer generation replace are not sent any more."""
        superseded = Delivery.object_id.in_(select(Object.id).where(Object.superseded_by.is_not(None)))
        mine = (Delivery.peer == self.name, self.ledger.claimable(Delivery), superseded)
        with self.ledger() as session:
            move_all(session, Delivery, (State.WAITING, State.RUNNING), State.SUPERSEDED, *mine)

    def _read(self, batch: Sequence[Parcel]) -> list[tuple[Parcel, Outgoing]]:
        """The objects of a batch; one whose file is gone or no DICOM is refused here."""
        read = []
        for parcel in batch:
            if parcel.stopped is not None:
                self._refuse(parcel, "it did not pass its check and is never sent")
                continue
            try:
                read.append((parcel, Outgoing.read(within(self.results, parcel.path))))
            except (FileNotFoundError, InvalidDicomError, HeaderError, AttributeError):
                self._refuse(parcel, "its file is gone or is no DICOM")
            except UnsafePathError as error:
                self._refuse(parcel, f"its file is not looked for: {error}")
            except OSError as error:
                with self.ledger.lease(Delivery, parcel.row) as lease:
                    if lease is not None:
                        lease.put_back(f"{parcel.kind} cannot be read: {plainly(error)}")
        return read

    def _send(self, batch: Sequence[Parcel], held_peer: PeerLease) -> None:
        """Send a batch and what follows soon, over one association; returns when another one is needed.

        Raises
        ------
        PeerError
            The peer was not reached, or fell silent over the first object of the association.
        """
        items = self._read(batch)
        if not items:
            return
        try:
            with self._way([item for _, item in items]) as way:
                answered = False
                while items and not self.stopping.is_set():
                    held = set[str]()
                    for parcel, item in items:
                        if parcel.study_uid in held:
                            continue
                        if self.stopping.is_set() or not way.carries(item):
                            return
                        try:
                            sent = self._deliver(parcel, item, way, lost_costs=not answered)
                        except PeerError:
                            if answered:  # the association is gone, the peer may not be
                                return
                            raise
                        if not sent:
                            held.add(parcel.study_uid)
                        if not answered:
                            held_peer.answered()
                            answered = True
                    items = self._read(self._soon())
        except PeerError as error:
            if not error.permanent:
                raise
            held_peer.answered()
            for parcel in batch:
                self._refuse(parcel, str(error))

    @contextmanager
    def _way(self, items: Sequence[Outgoing]) -> Iterator[Way]:
        if self.peer is None:
            raise PeerError("the settings name no such peer", permanent=True)
        if self.peer.stow is not None:
            with ByStow(self.peer.stow, self.name) as stow:
                yield stow
        else:
            with association(self.peer, self.calling_ae, contexts_for(items)[:MAX_CONTEXTS]) as made:
                yield ByAssociation(made)

    def _soon(self) -> list[Parcel]:
        """What becomes due while the association lingers."""
        until = time.monotonic() + LINGER_S
        while not (batch := self.due()) and time.monotonic() < until and not self.stopping.wait(LINGER_S / 8):
            pass
        return batch

    def _deliver(self, parcel: Parcel, item: Outgoing, way: Way, *, lost_costs: bool) -> bool:
        """Send one object; gives whether the rest of its study may follow, raises `PeerError` when no answer came."""
        with self.ledger.lease(Delivery, parcel.row) as lease:
            if lease is None:
                return False
            try:
                warning = way.send(item)
            except PeerError as error:
                if error.permanent:
                    self._end(lease, parcel, State.REFUSED, EventKind.REFUSED, reason=str(error))
                    return True
                log.warning("not delivered, will try again", kind=parcel.kind, peer=self.name, because=str(error))
                lease.put_back(f"{parcel.kind} to {self.name}: {error}", counted=error.reached or lost_costs)
                if not error.reached:
                    raise
                return False
            kind = EventKind.DELIVERED_WITH_WARNING if warning else EventKind.DELIVERED
            self._end(lease, parcel, State.STORED if self._confirms else State.DONE, kind, warning=warning)
            return True

    def _refuse(self, parcel: Parcel, reason: str) -> None:
        with self.ledger.lease(Delivery, parcel.row) as lease:
            if lease is not None:
                self._end(lease, parcel, State.REFUSED, EventKind.NOT_SENT, reason=reason)

    def _end(self, lease: Lease, parcel: Parcel, state: State, kind: EventKind, **data: str) -> None:
        what = {"object": parcel.kind, "peer": self.name, **data}
        outcome = render(kind, what)
        with lease.finish(state, outcome) as session:
            delivery = session.get_one(Delivery, parcel.row)
            if state is State.STORED:
                delivery.stored_at, delivery.due_at = now(session), 0.0
            record_event(session, delivery, kind, **what)
            if state is State.REFUSED and self.peer is not None:
                fallback.add(session, delivery, self.peer)
        log.info("delivery", outcome=outcome)
