"""Objects of an earlier generation give way to those of a later one.

Late slices make a new generation of a series. Objects of the earlier ones that were not sent yet are dropped; those
that a peer has are named in a rejection note, for a peer that hides what such a note names. Where a series has an
analysis for each of its acquisitions, each takes the place of those of the same acquisition.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from node.ledger.events import EventKind
from node.ledger.record import move, record_event
from node.ledger.tables import AnalysisJob, Delivery, Object, Series
from node.ledger.transitions import RETRIED, State

#: States of a delivery in which the peer has the object, or may have it.
_THERE = (State.DONE, State.CONFIRMED, State.RUNNING, State.STORED, State.UNCONFIRMED)

#: States of an analysis that takes nobody's place, or whose place another takes.
_NOT_THERE = (State.FAILED, State.SUPERSEDED)


def drop_waiting(session: Session, newer: Series) -> None:
    """End analyses of earlier generations that nobody has begun, where one of the newer takes their place.

    A series that will only be reported as 'not analysed' never supersedes one that will be analysed.
    """
    for analysis in _earlier(session, newer):
        heirs = any(_takes_the_place(one, analysis) for one in _heirs(newer, analysis))
        if heirs and analysis.state in (State.WAITING, State.REPORT_DUE):
            move(session, analysis, State.SUPERSEDED, reason=_before_analysis(newer))
            record_event(session, analysis, EventKind.ANALYSIS_SUPERSEDED, reason=analysis.reason)


def overtaken(session: Session, analysis: AnalysisJob) -> str | None:
    """Why an analysis that is to start again gives way: a later generation, which came meanwhile, takes its place.

    Its objects would come after those that stand in their place.
    """
    later = (Series.series_instance_uid == analysis.series.series_instance_uid,)
    query = select(Series).where(*later, Series.generation > analysis.series.generation).order_by(Series.generation)
    for newer in session.scalars(query):
        if any(_takes_the_place(one, analysis) and one.state not in _NOT_THERE for one in _heirs(newer, analysis)):
            return _before_analysis(newer)
    return None


def supersede(session: Session, newer: AnalysisJob) -> None:
    """Let the objects of an analysis take the place of those of earlier generations.

    A series that could not be analysed takes nothing from one that was. An object that is made again as it was stays.
    """
    again = {made.sop_instance_uid for one in newer.series.analyses for made in one.objects}
    for analysis in _earlier(session, newer.series):
        if newer not in _heirs(newer.series, analysis) or (
            analysis.state is State.DONE and newer.state is not State.DONE
        ):
            continue
        unsent_in_all = 0
        for made in analysis.objects:
            if made.superseded_by is not None or made.sop_instance_uid in again:
                continue
            made.superseded_by = newer.id
            for delivery in made.deliveries:
                unsent = delivery.state is State.WAITING
                if unsent or delivery.state in RETRIED:
                    move(session, delivery, State.SUPERSEDED)
                    unsent_in_all += unsent
        if analysis.objects:
            generation = newer.series.generation
            record_event(session, analysis, EventKind.OBJECTS_SUPERSEDED, generation=generation, unsent=unsent_in_all)


def outdated_at(session: Session, newer: AnalysisJob, peer: str) -> list[Object]:
    """Objects that those of `newer` replace and that a peer has or may have, in the order they were made."""
    there = Delivery.state.in_(_THERE) | Delivery.stored_at.is_not(None)
    query = select(Object).join(Object.deliveries).where(Object.superseded_by == newer.id, Delivery.peer == peer, there)
    # What was made again in several generations is one object to the peer.
    return list({made.sop_instance_uid: made for made in session.scalars(query.order_by(Object.id))}.values())


def _heirs(newer: Series, older: AnalysisJob) -> list[AnalysisJob]:
    """Analyses of a newer generation that take the place of an earlier one: all, where none is of its acquisition."""
    mine = [one for one in newer.analyses if one.route == older.route]
    return [one for one in mine if _is_heir(one, older)] or mine


def _before_analysis(newer: Series) -> str:
    return f"superseded by generation {newer.generation}, before it was analysed"


def _takes_the_place(newer: AnalysisJob, older: AnalysisJob) -> bool:
    """Whether an heir is analysed, or is only reported as the older one is."""
    return newer.not_analysed is None or older.not_analysed is not None


def _is_heir(newer: AnalysisJob, older: AnalysisJob) -> bool:
    """Whether both are of one acquisition: by its name, as another reconstruction of it may have been analysed."""
    mine, its = (set(one.instances or one.series.instances) for one in (newer, older))
    return newer.acquisition == older.acquisition or not mine.isdisjoint(its)


def _earlier(session: Session, newer: Series) -> list[AnalysisJob]:
    """Analyses of the earlier generations of a series."""
    earlier = (Series.series_instance_uid == newer.series_instance_uid, Series.generation < newer.generation)
    return list(session.scalars(select(AnalysisJob).join(AnalysisJob.series).where(*earlier).order_by(AnalysisJob.id)))
