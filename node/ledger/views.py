"""What people see of the ledger, as plain data: where each series stands, what is due, and what can be done about it.

The command line, and whatever else shows the ledger, reads these and renders them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import selectinload

from node.ledger.events import EventKind
from node.ledger.ledger import Ledger
from node.ledger.tables import SET_ASIDE, AnalysisJob, Delivery, Event, Object, PeerRecord, Series
from node.ledger.transitions import PUT_BACK, TAKEN, State

#: Series that one look at the ledger reads.
PAGE: Final = 200

_WHOLE = select(Series).options(
    selectinload(Series.events),
    selectinload(Series.analyses).selectinload(AnalysisJob.objects).selectinload(Object.deliveries),
)


@dataclass(frozen=True)
class EventView:
    """One thing that happened; `text` is `events.render` of kind and data."""

    id: int
    at: float
    stage: str
    kind: str
    data: dict[str, Any]
    text: str


class _OfAcquisition:
    """What belongs to one of a series' acquisitions, where it has several."""

    acquisition: str

    def about(self, text: str) -> str:
        """`text`, and before it which of the series' acquisitions it is about."""
        return f"{self.acquisition}: {text}" if self.acquisition else text


@dataclass(frozen=True)
class DeliveryView(_OfAcquisition):
    """One object for one peer."""

    peer: str
    #: Kind of the object.
    kind: str
    #: Which of the series' acquisitions it is about; empty where it has one.
    acquisition: str
    state: State
    attempts: int
    reason: str
    due_at: float
    asks: int
    #: Whether it is under a lease that ran out.
    worker_lost: bool

    @property
    def waits(self) -> bool:
        """Whether it was tried, or its peer was, and waits for the next attempt."""
        return self.state is State.WAITING and bool(self.reason)


@dataclass(frozen=True)
class ObjectView:
    """A DICOM object that an analysis made."""

    kind: str
    form: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    path: str
    #: Why it must never be sent.
    stopped: str | None
    #: Row number of the analysis whose objects replace it.
    superseded_by: int | None
    deliveries: tuple[DeliveryView, ...]


@dataclass(frozen=True)
class AnalysisView(_OfAcquisition):
    """One analysis of a series, or of an acquisition in it."""

    id: int
    route: str
    method: str
    acquisition: str
    urgent: bool
    note: str
    not_analysed: str | None
    #: Paths of its instances, relative to the spool, where they are not all of the series.
    instances: tuple[str, ...] | None
    state: State
    attempts: int
    reason: str
    due_at: float
    summary: dict[str, Any] | None
    objects: tuple[ObjectView, ...]
    worker_lost: bool


@dataclass(frozen=True)
class SeriesView:
    """One generation of a received series."""

    id: int
    series_instance_uid: str
    study_instance_uid: str
    generation: int
    calling_ae: str
    instances: tuple[str, ...]
    complete: bool
    closed_because: str
    verdict: str
    closed_at: float
    #: Where it stands, in a word or two (docs/operation.md has them all).
    state: str
    events: tuple[EventView, ...]
    analyses: tuple[AnalysisView, ...]

    @property
    def deliveries(self) -> tuple[DeliveryView, ...]:
        """All that is or was to be sent to peers."""
        return tuple(one for analysis in self.analyses for made in analysis.objects for one in made.deliveries)

    @property
    def headline(self) -> str:
        """The most telling line: what is not delivered, else what came of the analyses, else what was decided."""
        for one in self.deliveries:
            if one.waits or one.state in (State.FAILED, State.UNCONFIRMED, State.REFUSED):
                return one.about(one.reason)
        said = [analysis.about(analysis.reason) for analysis in self.analyses if analysis.reason]
        return "; ".join(said) or self.verdict

    @property
    def to_do(self) -> list[str]:
        """What an admin can do about a series that is in trouble; nothing for one that is not."""
        return _to_do(self)


@dataclass(frozen=True)
class UnreachablePeer:
    """A peer that does not answer."""

    name: str
    since: float
    reason: str
    #: Objects that wait for it.
    waiting: int
    next_try_at: float


@dataclass(frozen=True)
class Page:
    """Some of the series, newest first, and how many there are."""

    series: tuple[SeriesView, ...]
    number: int
    total: int
    #: Whether a further page has older series.
    more: bool

    @property
    def note(self) -> str:
        """That these are not all, and how to see the rest; empty where they are."""
        if len(self.series) == self.total:
            return ""
        more = f"; --page {self.number + 1} shows more" if self.more else ""
        return f"{len(self.series)} of {self.total} series shown{more}"


def page(ledger: Ledger, number: int = 1, limit: int = PAGE) -> Page:
    """A page of `limit` series, the newest on page 1."""
    first = (number - 1) * limit
    with ledger.read() as session:
        total = session.scalar(select(func.count(Series.id))) or 0
        rows = session.scalars(_WHOLE.order_by(Series.id.desc()).limit(limit).offset(first))
        some = tuple(view(one, ledger.clock()) for one in rows)
    return Page(some, number, total, first + len(some) < total)


def every_series(ledger: Ledger) -> Iterator[SeriesView]:
    """All series, newest first, read `PAGE` at a time."""
    query, found = _WHOLE.order_by(Series.id.desc()).limit(PAGE), list[SeriesView]()
    while True:
        with ledger.read() as session:
            rows = session.scalars(query.where(Series.id < found[-1].id) if found else query)
            found = [view(one, ledger.clock()) for one in rows]
        if not found:
            return
        yield from found


def all_series(ledger: Ledger) -> list[SeriesView]:
    """All series, newest first."""
    return list(every_series(ledger))


def find(ledger: Ledger, name: str) -> SeriesView | None:
    """The newest series whose row number or series instance UID is `name`."""
    named = Series.id == int(name) if name.isdigit() else Series.series_instance_uid == name
    with ledger.read() as session:
        found = session.scalars(_WHOLE.where(named).order_by(Series.id.desc()).limit(1)).first()
        return view(found, ledger.clock()) if found else None


def unreachable_peers(ledger: Ledger) -> list[UnreachablePeer]:
    """Peers that do not answer, by name."""
    waits = (Delivery.peer == PeerRecord.peer, Delivery.state == State.WAITING)
    count = select(func.count(Delivery.id)).where(*waits).scalar_subquery()
    silent = PeerRecord.state.in_((State.UNREACHABLE, State.PROBING))
    with ledger.read() as session:
        return [
            UnreachablePeer(one.peer, one.unreachable_since or 0.0, one.reason, waiting, one.due_at)
            for one, waiting in session.execute(select(PeerRecord, count).where(silent).order_by(PeerRecord.peer))
        ]


def view(series: Series, at: float) -> SeriesView:
    """The read model of a series whose rows are loaded, as of a time."""
    return SeriesView(
        id=series.id,
        series_instance_uid=series.series_instance_uid,
        study_instance_uid=series.study_instance_uid,
        generation=series.generation,
        calling_ae=series.calling_ae,
        instances=tuple(series.instances or ()),
        complete=series.complete,
        closed_because=series.closed_because,
        verdict=series.verdict,
        closed_at=series.closed_at,
        state=_state(series),
        events=tuple(_event(one) for one in series.events),
        analyses=tuple(_analysis(one, at) for one in series.analyses),
    )


def as_json(series: SeriesView) -> dict[str, Any]:
    """A series with all that belongs to it as plain data, for `json.dumps`."""
    return {
        "id": series.id,
        "series_instance_uid": series.series_instance_uid,
        "study_instance_uid": series.study_instance_uid,
        "generation": series.generation,
        "calling_ae": series.calling_ae,
        "instances": len(series.instances),
        "complete": series.complete,
        "closed_because": series.closed_because,
        "verdict": series.verdict,
        "closed_at": series.closed_at,
        "state": series.state,
        "to_do": series.to_do,
        "events": [asdict(event) for event in series.events],
        "analyses": [
            {
                "route": analysis.route,
                "method": analysis.method,
                "acquisition": analysis.acquisition,
                "state": analysis.state,
                "attempts": analysis.attempts,
                "reason": analysis.reason,
                "summary": analysis.summary,
                "objects": [
                    {
                        "kind": made.kind,
                        "form": made.form,
                        "sop_instance_uid": made.sop_instance_uid,
                        "stopped": made.stopped,
                        "deliveries": {d.peer: {"state": d.state, "reason": d.reason} for d in made.deliveries},
                    }
                    for made in analysis.objects
                ],
            }
            for analysis in series.analyses
        ],
    }


def _event(event: Event) -> EventView:
    return EventView(event.id, event.at, event.stage, event.kind, event.data, event.text)


def _analysis(analysis: AnalysisJob, at: float) -> AnalysisView:
    return AnalysisView(
        id=analysis.id,
        route=analysis.route,
        method=analysis.method,
        acquisition=analysis.acquisition or "",
        urgent=analysis.urgent,
        note=analysis.note,
        not_analysed=analysis.not_analysed,
        instances=tuple(analysis.instances) if analysis.instances else None,
        state=State(analysis.state),
        attempts=analysis.attempts or 0,
        reason=analysis.reason or "",
        due_at=analysis.due_at,
        summary=analysis.summary,
        objects=tuple(_object(made, analysis, at) for made in analysis.objects),
        worker_lost=analysis.state in PUT_BACK and (analysis.lease_until or 0.0) < at,
    )


def _object(made: Object, analysis: AnalysisJob, at: float) -> ObjectView:
    return ObjectView(
        kind=made.kind,
        form=made.form,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        path=made.path,
        stopped=made.stopped,
        superseded_by=made.superseded_by,
        deliveries=tuple(
            DeliveryView(
                peer=one.peer,
                kind=made.kind,
                acquisition=analysis.acquisition or "",
                state=State(one.state),
                attempts=one.attempts or 0,
                reason=one.reason or "",
                due_at=one.due_at,
                asks=one.asks or 0,
                worker_lost=one.state in PUT_BACK and (one.lease_until or 0.0) < at,
            )
            for one in made.deliveries
        ),
    )


def _state(series: Series) -> str:
    """Where a series stands: what went wrong first, then what is under way, then how it ended."""
    if not series.analyses:
        return "failed" if series.verdict.startswith(SET_ASIDE) else "kept"
    states = {analysis.state for analysis in series.analyses}
    made = [one for analysis in series.analyses for one in analysis.objects]
    sent = {delivery.state for one in made for delivery in one.deliveries}
    outdated = bool(made) and all(one.superseded_by is not None for one in made)
    if State.FAILED in states and not outdated:
        return "failed"
    if states & set(PUT_BACK):
        return "running"
    if states & set(TAKEN):
        return "waiting"
    if sent & {State.WAITING, State.RUNNING}:
        return "delivering"
    if outdated:
        return "superseded"
    if sent & {State.FAILED, State.UNCONFIRMED}:
        return "failed"
    for state in (State.REFUSED, State.STORED):
        if state in sent:
            return state.value
    if states == {State.SUPERSEDED} or sent == {State.SUPERSEDED}:
        return "superseded"
    if states <= {State.REFUSED, State.SUPERSEDED}:
        return "not analysed"
    return "confirmed" if sent and sent <= {State.CONFIRMED, State.SUPERSEDED} else "delivered"


def _to_do(series: SeriesView) -> list[str]:
    if series.state == "superseded":
        return []
    lines, sent = list[str](), series.deliveries
    for peer in sorted({one.peer for one in sent if one.waits}):
        lines.append(
            f"nothing is lost, and what waits goes out by itself once {peer} takes it; "
            f"`lungnode echo {peer}` asks it now, `lungnode retry {series.id}` sends now"
        )
    for peer in sorted({one.peer for one in sent if one.state is State.STORED and one.asks > 1}):
        lines.append(
            f"{peer} has it and is yet to confirm that it keeps it: is storage commitment enabled there, and can it "
            "reach our AE title and port?"
        )
    for peer in sorted({one.peer for one in sent if one.state in (State.REFUSED, State.FAILED, State.UNCONFIRMED)}):
        mine = [one for one in sent if one.peer == peer]
        if kinds := ", ".join(one.kind for one in mine if one.state in (State.REFUSED, State.FAILED)):
            lines.append(
                f"{peer} does not have {kinds}: correct what the reason says there, then `lungnode retry {series.id}`; "
                f"or leave out what it cannot store (peers.{peer}.takes in the settings)"
            )
        if kinds := ", ".join(one.kind for one in mine if one.state is State.UNCONFIRMED):
            lines.append(
                f"{peer} took {kinds} and did not confirm to keep it: correct what the reason says, restart lungnode "
                f"after a change of its settings, then `lungnode retry {series.id}` sends it and asks again"
            )
    for analysis in series.analyses:
        if analysis.state is State.FAILED:
            lines.append(f"correct what the reason says, then `lungnode retry {series.id}` analyses it again")
        elif analysis.state in TAKEN and analysis.attempts:
            lines.append(f"it is tried again by itself; `lungnode retry {series.id}` tries now")
    if any(event.kind == EventKind.CONFLICT for event in series.events):
        lines.append(
            f"another peer sent other content under the UIDs of this series, and only what {series.calling_ae} sent is "
            "used: see which of them is right; to take the other's, stop lungnode, remove "
            f"spool/{series.study_instance_uid}/{series.series_instance_uid} and send the series from there"
        )
    if not series.complete and not series.verdict.startswith(SET_ASIDE):
        lines.append("send the series again: what is missing makes it whole, what is here is not stored twice")
    return lines
