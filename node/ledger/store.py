"""The one durable record of what is owed: series, analyses, objects, deliveries, and an event line for each step.

Work that is still owed is a row, never a message. A worker takes a row by a lease that it renews while it works; a
row whose lease ran out is owed again. Times are seconds since the epoch, UTC.
"""

from __future__ import annotations

import fcntl
import hashlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import alembic.command
import alembic.config
import structlog
from sqlalchemy import (
    JSON,
    ColumnElement,
    Engine,
    ForeignKey,
    Text,
    TypeDecorator,
    UniqueConstraint,
    and_,
    create_engine,
    event,
    or_,
    select,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.pool import NullPool

from node.telemetry.logs import plainly
from node.text import SENTENCE_LENGTH, printable

log = structlog.get_logger(__name__)

#: waiting: owed, due at `due_at` · running: under a lease · done · confirmed: done, and the peer has committed to keep
#: it · refused: ended for good with a reason that trying again would not change · superseded: a newer generation of the
#: series has taken its place · failed: attempts used up.
State = Literal["waiting", "running", "done", "confirmed", "refused", "superseded", "failed"]
Work = Literal["analyse", "deliver", "line"]

#: Seconds for which a lease holds. A worker that dies is overtaken after at most this long; it is renewed every
#: quarter of it, so that three missed renewals are forgiven.
LEASE_S = 60.0

#: An analysis that failed this often is set aside: a series that kills its worker must not be tried for ever. With the
#: backoff below that takes over an hour, so that a full disk or a lost mount can be mended meanwhile.
MAX_ANALYSIS_ATTEMPTS = 6

#: Times that a peer may answer an object with a passing failure, or fall silent over it: with the backoff below about
#: three days. A peer that is not there at all costs no attempts.
MAX_DELIVERY_ATTEMPTS = 80

#: Seconds before the second attempt, the factor for each further one, and the most, with up to a fifth of jitter. A
#: line to a silent peer is tried often: that costs little, and what waits for it goes out soon after it is back.
BACKOFF: dict[Work, tuple[float, float, float]] = {
    "analyse": (15.0, 4.0, 3600.0),
    "deliver": (5.0, 2.0, 3600.0),
    "line": (5.0, 2.0, 120.0),
}
MAX_BACKOFF_S = 3600.0

#: Where to look when nothing but the process itself could have said why.
_HOW = "the log has how it ended (signal 9 is mostly too little memory)"

#: How the verdict begins on a series that the listener could not read in several attempts.
SET_ASIDE = "not analysed: set aside"

#: Seconds to wait for another process to end its transaction.
BUSY_S = 30.0

#: Times that a process which starts waits so long.
MIGRATION_TRIES = 10

#: Seconds after which the sweep rings again for work that nobody has taken.
RING_AGAIN_S = 30.0


class Base(DeclarativeBase):
    """Tables of the ledger."""


class Words(TypeDecorator[str]):
    """A sentence or a name: one printable line of bounded length, as it is written and as it is read.

    Reading matters for rows of versions that bounded nothing.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """On the way in."""
        return None if value is None else printable(value, SENTENCE_LENGTH)

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        """On the way out."""
        return self.process_bind_param(value, dialect)


class Series(Base):
    """One generation of a received series: a closed set of instances."""

    __tablename__ = "series"
    __table_args__ = (
        UniqueConstraint("series_instance_uid", "generation"),
        UniqueConstraint("series_instance_uid", "content", "complete"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    series_instance_uid: Mapped[str] = mapped_column(Text, index=True)
    study_instance_uid: Mapped[str] = mapped_column(Text, index=True)
    #: 1 for the first closing; late instances make the next.
    generation: Mapped[int]
    #: Digest of the SOP instance UIDs: the same set is the same generation.
    content: Mapped[str] = mapped_column(Text)
    calling_ae: Mapped[str] = mapped_column(Words)
    #: Paths of the instances, relative to the spool.
    instances: Mapped[list[str]] = mapped_column(JSON)
    complete: Mapped[bool]
    #: Why the series was closed when it was.
    closed_because: Mapped[str] = mapped_column(Words)
    #: What was decided: the route's name and why, or why it is not analysed.
    verdict: Mapped[str] = mapped_column(Words)
    closed_at: Mapped[float]
    #: When its files were dropped by age (`node.files.retention`).
    dropped_at: Mapped[float | None] = mapped_column(default=None)

    analyses: Mapped[list[Analysis]] = relationship(back_populates="series", order_by="Analysis.id")
    events: Mapped[list[Event]] = relationship(back_populates="series", order_by="Event.id")


class Owed(Base):
    """A row that is work: who has it, until when, how often it was tried."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(Text, index=True, default="waiting")
    attempts: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None] = mapped_column(Text, default=None)
    lease_until: Mapped[float] = mapped_column(default=0.0)
    due_at: Mapped[float] = mapped_column(default=0.0)
    rung_at: Mapped[float] = mapped_column(default=0.0)
    #: What the last attempt said, or why the work ended as it did.
    reason: Mapped[str] = mapped_column(Words, default="")
    finished_at: Mapped[float | None] = mapped_column(default=None)


class Analysis(Owed):
    """One route's analysis of one generation of a series, or of one acquisition in it."""

    __tablename__ = "analyses"
    __table_args__ = (UniqueConstraint("series_id", "route", "acquisition"),)

    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"), index=True)
    route: Mapped[str] = mapped_column(Text)
    #: Name of the method that the route names.
    method: Mapped[str] = mapped_column(Text, default="pneumonia")
    #: Kinds of object that each peer gets, as the route said when the series was closed.
    destinations: Mapped[dict[str, list[str]]] = mapped_column(JSON)
    #: Whether it and its objects overtake the rest.
    urgent: Mapped[bool] = mapped_column(default=False)
    #: Whether the study is told when the series cannot be analysed.
    tell: Mapped[bool] = mapped_column(default=True)
    #: Set when the series is not to be analysed but told about: the reason that the objects state.
    not_analysed: Mapped[str | None] = mapped_column(Words, default=None)
    #: Paths of the instances to analyse, relative to the spool, where they are not all of the series.
    instances: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True), default=None)
    #: Words that tell it from the series' other acquisitions, such as 'acquisition 2'; empty where it has but one.
    acquisition: Mapped[str] = mapped_column(Words, default="")
    #: A sentence for the statement, about what was analysed.
    note: Mapped[str] = mapped_column(Words, default="")
    #: Set when the attempts were used up and the study is still to be told: why.
    gave_up: Mapped[str | None] = mapped_column(Words, default=None)
    #: Content date and time of the objects; fixed at the first attempt so that a second makes the same objects.
    content_at: Mapped[float | None] = mapped_column(default=None)
    #: `node.methods.outcome.plain`.
    summary: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)

    series: Mapped[Series] = relationship(back_populates="analyses")
    objects: Mapped[list[Object]] = relationship(back_populates="analysis", order_by="Object.id")

    def about(self, text: str) -> str:
        """`text`, and before it which of the series' acquisitions it is about."""
        return f"{self.acquisition}: {text}" if self.acquisition else text


class Object(Base):
    """A DICOM object that an analysis made."""

    __tablename__ = "objects"
    __table_args__ = (UniqueConstraint("analysis_id", "sop_instance_uid"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id"), index=True)
    kind: Mapped[str] = mapped_column(Text)
    sop_class_uid: Mapped[str] = mapped_column(Text)
    sop_instance_uid: Mapped[str] = mapped_column(Text, index=True)
    series_instance_uid: Mapped[str] = mapped_column(Text)
    #: Relative to the folder of results.
    path: Mapped[str] = mapped_column(Text)
    #: Row number of the analysis of a newer generation whose objects stand in its place.
    superseded_by: Mapped[int | None] = mapped_column(default=None)

    analysis: Mapped[Analysis] = relationship(back_populates="objects")
    deliveries: Mapped[list[Delivery]] = relationship(back_populates="object", order_by="Delivery.id")


class Delivery(Owed):
    """One object owed to one peer."""

    __tablename__ = "deliveries"
    __table_args__ = (UniqueConstraint("object_id", "peer"),)

    object_id: Mapped[int] = mapped_column(ForeignKey("objects.id"), index=True)
    peer: Mapped[str] = mapped_column(Text, index=True)
    #: When the peer took it. A row that waits and was stored waits for the peer's commitment to keep it.
    stored_at: Mapped[float | None] = mapped_column(default=None)
    #: Times that the commitment was asked for, and the transaction that did so last.
    asks: Mapped[int] = mapped_column(default=0)
    transaction_uid: Mapped[str | None] = mapped_column(Text, default=None)

    object: Mapped[Object] = relationship(back_populates="deliveries")


class Line(Owed):
    """The way to one peer: one worker at a time sends on it, and nobody tries it while it is not due.

    `attempts` counts how often in a row the peer was not reached, `reason` says why.
    """

    __tablename__ = "lines"

    peer: Mapped[str] = mapped_column(Text, unique=True)
    silent_since: Mapped[float | None] = mapped_column(default=None)


class Commitment(Base):
    """A storage commitment transaction (PS3.4 J.3): written down before it goes out, so that any answer finds it."""

    __tablename__ = "commitments"

    transaction_uid: Mapped[str] = mapped_column(Text, primary_key=True)
    peer: Mapped[str] = mapped_column(Text)
    asked_at: Mapped[float]
    answered_at: Mapped[float | None] = mapped_column(default=None)


class Event(Base):
    """One thing that happened to a series, in plain words and without patient data."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"), index=True)
    at: Mapped[float]
    stage: Mapped[str] = mapped_column(Words)
    text: Mapped[str] = mapped_column(Words)

    series: Mapped[Series] = relationship(back_populates="events")


_TABLE: dict[Work, type[Owed]] = {"analyse": Analysis, "deliver": Delivery, "line": Line}
#: Urgent analyses before the rest, then the oldest.
_FIRST = (Analysis.urgent.desc(), Analysis.due_at, Analysis.id)
_ATTEMPTS: dict[Work, int] = {
    "analyse": MAX_ANALYSIS_ATTEMPTS,
    "deliver": MAX_DELIVERY_ATTEMPTS,
    "line": 1 << 62,  # as long as it takes
}


class LeaseLost(RuntimeError):  # noqa: N818 - says what happened, as KeyboardInterrupt does
    """Another worker took the row over; what this one did must not be recorded."""


class Ledger:
    """The ledger in a database; `ledger()` opens a transaction, `ledger.read()` one that only reads.

    Parameters
    ----------
    url
        SQLAlchemy URL of an SQLite database. It runs with WAL, foreign keys and `synchronous=FULL`: what was
        committed survives the loss of power.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        reader = self.engine.execution_options(lungnode_reads=True)
        self._readers = sessionmaker(reader, expire_on_commit=False, autoflush=False)

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
        """Bring the tables to this version's form; safe to call from several processes at once.

        A process that starts must not end because another one has the ledger for a while: it waits.
        """
        for tries_left in reversed(range(MIGRATION_TRIES)):
            try:
                self._migrate(revision)
                return
            except OperationalError as error:
                if not tries_left or "locked" not in str(error.orig):
                    raise
                log.warning("another program holds the ledger; waiting for it", seconds=BUSY_S)

    def _migrate(self, revision: str) -> None:
        settings = alembic.config.Config()
        settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with _migration_lock(self.engine), self.engine.connect() as connection:
            settings.attributes["connection"] = connection
            alembic.command.upgrade(settings, revision)
            connection.commit()

    def tell(self, session: Session, series_id: int, stage: str, text: str) -> None:
        """Add an event line to a series; `text` holds no patient data."""
        session.add(Event(series_id=series_id, at=time.time(), stage=stage, text=text))

    def tell_of(self, session: Session, row: Owed, text: str) -> None:
        """Add an event line about an analysis or a delivery to its series; `text` holds no patient data."""
        analysis = row.object.analysis if isinstance(row, Delivery) else row
        assert isinstance(analysis, Analysis)
        stage = "delivery" if isinstance(row, Delivery) else "analysis"
        self.tell(session, analysis.series_id, stage, analysis.about(text))

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
            closed_at=time.time(),
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

    def analyses_owed(self, limit: int = 500) -> list[int]:
        """Analyses that nobody has and for which no bell was rung lately, most urgent first; marks them as rung.

        Rows whose workers died at every attempt are set aside on the way.
        """
        now = time.time()
        with self() as session:
            self._bury(session, "analyse", now)
            ready = select(Analysis.id).where(free(Analysis, now), _unheard(Analysis, now))
            ids = list(session.scalars(ready.order_by(*_FIRST).limit(limit)))
            session.execute(update(Analysis).where(Analysis.id.in_(ids)).values(rung_at=now))
        return ids

    def peers_owed(self) -> list[str]:
        """Peers whose line is free, to whom something is due and for whom no bell was rung lately; marks them as rung.

        Deliveries whose workers died at every attempt are set aside on the way.
        """
        now = time.time()
        with self() as session:
            self._bury(session, "deliver", now)
            names = list(session.scalars(select(Delivery.peer).where(free(Delivery, now)).distinct()))
            for name in names:
                _line(session, name)
            session.flush()
            ready = select(Line).where(Line.peer.in_(names), free(Line, now), _unheard(Line, now))
            lines = list(session.scalars(ready.order_by(Line.id)))
            for line in lines:
                line.rung_at = now
        return [line.peer for line in lines]

    def next_analysis(self, row: int) -> int:
        """The analysis that a bell for `row` is answered with: one that is more urgent, else that row, else the oldest.

        There are as many bells as rows, so what is passed over is not forgotten.
        """
        with self.read() as session:
            query = select(Analysis.id, Analysis.urgent).where(free(Analysis, time.time())).order_by(*_FIRST)
            ready = session.execute(query).all()
        if not ready or (not ready[0].urgent and any(one.id == row for one in ready)):
            return row
        return int(ready[0].id)

    def _bury(self, session: Session, work: Work, now: float) -> None:
        table = _TABLE[work]
        dead = [free(table, now), table.attempts >= _ATTEMPTS[work]]
        if work == "deliver":
            dead.append(Delivery.stored_at.is_(None))  # what was stored at the last attempt waits for the commitment
        for row in session.scalars(select(table).where(*dead)):
            self.set_aside(session, row, f"its process died or hung at each of {row.attempts} attempts; {_HOW}")
        session.flush()

    def set_aside(self, session: Session, row: Owed, reason: str) -> None:
        """End work whose attempts are used up. An analysis of which the study is to be told stays owed for that."""
        row.reason, row.lease_owner, row.lease_until = reason, None, 0.0
        if isinstance(row, Analysis) and row.tell and row.gave_up is None:
            row.gave_up, row.state, row.attempts, row.due_at, row.rung_at = reason, "waiting", 0, 0.0, 0.0
        else:
            row.state, row.finished_at = "failed", time.time()
        self.tell_of(session, row, f"set aside: {reason}")

    @contextmanager
    def lease(self, work: Work, row: int) -> Iterator[Lease | None]:
        """Take a row for the length of the block, renewing the lease; None when it is not to be had.

        An exception out of the block puts the row back with a backoff, or sets it aside as 'failed' once its attempts
        are used up. A row still running at the end of the block goes back to waiting.
        """
        lease = Lease(self, work, row)
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
    def line(self, peer: str) -> Iterator[LineLease | None]:
        """Take the line to a peer for the length of the block; None when another worker has it or it is not due."""
        with self() as session:
            row = _line(session, peer)
            session.flush()
            number = row.id
        lease = LineLease(self, "line", number)
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
        """Owe again all work of a series that ended as failed or refused, now; gives the number of rows."""
        with self() as session:
            analyses = select(Analysis.id).where(Analysis.series_id == series_id)
            objects = select(Object.id).where(Object.analysis_id.in_(analyses))
            ended: dict[str, Any] = {"state": "waiting", "attempts": 0, "reason": "retried by hand"}
            now: dict[str, Any] = {"due_at": 0.0, "rung_at": 0.0}
            anew: dict[type[Owed], dict[str, Any]] = {
                Analysis: {"gave_up": None},
                Delivery: {"stored_at": None, "asks": 0, "finished_at": None},
            }
            count = 0
            outdated = select(Object.analysis_id).where(Object.superseded_by.is_not(None))
            current = and_(Analysis.id.in_(analyses), Analysis.id.not_in(outdated))
            for table, mine in ((Analysis, current), (Delivery, Delivery.object_id.in_(objects))):
                # What waits with a reason waits for its next attempt, or for a peer that was silent.
                late = update(table).where(mine, table.state == "waiting", table.reason != "")
                count += _rows(session.execute(late.values(now)))
                over = update(table).where(mine, table.state.in_(("failed", "refused")))
                count += _rows(session.execute(over.values(ended | now | anew[table])))
            session.execute(update(Line).where(Line.state == "waiting").values(now))
            if count:
                self.tell(session, series_id, "retry", f"{count} owed again by hand")
        return count


class Lease:
    """A worker's hold on one row of work."""

    def __init__(self, ledger: Ledger, work: Work, row: int) -> None:
        self.owner = secrets.token_hex(8)
        self.row = row
        self._ledger, self._work, self._table = ledger, work, _TABLE[work]
        self._mine = and_(self._table.id == row, self._table.lease_owner == self.owner, self._table.state == "running")

    def take(self) -> bool:
        """Claim the row: false when it is done, not due, or held by another."""
        mine = select(self._table.attempts).where(self._table.id == self.row, self._table.state == "running")
        with self._ledger() as session:
            silent = session.scalar(mine)
            # Only now: another program may have had the ledger for half a lease.
            now = time.time()
            may = and_(free(self._table, now), self._table.attempts < _ATTEMPTS[self._work])
            claim = update(self._table).where(self._table.id == self.row, may)
            values = {"state": "running", "lease_owner": self.owner, "lease_until": now + LEASE_S}
            if not _rows(session.execute(claim.values(**values, attempts=self._table.attempts + 1))):
                return False
            if silent is not None and self._work != "line":
                text = f"attempt {silent} ended without a word: its process died or hung"
                self._ledger.tell_of(session, session.get_one(self._table, self.row), text)
            return True

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease from a thread for the length of the block."""
        stop = threading.Event()

        def beat() -> None:
            pause = LEASE_S / 4
            while not stop.wait(pause):
                pause = 1.0  # a ledger that cannot be written now may be writable soon
                with suppress(Exception), self._ledger() as session:
                    session.execute(select(self._table.id).where(self._mine))  # begins, and waits for others
                    renewal = update(self._table).where(self._mine)
                    session.execute(renewal.values(lease_until=time.time() + LEASE_S))
                    pause = LEASE_S / 4

        thread = threading.Thread(target=beat, name=f"lease-{self._work}-{self.row}", daemon=True)
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
            end = update(self._table).where(self._mine)
            values = {"state": state, "reason": reason, "finished_at": time.time(), "lease_owner": None}
            if not _rows(session.execute(end.values(**values, lease_until=0.0))):
                raise LeaseLost(f"{self._work} {self.row}: the lease ran out and another worker took over")
            yield session

    def put_back(self, reason: str, *, counted: bool = True) -> float:
        """Owe the work again after a backoff, or set it aside when its attempts are used up; no-op once finished.

        Gives the time when it is due again. An attempt that is not `counted` is due at once.
        """
        with self._ledger() as session:
            row = session.scalar(select(self._table).where(self._mine))
            if row is None:
                return 0.0
            if counted and row.attempts >= _ATTEMPTS[self._work]:
                self._ledger.set_aside(session, row, f"{reason} (attempt {row.attempts})")
                return 0.0
            row.state, row.reason, row.lease_owner, row.lease_until, row.rung_at = "waiting", reason, None, 0.0, 0.0
            if counted:
                row.due_at = time.time() + backoff_s(self._work, row.attempts)
                self._ledger.tell_of(session, row, f"will be tried again after attempt {row.attempts}: {reason}")
            else:
                row.attempts -= 1
                row.due_at = time.time()
            return row.due_at


class LineLease(Lease):
    """A worker's hold on the line to a peer."""

    def answered(self) -> None:
        """The peer answers: what waits for it goes on."""
        with self._ledger() as session:
            line = session.scalar(select(Line).where(self._mine))
            if line is None:
                return
            if line.silent_since is not None:
                waiting = (Delivery.peer == line.peer, Delivery.state == "waiting", Delivery.reason == line.reason)
                session.execute(update(Delivery).where(*waiting).values(reason=""))
                self._tell_waiting(session, line, f"{line.peer} answers again")
            line.attempts, line.reason, line.silent_since = 0, "", None

    def silent(self, reason: str) -> None:
        """The peer was not reached: nobody tries it before a backoff, and what waits for it says so."""
        with self._ledger() as session:
            line = session.scalar(select(Line).where(self._mine))
            if line is None:
                return
            now = time.time()
            waiting = (Delivery.peer == line.peer, Delivery.state == "waiting", Delivery.attempts == 0)
            # Of tens of thousands that wait for it, those that are new.
            session.execute(update(Delivery).where(*waiting, Delivery.reason != reason).values(reason=reason))
            if line.silent_since is None:
                line.silent_since = now
                self._tell_waiting(session, line, f"not delivered yet, tried again until {line.peer} answers: {reason}")
            line.state, line.lease_owner, line.lease_until, line.rung_at = "waiting", None, 0.0, 0.0
            line.reason, line.due_at = reason, now + backoff_s("line", line.attempts)

    def hand_back(self) -> None:
        """Let others have the line, and the sweep ring for what came meanwhile; no-op after `silent`."""
        with self._ledger() as session:
            line = session.scalar(select(Line).where(self._mine))
            if line is not None:
                line.attempts = max(0, line.attempts - 1) if line.silent_since is not None else 0
                line.state, line.lease_owner, line.lease_until, line.rung_at = "waiting", None, 0.0, 0.0

    def _tell_waiting(self, session: Session, line: Line, text: str) -> None:
        """An event line for each series of which something waits for this peer."""
        waits = (Delivery.peer == line.peer, Delivery.state == "waiting", Delivery.stored_at.is_(None))
        series = select(Analysis.series_id).join(Object).join(Delivery)
        for row in session.scalars(series.where(*waits).distinct()):
            self._ledger.tell(session, row, "delivery", text)


def content_digest(sop_instance_uids: Iterable[str]) -> str:
    """Digest of a set of instances, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(sop_instance_uids))).encode()).hexdigest()


def backoff_s(work: Work, attempts: int, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait before the next attempt, after `attempts` of them."""
    first, factor, most = BACKOFF[work]
    return float(min(first * factor ** min(attempts - 1, 30), most) * (1 + jitter() / 5))


def free(table: type[Owed], now: float) -> ColumnElement[bool]:
    """Whether a row is owed and nobody holds it.

    A time further ahead than we ever set one was written by a clock that has since been put back.
    """
    return or_(
        and_(table.state == "waiting", or_(table.due_at <= now, table.due_at > now + 2 * MAX_BACKOFF_S)),
        and_(table.state == "running", or_(table.lease_until <= now, table.lease_until > now + 2 * LEASE_S)),
    )


def _unheard(table: type[Owed], now: float) -> ColumnElement[bool]:
    """Whether no bell was rung for a row lately."""
    return or_(table.rung_at < now - RING_AGAIN_S, table.rung_at > now)


def _line(session: Session, peer: str) -> Line:
    found = session.scalar(select(Line).where(Line.peer == peer))
    if found is None:
        found = Line(peer=peer)
        session.add(found)
    return found


def _rows(result: Any) -> int:
    """Rows that an UPDATE changed."""
    return int(result.rowcount)


def _engine(url: str) -> Engine:
    # A connection must not cross the fork of a worker's pool, so none is kept open to a file.
    engine = create_engine(url, poolclass=NullPool if url.startswith("sqlite:///") else None)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # The driver must not open transactions by itself: BEGIN IMMEDIATE below does, so that two writers wait for one
        # another instead of failing half-way through. Who only reads has a snapshot (WAL), and holds up nobody.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={BUSY_S * 1000:.0f}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reads = connection.get_execution_options().get("lungnode_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def _migration_lock(engine: Engine) -> Iterator[None]:
    """One migration at a time: a file beside the database is locked."""
    database = engine.url.database
    if not database:  # in memory
        yield
        return
    with Path(f"{database}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
