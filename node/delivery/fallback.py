"""What a peer gets in place of an object that it refuses: the colour capture, which every viewer shows."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.orm import Session

from node.config import Peer
from node.ledger.store import Delivery, Ledger
from node.results.forms import FALLBACK, STOPPED, Profile


def owe(ledger: Ledger, session: Session, refused: Delivery, peer: Peer) -> None:
    """Owe the peer the capture of the same analysis, unless that is what it refused, or it gets one already."""
    analysis = refused.object.analysis
    captures = [one for one in analysis.objects if one.kind == FALLBACK and not one.path.endswith(STOPPED)]
    getting = {delivery.peer for one in captures for delivery in one.deliveries}
    if refused.object.kind == FALLBACK or refused.peer in getting or not captures:
        return
    form = Profile(capture=peer.capture).capture_form()
    # In the peer's own form where that was made: the settings may have changed since.
    name = f"{FALLBACK}-{form}" if form else FALLBACK
    chosen = next((one for one in captures if Path(one.path).stem == name), captures[0])
    chosen.deliveries.append(Delivery(peer=refused.peer))
    ledger.tell_of(session, refused, f"{refused.peer} gets the {FALLBACK} in its place")
