"""Objects of an earlier generation give way to those of a later one.

Late slices make a new generation of a series. What is still owed of the earlier ones is dropped; what a peer has of
them is named in a rejection note, for a peer that hides what such a note names. Where a series has an analysis for each
of its acquisitions, each takes the place of those of the same acquisition.
"""

from __future__ import annotations

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from node.ledger.store import Analysis, Delivery, Ledger, Object, Series

#: States of a delivery in which the peer has the object, or may have it.
_THERE = ("done", "confirmed", "running")

#: States of an analysis that takes nobody's place, or whose place another takes.
_NOT_THERE = ("failed", "superseded")


def drop_waiting(ledger: Ledger, session: Session, newer: Series) -> None:
    """End analyses of earlier generations that nobody has begun, where one of the newer takes their place.

    What is only told about takes nothing from what is to be analysed.
    """
    for analysis in _earlier(session, newer):
        heirs = any(_takes_the_place(one, analysis) for one in _heirs(newer, analysis))
        if heirs and analysis.state == "waiting":
            analysis.state, analysis.finished_at = "superseded", time.time()
            analysis.reason = _before_analysis(newer)
            ledger.tell_of(session, analysis, analysis.reason)


def overtaken(session: Session, analysis: Analysis) -> str | None:
    """Why an analysis that is to begin anew gives way: a later generation, which came meanwhile, takes its place.

    Its objects would come after those that stand in their place.
    """
    later = (Series.series_instance_uid == analysis.series.series_instance_uid,)
    query = select(Series).where(*later, Series.generation > analysis.series.generation).order_by(Series.generation)
    for newer in session.scalars(query):
        if any(_takes_the_place(one, analysis) and one.state not in _NOT_THERE for one in _heirs(newer, analysis)):
            return _before_analysis(newer)
    return None


def supersede(ledger: Ledger, session: Session, newer: Analysis) -> None:
    """Let the objects of an analysis stand in the place of those of earlier generations.

    What could not be analysed takes nothing from what was. An object that is made again as it was stays.
    """
    again = {made.sop_instance_uid for one in newer.series.analyses for made in one.objects}
    for analysis in _earlier(session, newer.series):
        if newer not in _heirs(newer.series, analysis) or (analysis.state == "done" and newer.state != "done"):
            continue
        dropped = 0
        for made in analysis.objects:
            if made.superseded_by is not None or made.sop_instance_uid in again:
                continue
            made.superseded_by = newer.id
            for delivery in made.deliveries:
                unsent = delivery.state == "waiting" and delivery.stored_at is None
                if unsent or delivery.state in ("failed", "refused"):
                    delivery.state, delivery.finished_at = "superseded", time.time()
                    dropped += unsent
        if analysis.objects:
            text = f"superseded by generation {newer.series.generation}"
            text = analysis.about(f"{text}, {dropped} not sent any more")
            ledger.tell(session, analysis.series_id, "delivery", text)


def outdated_at(session: Session, newer: Analysis, peer: str) -> list[Object]:
    """Objects in whose place those of `newer` stand, that a peer has or may have, in the order they were made."""
    there = Delivery.state.in_(_THERE) | Delivery.stored_at.is_not(None)
    query = select(Object).join(Object.deliveries).where(Object.superseded_by == newer.id, Delivery.peer == peer, there)
    # What was made again in several generations is one object to the peer.
    return list({made.sop_instance_uid: made for made in session.scalars(query.order_by(Object.id))}.values())


def _heirs(newer: Series, older: Analysis) -> list[Analysis]:
    """Analyses of a newer generation that take the place of an earlier one: all, where none is of its acquisition."""
    mine = [one for one in newer.analyses if one.route == older.route]
    return [one for one in mine if _is_heir(one, older)] or mine


def _before_analysis(newer: Series) -> str:
    return f"superseded by generation {newer.generation}, before it was analysed"


def _takes_the_place(newer: Analysis, older: Analysis) -> bool:
    """Whether an heir is analysed, or is no more than told about as the older one is."""
    return newer.not_analysed is None or older.not_analysed is not None


def _is_heir(newer: Analysis, older: Analysis) -> bool:
    """Whether both are of one acquisition: by its name, as another reconstruction of it may have been analysed."""
    mine, its = (set(one.instances or one.series.instances) for one in (newer, older))
    return newer.acquisition == older.acquisition or not mine.isdisjoint(its)


def _earlier(session: Session, newer: Series) -> list[Analysis]:
    """Analyses of the earlier generations of a series."""
    earlier = (Series.series_instance_uid == newer.series_instance_uid, Series.generation < newer.generation)
    return list(session.scalars(select(Analysis).join(Analysis.series).where(*earlier).order_by(Analysis.id)))
