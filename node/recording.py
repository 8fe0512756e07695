"""What an analysis needs of its rows in the ledger, and what it came to, recorded in one transaction."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from node.images.headers import first_header
from node.installation import Node
from node.ledger import superseding
from node.ledger.events import EventKind
from node.ledger.leases import Lease
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob, Delivery, Object, Series
from node.ledger.transitions import State
from node.paths import valid_uid, within
from node.results.forms import FALLBACK, Profile
from node.results.provenance import Part

if TYPE_CHECKING:  # highdicom and reportlab: only the analyse worker needs them
    from node.results import makers


@dataclass(frozen=True)
class Work:
    """What an analysis needs of its rows."""

    row: int
    series_uid: str
    method: str
    paths: list[Path]
    part: Part
    note: str
    folder: Path
    #: What each peer gets, and in which form, by the peer's name.
    profiles: dict[str, Profile]
    report: bool
    not_analysed: str | None
    #: Why the analysis failed, where that is to be reported now.
    failure: str | None
    content_at: datetime


@dataclass(frozen=True)
class Made:
    """What an analysis came to."""

    state: State
    reason: str
    objects: list[makers.ResultObject]
    summary: dict[str, Any] | None = None


def gave_way(here: Node, lease: Lease) -> bool:
    """End an analysis in whose place a later generation's stands: one that was under way when that came, and failed."""
    with here.ledger.read() as session:
        reason = superseding.overtaken(session, session.get_one(AnalysisJob, lease.row))
    if reason is None:
        return False
    with lease.finish(State.SUPERSEDED, reason) as session:
        record_event(session, session.get_one(AnalysisJob, lease.row), EventKind.ANALYSIS_SUPERSEDED, reason=reason)
    return True


def begin(here: Node, row: int) -> Work:
    """What is to be done, and an event that it has begun."""
    with here.ledger() as session:
        analysis = session.get_one(AnalysisJob, row)
        series: Series = analysis.series
        local = datetime.now(UTC).astimezone()
        if analysis.content_at is None:
            analysis.content_at = local.timestamp()
        reporting = analysis.state is State.REPORTING
        kind = EventKind.REPORT_STARTED if reporting else EventKind.ANALYSIS_STARTED
        record_event(session, analysis, kind, attempt=analysis.attempts)
        return Work(
            row,
            series.series_instance_uid,
            analysis.method,
            [within(here.spool, name) for name in analysis.instances or series.instances],
            Part(analysis.acquisition, series.analyses.index(analysis)),
            analysis.note,
            within(here.results, valid_uid(series.series_instance_uid), f"{series.generation}-{analysis.id}"),
            {peer: here.settings.profile(peer, kinds) for peer, kinds in analysis.destinations.items()},
            analysis.report,
            analysis.not_analysed,
            analysis.gave_up if reporting else None,
            datetime.fromtimestamp(analysis.content_at, local.tzinfo),
        )


def record(here: Node, lease: Lease, work: Work, made: Made) -> set[str]:
    """Record what an analysis came to, in one transaction; gives the peers that get something."""
    notes: dict[_Outdated, makers.ResultObject] = {}
    while True:
        try:
            with lease.finish(made.state, made.reason) as session:
                analysis = session.get_one(AnalysisJob, work.row)
                _add_objects(here, session, analysis, work, made)
                superseding.supersede(session, analysis)
                session.flush()
                analysis.objects += rejection_notes(here, session, analysis, notes)
                return {delivery.peer for one in analysis.objects for delivery in one.deliveries}
        except _NoteLackingError as lacking:
            # Nothing is recorded yet. The file is written here, where nobody waits for the ledger meanwhile.
            notes[lacking.outdated] = _write_note(work, lacking.outdated)


def _add_objects(here: Node, session: Session, analysis: AnalysisJob, work: Work, made: Made) -> None:
    analysis.summary = made.summary
    known = {one.sop_instance_uid for one in analysis.objects}  # from before a retry by hand
    new = [one for one in made.objects if one.sop_instance_uid not in known]
    analysis.objects += [as_row(here, one, work.profiles) for one in new]
    record_event(session, analysis, EventKind.ANALYSIS_ENDED, outcome=made.reason)
    for one in new:
        if one.problems:
            record_event(session, analysis, EventKind.OBJECT_STOPPED, object=one.kind, reason=_stopped(one))
    session.flush()


def with_fallback(profiles: dict[str, Profile]) -> list[Profile]:
    """What the peers get, and the capture of each: it goes where a peer refuses the rest."""
    return [*profiles.values(), *(replace(one, kinds=(FALLBACK,)) for one in profiles.values())]


def as_row(here: Node, made: makers.ResultObject, profiles: dict[str, Profile]) -> Object:
    """The object, and its deliveries; one that did not pass its check is refused before it is sent."""
    peers = [peer for peer, profile in profiles.items() if profile in made.profiles]
    ended: dict[str, Any] = {}
    if made.problems:
        ended = {"state": State.REFUSED, "reason": _stopped(made), "finished_at": here.ledger.clock()}
    return Object(
        kind=made.kind,
        form=made.form,
        stopped=_stopped(made) if made.problems else None,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        path=str(made.path.relative_to(here.results)),
        deliveries=[Delivery(peer=peer, **ended) for peer in peers],
    )


def _stopped(made: makers.ResultObject) -> str:
    return f"stopped before sending, as its check failed: {'; '.join(made.problems)}"


#: The objects that a rejection note names, in their order.
_Outdated = tuple[tuple[str, str, str], ...]


class _NoteLackingError(Exception):
    """Peers have to be told of outdated objects, and no note that names just those is written yet."""

    def __init__(self, outdated: _Outdated) -> None:
        super().__init__(f"{len(outdated)} objects")
        self.outdated = outdated


def rejection_notes(
    here: Node, session: Session, analysis: AnalysisJob, notes: dict[_Outdated, makers.ResultObject]
) -> list[Object]:
    """Notes that name what the objects of this analysis outdate, for the peers that act on them.

    Raises
    ------
    _NoteLackingError
        One of them is not among `notes`: more may have been sent since those were written.
    """
    wanted: dict[_Outdated, list[str]] = {}  # what several peers have is named in one note, by its one UID
    for name, peer in sorted(here.settings.peers_that_may("receive").items()):
        objects = superseding.outdated_at(session, analysis, name) if peer.rejection_notes else []
        if objects:
            named = tuple((one.sop_class_uid, one.sop_instance_uid, one.series_instance_uid) for one in objects)
            wanted.setdefault(named, []).append(name)
    rows, there = [], {one.sop_instance_uid: one for one in analysis.objects}  # from before a retry by hand
    for outdated, peers in wanted.items():
        if outdated not in notes:
            raise _NoteLackingError(outdated)
        row = there.get(notes[outdated].sop_instance_uid)
        if row is None:
            row = as_row(here, notes[outdated], {})
            rows.append(row)
        told = {delivery.peer for delivery in row.deliveries}
        row.deliveries += [Delivery(peer=name) for name in peers if name not in told]
    return rows


def _write_note(work: Work, outdated: _Outdated) -> makers.ResultObject:
    from node.results import makers

    header = first_header(work.paths)
    digest = hashlib.sha256(repr(outdated).encode()).hexdigest()[:8]
    return makers.rejection_note(header, outdated, work.folder, f"rejection-note-{digest}", work.content_at, work.part)
