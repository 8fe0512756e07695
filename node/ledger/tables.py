"""The tables of the ledger.

Series → analyses → objects → deliveries, an event for each step, and a row for each peer that something is sent to.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from node.ledger.events import render
from node.ledger.transitions import Kind, State
from node.text import SENTENCE_LENGTH, printable, tidy

#: How the verdict begins on a series that the listener could not read in several attempts.
SET_ASIDE = "not analysed: set aside"


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


class EventData(TypeDecorator[dict[str, Any]]):
    """Data of an event: plain values whose texts are as those of `Words`, as they are written and as they are read."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Any) -> dict[str, Any]:
        """On the way in."""
        tidied: dict[str, Any] = tidy(value or {}, SENTENCE_LENGTH)
        return tidied

    def process_result_value(self, value: dict[str, Any] | None, dialect: Any) -> dict[str, Any]:
        """On the way out."""
        return self.process_bind_param(value, dialect)


class StateText(TypeDecorator[State]):
    """A `State`, stored as its text; a text that is no state is refused."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """On the way in."""
        return None if value is None else State(value).value

    def process_result_value(self, value: str | None, dialect: Any) -> State | None:
        """On the way out."""
        return None if value is None else State(value)


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

    analyses: Mapped[list[AnalysisJob]] = relationship(back_populates="series", order_by="AnalysisJob.id")
    events: Mapped[list[Event]] = relationship(back_populates="series", order_by="Event.id")


class Work(Base):
    """A row of work: where it stands, who has it and until when, and how often it was tried.

    Only `node.ledger.record.move` writes `state`.
    """

    __abstract__ = True
    kind_of_work: ClassVar[Kind]

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[State] = mapped_column(StateText, index=True, default=State.WAITING)
    attempts: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None] = mapped_column(Text, default=None)
    lease_until: Mapped[float] = mapped_column(default=0.0)
    #: When the next attempt, or the next request for a commitment, is due.
    due_at: Mapped[float] = mapped_column(default=0.0)
    #: When workers were last notified of it through the broker.
    last_notified_at: Mapped[float] = mapped_column(default=0.0)
    #: What came of the last attempt, or why the work ended as it did.
    reason: Mapped[str] = mapped_column(Words, default="")
    finished_at: Mapped[float | None] = mapped_column(default=None)


class AnalysisJob(Work):
    """One route's analysis of one generation of a series, or of one acquisition in it."""

    __tablename__ = "analyses"
    __table_args__ = (UniqueConstraint("series_id", "route", "acquisition"),)
    kind_of_work = Kind.ANALYSIS

    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"), index=True)
    route: Mapped[str] = mapped_column(Text)
    #: Name of the method that the route names.
    method: Mapped[str] = mapped_column(Text, default="pneumonia")
    #: Kinds of object that each peer gets, as the route said when the series was closed.
    destinations: Mapped[dict[str, list[str]]] = mapped_column(JSON)
    #: Whether it and its objects go before the rest.
    urgent: Mapped[bool] = mapped_column(default=False)
    #: Whether the study gets objects that say why, when the series cannot be analysed.
    report: Mapped[bool] = mapped_column(default=True)
    #: Set when the series is not to be analysed but reported as such: the reason that the objects state.
    not_analysed: Mapped[str | None] = mapped_column(Words, default=None)
    #: Paths of the instances to analyse, relative to the spool, where they are not all of the series.
    instances: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True), default=None)
    #: Words that distinguish it from the series' other acquisitions, such as 'acquisition 2'; empty where it has one.
    acquisition: Mapped[str] = mapped_column(Words, default="")
    #: A sentence for the report, about what was analysed.
    note: Mapped[str] = mapped_column(Words, default="")
    #: Why the analysis failed, from when its attempts were used up until it is retried by hand.
    gave_up: Mapped[str | None] = mapped_column(Words, default=None)
    #: Content date and time of the objects; fixed at the first attempt so that a second makes the same objects.
    content_at: Mapped[float | None] = mapped_column(default=None)
    #: `node.methods.outcome.plain`.
    summary: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)

    series: Mapped[Series] = relationship(back_populates="analyses")
    objects: Mapped[list[Object]] = relationship(back_populates="analysis", order_by="Object.id")


class Object(Base):
    """A DICOM object that an analysis made."""

    __tablename__ = "objects"
    __table_args__ = (UniqueConstraint("analysis_id", "sop_instance_uid"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id"), index=True)
    kind: Mapped[str] = mapped_column(Text)
    #: `node.results.kinds.Maker.form`; empty for the usual form.
    form: Mapped[str] = mapped_column(Text, default="")
    sop_class_uid: Mapped[str] = mapped_column(Text)
    sop_instance_uid: Mapped[str] = mapped_column(Text, index=True)
    series_instance_uid: Mapped[str] = mapped_column(Text)
    #: Relative to the folder of results.
    path: Mapped[str] = mapped_column(Text)
    #: Why it must never be sent: it did not pass its check.
    stopped: Mapped[str | None] = mapped_column(Words, default=None)
    #: Row number of the analysis of a newer generation whose objects take its place.
    superseded_by: Mapped[int | None] = mapped_column(default=None)

    analysis: Mapped[AnalysisJob] = relationship(back_populates="objects")
    deliveries: Mapped[list[Delivery]] = relationship(back_populates="object", order_by="Delivery.id")


class Delivery(Work):
    """One object for one peer."""

    __tablename__ = "deliveries"
    __table_args__ = (UniqueConstraint("object_id", "peer"),)
    kind_of_work = Kind.DELIVERY

    object_id: Mapped[int] = mapped_column(ForeignKey("objects.id"), index=True)
    peer: Mapped[str] = mapped_column(Text, index=True)
    #: When a peer that is asked for its commitment took the object; None again once it said that it did not keep it.
    stored_at: Mapped[float | None] = mapped_column(default=None)
    #: Requests for the commitment, and the transaction of the last one.
    asks: Mapped[int] = mapped_column(default=0)
    transaction_uid: Mapped[str | None] = mapped_column(Text, default=None)

    object: Mapped[Object] = relationship(back_populates="deliveries")


class PeerRecord(Work):
    """A peer that something is sent to: one worker at a time sends to it, and nobody tries it while it is not due.

    `attempts` counts how often in a row the peer was not reached, `reason` says why.
    """

    __tablename__ = "peers"
    kind_of_work = Kind.PEER

    peer: Mapped[str] = mapped_column(Text, unique=True)
    unreachable_since: Mapped[float | None] = mapped_column(default=None)


class Commitment(Base):
    """A storage commitment transaction (PS3.4 J.3), recorded before its request goes out: any answer finds it."""

    __tablename__ = "commitments"

    transaction_uid: Mapped[str] = mapped_column(Text, primary_key=True)
    peer: Mapped[str] = mapped_column(Text)
    asked_at: Mapped[float]
    answered_at: Mapped[float | None] = mapped_column(default=None)


class Event(Base):
    """One thing that happened to a series, without patient data (`node.ledger.events`)."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"), index=True)
    at: Mapped[float]
    stage: Mapped[str] = mapped_column(Words)
    kind: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(EventData)

    series: Mapped[Series] = relationship(back_populates="events")

    @property
    def text(self) -> str:
        """What happened, in words."""
        return render(self.kind, self.data)
