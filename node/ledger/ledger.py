"""The ledger: opens its database, records closed series, and says what work is due and who may have it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session, sessionmaker

from node.ledger import database
from node.ledger.events import EventKind
from node.ledger.leases import MAX_ATTEMPTS, Lease, LeaseLost, PeerLease, Timeouts, claimable, due, set_aside
from node.ledger.record import move_all, record_event, rows
from node.ledger.tables import AnalysisJob, Delivery, Object, PeerRecord, Series, Work
from node.ledger.transitions import RETRIED, TAKEN, State
from node.telemetry.logs import plainly

#: Where to look when nothing but the process itself could have said why.
_HOW = "the log has how it ended (signal 9 is mostly too little memory)"

#: Urgent analyses before the rest, then the oldest.
_FIRST = (AnalysisJob.urgent.desc(), AnalysisJob.due_at, AnalysisJob.id)


class Ledger:
    """The ledger in a database; `ledger()` opens a transaction, `ledger.read()` one that only reads.

    Parameters
    ----------
    url
        SQLAlchemy URL of an SQLite database. It runs with WAL, foreign keys and `synchronous=FULL`: what was
        committed survives the loss of power.
    clock
        Seconds since the epoch.
    timeouts
        How long leases hold and failed work waits.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time, timeouts: Timeouts | None = None) -> None:
        self.clock, self.timeouts = clock, timeouts or Timeouts()
        self.engine = database.open_engine(url, self.timeouts.busy_s)
        # Called by name, so that a test may move the clock of an open ledger.
        info = {"clock": lambda: self.clock()}
        self._sessions = sessionmaker(self.engine, expire_on_commit=False, info=info)
        reader = self.engine.execution_options(lungnode_reads=True)
        self._readers = sessionmaker(reader, expire_on_commit=False, autoflush=False, info=info)

    @contextmanager
    def __call__(self) -> Iterator[Session]:
        """A session that commits at the end of the block, or rolls back when it raises."""
        with self._sessions.begin() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees the ledger as it is now and writes nothing: it waits for no writer, and none for it."""
        with self._readers() as session:
            yield session

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to this version's form; safe to call from several processes at once."""
        database.migrate(self.engine, revision, self.timeouts.busy_s)

    def claimable(self, table: type[Work]) -> ColumnElement[bool]:
        """Whether a row is due for a worker now and nobody holds it."""
        return claimable(table, self.clock(), self.timeouts)

    def commitment_due(self) -> ColumnElement[bool]:
        """Whether a peer is to be asked now for its commitment to an object that it took."""
        return and_(Delivery.state == State.STORED, due(Delivery, self.clock()))

    def add_series(
        self, session: Session, uid: str, study_uid: str, sop_instance_uids: Iterable[str], complete: bool, **rest: Any
    ) -> Series | None:
        """Record a closed series as its next generation; None when it says nothing new.

        The same set of instances is news only when it was incomplete and now is not: its sender came to the end.
        """
        content = content_digest(sop_instance_uids)
        before = session.scalars(select(Series).where(Series.series_instance_uid == uid)).all()
        if any(series.content == content and (series.complete or not complete) for series in before):
            return None
        row = Series(
            series_instance_uid=uid,
            study_instance_uid=study_uid,
            generation=1 + max((series.generation for series in before), default=0),
            content=content,
            complete=complete,
            closed_at=self.clock(),
            **rest,
        )
        session.add(row)
        session.flush()
        return row

    def lacks(self, study_uid: str, series_uid: str) -> bool:
        """Whether the newest generation of a series was closed as incomplete."""
        mine = (Series.study_instance_uid == study_uid, Series.series_instance_uid == series_uid)
        with self.read() as session:
            complete = session.scalar(select(Series.complete).where(*mine).order_by(Series.id.desc()).limit(1))
        return complete is False

    def analyses_due(self, limit: int = 500) -> list[int]:
        """Analyses that nobody has and of which nobody was notified lately, most urgent first; marks them.

        Rows whose workers died at every attempt are set aside on the way.
        """
        with self() as session:
            self._set_aside_used_up(session, AnalysisJob)
            ready = select(AnalysisJob.id).where(self.claimable(AnalysisJob), self._not_notified(AnalysisJob))
            ids = list(session.scalars(ready.order_by(*_FIRST).limit(limit)))
            notified = update(AnalysisJob).where(AnalysisJob.id.in_(ids))
            session.execute(notified.values(last_notified_at=self.clock()))
        return ids

    def peers_due(self) -> list[str]:
        """Peers for whom something is due, to whom nobody sends and of whom nobody was notified lately; marks them.

        Deliveries whose workers died at every attempt are set aside on the way.
        """
        with self() as session:
            self._set_aside_used_up(session, Delivery)
            something = or_(self.claimable(Delivery), self.commitment_due())
            names = list(session.scalars(select(Delivery.peer).where(something).distinct()))
            for name in names:
                _peer(session, name)
            session.flush()
            ready = (PeerRecord.peer.in_(names), self.claimable(PeerRecord), self._not_notified(PeerRecord))
            peers = list(session.scalars(select(PeerRecord).where(*ready).order_by(PeerRecord.id)))
            for peer in peers:
                peer.last_notified_at = self.clock()
        return [peer.peer for peer in peers]

    def next_analysis(self, row: int) -> int:
        """The analysis to do on a notification of `row`: one that is more urgent, else that row, else the oldest.

        There are as many notifications as rows, so what is passed over is not forgotten.
        """
        with self.read() as session:
            query = select(AnalysisJob.id, AnalysisJob.urgent).where(self.claimable(AnalysisJob)).order_by(*_FIRST)
            ready = session.execute(query).all()
        if not ready or (not ready[0].urgent and any(one.id == row for one in ready)):
            return row
        return int(ready[0].id)

    @contextmanager
    def lease(self, table: type[Work], row: int) -> Iterator[Lease | None]:
        """Take a row for the length of the block, renewing the lease; None when it is not to be had.

        An exception out of the block puts the row back with a backoff, or sets it aside as failed once its attempts
        are used up. A row still under the lease at the end of the block is put back.
        """
        lease = Lease(self, table, row)
        if not lease.take():
            yield None
            return
        with lease.renewed():
            try:
                yield lease
            except LeaseLost:
                return
            except Exception as error:
                lease.put_back(plainly(error))
                raise
            except BaseException:
                lease.put_back("handed back by a worker that was stopped", counted=False)
                raise
            lease.put_back("handed back")

    @contextmanager
    def peer_lease(self, peer: str) -> Iterator[PeerLease | None]:
        """Take a peer for the length of the block; None when another worker has it or it is not due."""
        with self() as session:
            row = _peer(session, peer)
            session.flush()
            number = row.id
        lease = PeerLease(self, PeerRecord, number)
        if not lease.take():
            yield None
            return
        with lease.renewed():
            try:
                yield lease
            finally:
                lease.hand_back()

    def series_ids(self) -> list[int]:
        """Row numbers of all series."""
        with self.read() as session:
            return list(session.scalars(select(Series.id).order_by(Series.id)))

    def retry(self, series_id: int) -> int:
        """Make all work of a series due now that ended as failed, refused or unconfirmed, or waits for a later attempt.

        Gives the number of rows.
        """
        retried: dict[str, Any] = {"attempts": 0, "reason": "retried by hand", "due_at": 0.0}
        at_once: dict[str, Any] = {"due_at": 0.0, "last_notified_at": 0.0}
        more: dict[type[Work], dict[str, Any]] = {
            AnalysisJob: {"gave_up": None},
            Delivery: {"stored_at": None, "asks": 0},
        }
        with self() as session:
            analyses = select(AnalysisJob.id).where(AnalysisJob.series_id == series_id)
            objects = select(Object.id).where(Object.analysis_id.in_(analyses))
            outdated = select(Object.analysis_id).where(Object.superseded_by.is_not(None))
            current = and_(AnalysisJob.id.in_(analyses), AnalysisJob.id.not_in(outdated))
            count = 0
            for table, mine in ((AnalysisJob, current), (Delivery, Delivery.object_id.in_(objects))):
                # What is due with a reason waits for its next attempt or request, or for a peer that was not reached.
                late = update(table).where(mine, table.state.in_((*TAKEN, State.STORED)), table.reason != "")
                count += rows(session.execute(late.values(at_once)))
                ended = RETRIED if table is Delivery else RETRIED - {State.UNCONFIRMED}
                count += move_all(session, table, ended, State.WAITING, mine, **retried, **more[table])
            session.execute(update(PeerRecord).where(PeerRecord.state.in_(TAKEN)).values(at_once))
            if count:
                record_event(session, series_id, EventKind.RETRIED, count=count)
        return count

    def _not_notified(self, table: type[Work]) -> ColumnElement[bool]:
        """Whether workers were not notified of a row lately."""
        at = self.clock()
        return or_(table.last_notified_at < at - self.timeouts.notify_again_s, table.last_notified_at > at)

    def _set_aside_used_up(self, session: Session, table: type[Work]) -> None:
        """Set aside what no worker came to the end of, at any of its attempts."""
        used_up = (self.claimable(table), table.attempts >= MAX_ATTEMPTS[table.kind_of_work])
        for row in session.scalars(select(table).where(*used_up)):
            set_aside(session, row, f"its process died or hung at each of {row.attempts} attempts; {_HOW}")
        session.flush()


def content_digest(sop_instance_uids: Iterable[str]) -> str:
    """Digest of a set of instances, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(sop_instance_uids))).encode()).hexdigest()


def _peer(session: Session, peer: str) -> PeerRecord:
    found = session.scalar(select(PeerRecord).where(PeerRecord.peer == peer))
    if found is None:
        found = PeerRecord(peer=peer)
        session.add(found)
    return found
