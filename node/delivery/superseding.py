"""Objects of an earlier generation give way to those of a later one.

Late slices make a new generation of a series. What is still owed of the earlier ones is dropped; what a peer has of
them is named in a rejection note, for a peer that hides what such a note names.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from node.ledger import Analysis, Delivery, Ledger, Object, Series

#: States of a delivery in which the peer has the object, or may have it.
_THERE = ("done", "confirmed", "running")


def drop_waiting(ledger: Ledger, session: Session, newer: Series) -> None:
    """End analyses of earlier generations that nobody has begun: the newer one is to be analysed."""
    for analysis in _earlier(session, newer):
        if analysis.state == "waiting":
            analysis.state, analysis.finished_at = "superseded", time.time()
            analysis.reason = f"superseded by generation {newer.generation}, before it was analysed"
            ledger.tell(session, analysis.series_id, "analysis", analysis.reason)


def supersede(ledger: Ledger, session: Session, newer: Analysis, sop_instance_uids: Collection[str]) -> None:
    """Let the objects of an analysis, `sop_instance_uids`, stand in the place of those of earlier generations.

    A generation that could not be analysed takes nothing from one that was.
    """
    for analysis in _earlier(session, newer.series):
        if analysis.route != newer.route or (analysis.state == "done" and newer.state != "done"):
            continue
        dropped = 0
        for made in analysis.objects:
            if made.superseded_by is not None or made.sop_instance_uid in sop_instance_uids:
                continue
            made.superseded_by = newer.id
            for delivery in made.deliveries:
                unsent = delivery.state == "waiting" and delivery.stored_at is None
                if unsent or delivery.state in ("failed", "refused"):
                    delivery.state, delivery.finished_at = "superseded", time.time()
                    dropped += unsent
        if analysis.objects:
            text = f"superseded by generation {newer.series.generation}"
            ledger.tell(session, analysis.series_id, "delivery", f"{text}, {dropped} not sent any more")


def outdated_at(session: Session, newer: Analysis, peer: str) -> list[Object]:
    """Objects in whose place those of `newer` stand, that a peer has or may have, in the order they were made."""
    there = Delivery.state.in_(_THERE) | Delivery.stored_at.is_not(None)
    query = select(Object).join(Object.deliveries).where(Object.superseded_by == newer.id, Delivery.peer == peer, there)
    return list(session.scalars(query.order_by(Object.id)))


def _earlier(session: Session, newer: Series) -> list[Analysis]:
    """Analyses of the earlier generations of a series."""
    earlier = (Series.series_instance_uid == newer.series_instance_uid, Series.generation < newer.generation)
    return list(session.scalars(select(Analysis).join(Analysis.series).where(*earlier).order_by(Analysis.id)))
