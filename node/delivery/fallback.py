"""What a peer gets in place of an object that it refuses: the colour capture, which every viewer shows."""

from __future__ import annotations

from sqlalchemy.orm import Session

from node.config import Peer
from node.ledger.events import EventKind
from node.ledger.record import record_event
from node.ledger.tables import Delivery
from node.results.forms import FALLBACK, Profile


def add(session: Session, refused: Delivery, peer: Peer) -> None:
    """Add a delivery of the same analysis' capture, unless the peer refused just that, or gets one already."""
    analysis = refused.object.analysis
    captures = [one for one in analysis.objects if one.kind == FALLBACK and one.stopped is None]
    getting = {delivery.peer for one in captures for delivery in one.deliveries}
    if refused.object.kind == FALLBACK or refused.peer in getting or not captures:
        return
    form = Profile(capture=peer.capture).capture_form()
    # In the peer's own form where that was made: the settings may have changed since.
    chosen = next((one for one in captures if one.form == form), captures[0])
    chosen.deliveries.append(Delivery(peer=refused.peer))
    record_event(session, refused, EventKind.CAPTURE_ADDED, peer=refused.peer, object=FALLBACK)
