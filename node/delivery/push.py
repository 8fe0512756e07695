"""Pushing Part 10 files to a peer by C-STORE, all that go together on one association."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from node.config import Peer
from node.delivery.peer import Outgoing, contexts_for, store
from node.network.associations import MAX_CONTEXTS, PeerError, association

#: Called after each object: the object and None, or why the peer did not take it.
Sent = Callable[[Outgoing, PeerError | None], None]


def push(path: Path, peer: Peer, calling_ae: str) -> str:
    """Send one file; gives '' or the peer's warning, raises `PeerError`."""
    item = Outgoing.read(path)
    with association(peer, calling_ae, contexts_for([item])) as made:
        return store(made, item)


def push_all(items: Sequence[Outgoing], peer: Peer, calling_ae: str, sent: Sent) -> None:
    """Send many files, in their order; an object that the peer does not take does not stop the rest.

    Raises
    ------
    PeerError
        When an association cannot be made or is lost; objects already reported to `sent` were answered.
    """
    for group in _associations(items):
        with association(peer, calling_ae, contexts_for(group)) as made:
            for item in group:
                try:
                    store(made, item)
                except PeerError as error:
                    if not error.reached:
                        raise
                    sent(item, error)
                else:
                    sent(item, None)


def _associations(items: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Runs of objects whose presentation contexts fit one association."""
    group: list[Outgoing] = []
    pairs: set[tuple[str, str]] = set()
    for item in items:
        pair = (item.sop_class_uid, item.transfer_syntax_uid)
        if len(pairs | {pair}) > MAX_CONTEXTS:
            yield group
            group, pairs = [], set()
        group.append(item)
        pairs.add(pair)
    if group:
        yield group
