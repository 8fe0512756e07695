"""The outbox: what is owed to one peer, sent in order, over as few associations as will do.

One worker at a time sends to a peer (`Ledger.line`), so that a peer that hangs holds up one thread and nobody else's
objects. A peer that cannot be reached costs no object an attempt: its line is not due for a while, and everything
waits with it. Within a study objects go out in the order in which they were made; one that the peer keeps failing
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
from sqlalchemy import select, update

from node.config import Peer
from node.delivery import commitment, fallback
from node.delivery.peer import ByAssociation, Outgoing, contexts_for
from node.delivery.stow import ByStow
from node.images.elements import HeaderError
from node.ledger.store import Analysis, Delivery, Lease, Ledger, LineLease, Object, Series, State, free
from node.network.associations import MAX_CONTEXTS, PeerError, association
from node.paths import UnsafePathError, within
from node.results.forms import STOPPED
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


@dataclass(frozen=True)
class Outbox:
    """What is owed to one peer of the settings.

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
        with self.ledger.line(self.name) as line:
            if line is None:
                return
            try:
                if not self._confirms:
                    commitment.ask_no_more(self.ledger, self.name)
                while not self.stopping.is_set() and (batch := self.due()):
                    self._send(batch, line)
                if self.peer is not None and self._confirms:
                    commitment.ask(self.ledger, self.name, self.peer, self.calling_ae, self.stopping)
            except PeerError as error:
                log.warning("peer does not answer, will be tried again", peer=self.name, because=str(error))
                line.silent(str(error))

    @property
    def _confirms(self) -> bool:
        """Whether the peer is asked to commit to what it took."""
        return self.peer is not None and self.peer.commitment != "off"

    def due(self) -> list[Parcel]:
        """What can be sent now: urgent studies first, then those without failures, each in its order."""
        now, held, troubled = time.time(), set[str](), set[str]()
        found: list[tuple[bool, Parcel]] = []
        outdated = False
        owed = (Delivery.peer == self.name, Delivery.state.in_(("waiting", "running")), Delivery.stored_at.is_(None))
        # Columns, not rows: after a long outage tens of thousands are owed, and an analysis' summary is large.
        made = (Object.kind, Object.path, Object.superseded_by, Analysis.urgent, Series.study_instance_uid)
        query = (
            select(Delivery.id, Delivery.attempts, *made, free(Delivery, now))
            .join(Delivery.object)
            .join(Object.analysis)
            .join(Analysis.series)
            .where(*owed)
            .order_by(Analysis.urgent.desc(), Delivery.id)
        )
        with self.ledger.read() as session:
            rows = session.execute(query, execution_options={"yield_per": BATCH})
            for row, attempts, kind, path, superseded_by, urgent, study_uid, is_free in rows:
                if superseded_by is not None and is_free:
                    outdated = True
                elif study_uid not in held and is_free:
                    found.append((not urgent, Parcel(row, kind, study_uid, path)))
                    if attempts:
                        troubled.add(study_uid)
                elif attempts < ORDERED_ATTEMPTS:
                    held.add(study_uid)
                if len(found) == BATCH:
                    break
        if outdated:
            self._end_superseded(now)
        # A study on which the peer failed goes last: it may be what makes it fail.
        return [one for _, one in sorted(found, key=lambda pair: (pair[1].study_uid in troubled, pair[0]))]

    def _end_superseded(self, now: float) -> None:
        """Objects in whose place those of a newer generation stand are owed no more."""
        superseded = Delivery.object_id.in_(select(Object.id).where(Object.superseded_by.is_not(None)))
        mine = (Delivery.peer == self.name, Delivery.stored_at.is_(None), free(Delivery, now), superseded)
        with self.ledger() as session:
            session.execute(update(Delivery).where(*mine).values(state="superseded", finished_at=now))

    def _read(self, batch: Sequence[Parcel]) -> list[tuple[Parcel, Outgoing]]:
        """The objects of a batch; one whose file is gone or no DICOM is refused here."""
        read = []
        for parcel in batch:
            if parcel.path.endswith(STOPPED):
                self._refuse(parcel, "it did not pass its check and is never sent")
                continue
            try:
                read.append((parcel, Outgoing.read(within(self.results, parcel.path))))
            except (FileNotFoundError, InvalidDicomError, HeaderError, AttributeError):
                self._refuse(parcel, "its file is gone or is no DICOM")
            except UnsafePathError as error:
                self._refuse(parcel, f"its file is not looked for: {error}")
            except OSError as error:
                with self.ledger.lease("deliver", parcel.row) as lease:
                    if lease is not None:
                        lease.put_back(f"{parcel.kind} cannot be read: {plainly(error)}")
        return read

    def _send(self, batch: Sequence[Parcel], line: LineLease) -> None:
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
                            line.answered()
                            answered = True
                    items = self._read(self._soon())
        except PeerError as error:
            if not error.permanent:
                raise
            line.answered()
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
        with self.ledger.lease("deliver", parcel.row) as lease:
            if lease is None:
                return False
            try:
                warning = way.send(item)
            except PeerError as error:
                if error.permanent:
                    self._end(lease, parcel, "refused", f"{parcel.kind} refused by {self.name}: {error}")
                    return True
                log.warning("not delivered, will try again", kind=parcel.kind, peer=self.name, because=str(error))
                lease.put_back(f"{parcel.kind} to {self.name}: {error}", counted=error.reached or lost_costs)
                if not error.reached:
                    raise
                return False
            outcome = f"{parcel.kind} delivered to {self.name}" + (f" ({warning})" if warning else "")
            self._end(lease, parcel, "waiting" if self._confirms else "done", outcome)
            return True

    def _refuse(self, parcel: Parcel, reason: str) -> None:
        with self.ledger.lease("deliver", parcel.row) as lease:
            if lease is not None:
                self._end(lease, parcel, "refused", f"{parcel.kind} not delivered to {self.name}: {reason}")

    def _end(self, lease: Lease, parcel: Parcel, state: State, outcome: str) -> None:
        with lease.finish(state, outcome) as session:
            delivery = session.get_one(Delivery, parcel.row)
            if state == "waiting":  # for the peer's commitment
                delivery.stored_at, delivery.due_at, delivery.finished_at = time.time(), 0.0, None
            self.ledger.tell_of(session, delivery, outcome)
            if state == "refused" and self.peer is not None:
                fallback.owe(self.ledger, session, delivery, self.peer)
        log.info("delivery", outcome=outcome)
