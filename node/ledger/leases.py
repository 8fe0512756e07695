"""Who works: a worker holds a row by a lease that it renews, and puts it back, ends it, or is overtaken."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from node.ledger.events import EventKind
from node.ledger.record import move, now, record_event
from node.ledger.tables import AnalysisJob, Delivery, Object, PeerRecord, Work
from node.ledger.transitions import PUT_BACK, TAKEN, Kind, State

if TYPE_CHECKING:
    from node.ledger.ledger import Ledger

#: An analysis that failed this often is set aside: a series that kills its worker must not be tried for ever. With the
#: backoff below that takes over an hour, so that a full disk or a lost mount can be repaired meanwhile.
MAX_ANALYSIS_ATTEMPTS: Final = 6

#: Times that a peer may answer an object with a passing failure, or fall silent over it: with the backoff below about
#: three days. A peer that is not there at all costs no attempts.
MAX_DELIVERY_ATTEMPTS: Final = 80

#: Attempts by kind of work. A peer is tried for as long as it takes.
MAX_ATTEMPTS: Final[Mapping[Kind, int]] = {
    Kind.ANALYSIS: MAX_ANALYSIS_ATTEMPTS,
    Kind.DELIVERY: MAX_DELIVERY_ATTEMPTS,
    Kind.PEER: 1 << 62,
}

#: Seconds; no backoff is longer.
MAX_BACKOFF_S: Final = 3600.0


class Backoff(NamedTuple):
    """Seconds before the second attempt, the factor for each further one, and the most."""

    first_s: float
    factor: float
    most_s: float


@dataclass(frozen=True)
class Timeouts:
    """How long the ledger and its workers wait."""

    #: Seconds for which a lease holds. A worker that dies is overtaken after at most this long; it is renewed every
    #: quarter of it, so that three missed renewals are forgiven.
    lease_s: float = 60.0
    #: Seconds after which workers are notified again of work that nobody has taken.
    notify_again_s: float = 30.0
    #: Seconds to wait for another process to end its transaction.
    busy_s: float = 30.0
    #: With up to a fifth of jitter. A silent peer is tried often: it is cheap, and its queue drains soon after it
    #: returns.
    backoff: Mapping[Kind, Backoff] = field(
        default_factory=lambda: {
            Kind.ANALYSIS: Backoff(15.0, 4.0, MAX_BACKOFF_S),
            Kind.DELIVERY: Backoff(5.0, 2.0, MAX_BACKOFF_S),
            Kind.PEER: Backoff(5.0, 2.0, 120.0),
        }
    )

    def backoff_s(self, kind: Kind, attempts: int, jitter: Callable[[], float] = random.random) -> float:
        """Seconds to wait before the next attempt, after `attempts` of them."""
        first, factor, most = self.backoff[kind]
        return float(min(first * factor ** min(attempts - 1, 30), most) * (1 + jitter() / 5))


class LeaseLost(RuntimeError):  # noqa: N818 - says what happened, as KeyboardInterrupt does
    """Another worker took the row over; what this one did must not be recorded."""


def due(table: type[Work], at: float) -> ColumnElement[bool]:
    """Whether the time of a row's next attempt has come.

    A time further ahead than we ever set one was written by a clock that has since been put back.
    """
    return or_(table.due_at <= at, table.due_at > at + 2 * MAX_BACKOFF_S)


def claimable(table: type[Work], at: float, timeouts: Timeouts) -> ColumnElement[bool]:
    """Whether a row is due for a worker and nobody holds it."""
    lease_over = or_(table.lease_until <= at, table.lease_until > at + 2 * timeouts.lease_s)
    return or_(and_(table.state.in_(TAKEN), due(table, at)), and_(table.state.in_(PUT_BACK), lease_over))


def set_aside(session: Session, row: Work, reason: str) -> None:
    """End work whose attempts are used up. An analysis whose failure is to be reported stays due for that."""
    if isinstance(row, AnalysisJob) and row.report and row.state in (State.WAITING, State.RUNNING):
        move(session, row, State.REPORT_DUE, reason=reason)
        row.gave_up, row.attempts, row.due_at = reason, 0, 0.0
    else:
        move(session, row, State.FAILED, reason=reason)
    record_event(session, row, EventKind.SET_ASIDE, reason=reason)


class Lease:
    """A worker's hold on one row of work."""

    def __init__(self, ledger: Ledger, table: type[Work], row: int) -> None:
        self.owner = secrets.token_hex(8)
        self.row = row
        self._ledger, self._table = ledger, table
        self._mine = and_(table.id == row, table.lease_owner == self.owner, table.state.in_(PUT_BACK))

    def take(self) -> bool:
        """Claim the row: false when it is done, not due, or held by another."""
        kind = self._table.kind_of_work
        with self._ledger() as session:
            # The row first, the time then: another program may have had the ledger for half a lease.
            session.execute(select(self._table.id).where(self._table.id == self.row).with_for_update())
            at = now(session)
            may = and_(claimable(self._table, at, self._ledger.timeouts), self._table.attempts < MAX_ATTEMPTS[kind])
            row = session.scalar(select(self._table).where(self._table.id == self.row, may))
            if row is None:
                return False
            lost = row.state in PUT_BACK
            move(session, row, row.state if lost else TAKEN[row.state])
            if lost and kind is not Kind.PEER:
                record_event(session, row, EventKind.WORKER_LOST, attempt=row.attempts)
            row.attempts += 1
            row.lease_owner, row.lease_until = self.owner, at + self._ledger.timeouts.lease_s
            return True

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease from a thread for the length of the block."""
        stop = threading.Event()
        lease_s = self._ledger.timeouts.lease_s

        def beat() -> None:
            pause = lease_s / 4
            while not stop.wait(pause):
                pause = 1.0  # a ledger that cannot be written now may be writable soon
                with suppress(Exception), self._ledger() as session:
                    session.execute(select(self._table.id).where(self._mine))  # begins, and waits for others
                    renewal = update(self._table).where(self._mine)
                    session.execute(renewal.values(lease_until=now(session) + lease_s))
                    pause = lease_s / 4

        name = f"lease-{self._table.kind_of_work}-{self.row}"
        thread = threading.Thread(target=beat, name=name, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def finish(self, state: State, reason: str = "") -> Iterator[Session]:
        """End the work in one transaction with what the block writes; raises `LeaseLost` when the row is not ours."""
        with self._ledger() as session:
            row = self._held(session)
            if row is None:
                kind = self._table.kind_of_work
                raise LeaseLost(f"{kind} {self.row}: the lease ran out and another worker took over")
            move(session, row, state, reason=reason)
            session.flush()
            yield session

    def put_back(self, reason: str, *, counted: bool = True) -> float:
        """Put the work back for a later attempt, or set it aside when its attempts are used up; no-op once finished.

        Gives the time when it is due again. An attempt that is not `counted` is due at once.
        """
        kind = self._table.kind_of_work
        with self._ledger() as session:
            row = self._held(session)
            if row is None:
                return 0.0
            if counted and row.attempts >= MAX_ATTEMPTS[kind]:
                set_aside(session, row, f"{reason} (attempt {row.attempts})")
                return 0.0
            move(session, row, PUT_BACK[row.state], reason=reason)
            row.due_at = now(session)
            if counted:
                row.due_at += self._ledger.timeouts.backoff_s(kind, row.attempts)
                record_event(session, row, EventKind.ATTEMPT_FAILED, attempt=row.attempts, reason=reason)
            else:
                row.attempts -= 1
            return row.due_at

    def _held(self, session: Session) -> Work | None:
        """The row, as long as it is ours."""
        return session.scalar(select(self._table).where(self._mine).with_for_update())


class PeerLease(Lease):
    """A worker's hold on a peer: nobody else sends to it meanwhile."""

    def answered(self) -> None:
        """The peer answers: what waits for it goes on."""
        with self._ledger() as session:
            peer = self._peer(session)
            if peer is None:
                return
            if peer.state is State.PROBING:
                move(session, peer, State.RUNNING)
                waiting = (Delivery.peer == peer.peer, Delivery.state == State.WAITING, Delivery.reason == peer.reason)
                session.execute(update(Delivery).where(*waiting).values(reason=""))
                self._record_for_waiting(session, peer, EventKind.PEER_ANSWERS)
            peer.attempts, peer.reason, peer.unreachable_since = 0, "", None

    def unreachable(self, reason: str) -> None:
        """The peer was not reached: nobody tries it before a backoff, and what waits for it says so."""
        with self._ledger() as session:
            peer = self._peer(session)
            if peer is None:
                return
            new = (Delivery.peer == peer.peer, Delivery.state == State.WAITING, Delivery.attempts == 0)
            # Of tens of thousands that wait for it, those that are new.
            session.execute(update(Delivery).where(*new, Delivery.reason != reason).values(reason=reason))
            if peer.state is State.RUNNING:
                peer.unreachable_since = now(session)
                self._record_for_waiting(session, peer, EventKind.PEER_UNREACHABLE, reason=reason)
            move(session, peer, State.UNREACHABLE, reason=reason)
            peer.due_at = now(session) + self._ledger.timeouts.backoff_s(Kind.PEER, peer.attempts)

    def hand_back(self) -> None:
        """Let others have the peer, and workers be notified of what came meanwhile; no-op after `unreachable`."""
        with self._ledger() as session:
            peer = self._peer(session)
            if peer is not None:
                peer.attempts = max(0, peer.attempts - 1) if peer.state is State.PROBING else 0
                move(session, peer, PUT_BACK[peer.state])

    def _peer(self, session: Session) -> PeerRecord | None:
        row = self._held(session)
        assert row is None or isinstance(row, PeerRecord)
        return row

    def _record_for_waiting(self, session: Session, peer: PeerRecord, kind: EventKind, **data: str) -> None:
        """An event for each series of which something waits for this peer."""
        waits = (Delivery.peer == peer.peer, Delivery.state == State.WAITING)
        series = select(AnalysisJob.series_id).join(Object).join(Delivery)
        for row in session.scalars(series.where(*waits).distinct()):
            record_event(session, row, kind, peer=peer.peer, **data)
