"""Associations that this node opens with a peer, as service class user, and C-ECHO over one of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from node.identity import application_entity
from node.text import LENGTH, printable

if TYPE_CHECKING:
    from node.config import Peer

#: Verification SOP class (PS3.4 annex A).
VERIFICATION = "1.2.840.10008.1.1"

#: Seconds to wait for a peer's answer on each level. A PACS that takes longer over one object is counted as failing:
#: the object is sent again later, and its UID keeps it single.
TIMEOUT_S = 30.0

#: Seconds to wait for a connection: one that is refused or filtered must not hold up what goes to other peers.
CONNECT_S = 5.0

#: PS3.8 9.3.2 and annex D.1 leave the PDU length to us; 128 KiB is the most that DCMTK takes.
MAX_PDU = 131072

#: An association carries at most 128 presentation contexts (PS3.8 9.3.2.2: odd ids from 1 to 255).
MAX_CONTEXTS = 128


class PeerError(RuntimeError):
    """A peer did not take what was sent.

    Attributes
    ----------
    permanent
        Trying again would change nothing.
    reached
        The peer answered, so that other objects may fare better.
    """

    def __init__(self, reason: str, *, permanent: bool, reached: bool = True) -> None:
        super().__init__(reason)
        self.permanent = permanent
        self.reached = reached


class NobodyThereError(PeerError):
    """No connection could be made to a peer, so that it has not heard of anything."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, permanent=False, reached=False)


def echo(peer: Peer, calling_ae: str) -> None:
    """C-ECHO (PS3.7 9.1.5); raises `PeerError` that says what is wrong."""
    with association(peer, calling_ae, [build_context(VERIFICATION)]) as open_association:
        status = status_of(open_association.send_c_echo())
        if status != 0x0000:
            raise PeerError(f"C-ECHO answered {hexadecimal(status)}", permanent=False)


@contextmanager
def association(
    peer: Peer, calling_ae: str, contexts: list[PresentationContext], *, timeout_s: float | None = None
) -> Iterator[Association]:
    """An association on which we alone ask, released at the end.

    Parameters
    ----------
    peer, calling_ae
        Whom to call, and as whom.
    contexts
        Presentation contexts to propose, at most `MAX_CONTEXTS`.
    timeout_s
        Seconds to wait for each answer; `TIMEOUT_S` when left out.

    Raises
    ------
    PeerError
        There is no association to be had; the message says why.
    """
    with answering_association(peer, calling_ae, contexts, timeout_s=timeout_s) as made, _sends_without_race(made):
        yield made


@contextmanager
def answering_association(
    peer: Peer,
    calling_ae: str,
    contexts: list[PresentationContext],
    handlers: Sequence[tuple[Any, ...]] = (),
    *,
    timeout_s: float | None = None,
) -> Iterator[Association]:
    """An association on which `handlers` answer what the peer asks; otherwise as `association`."""
    timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
    entity = application_entity(calling_ae)
    entity.connection_timeout = min(CONNECT_S, timeout_s)
    entity.acse_timeout = entity.dimse_timeout = timeout_s
    entity.network_timeout = 2 * timeout_s
    connections: list[socket.socket] = []

    def opened(event: Any) -> None:
        # pynetdicom leaves the connection without a timeout, and a peer that stops reading would hold us for ever.
        connections.append(event.assoc.dul.socket.socket)
        connections[0].settimeout(timeout_s)

    try:
        made = entity.associate(
            peer.host,
            peer.port,
            contexts=contexts,
            ae_title=peer.ae_title,
            max_pdu=MAX_PDU,
            evt_handlers=[(evt.EVT_CONN_OPEN, opened), *handlers],
        )
    except OSError:
        raise NobodyThereError(f"the host name {peer.host} cannot be resolved") from None
    try:
        if not made.is_established:
            raise _no_association(made, peer, timeout_s, reached=bool(connections))
        yield made
    finally:
        if made.is_established:
            made.release()
        with suppress(RuntimeError):  # its thread never started
            made.dul.join(CONNECT_S)
        for connection in connections:  # pynetdicom shuts it down, and leaves the closing to chance
            connection.close()


@contextmanager
def _sends_without_race(made: Association) -> Iterator[None]:
    """Keep pynetdicom's reactor away from the responses that `send_c_store` and its like wait for.

    pynetdicom 3.0 lets its reactor thread run again between the requests; now and then it takes a response, and the
    sender waits in vain. Here the reactor is halted once, for the whole batch, through the checkpoint it stops at.
    """
    checkpoint = made._reactor_checkpoint
    halted = _Halted()
    made._reactor_checkpoint = halted
    checkpoint.set()
    while not halted.reached.wait(0.05) and made.is_alive():
        pass
    try:
        yield
    finally:
        made._reactor_checkpoint = checkpoint
        checkpoint.set()
        halted.release()


class _Halted(threading.Event):
    """An event that stays unset until `release`; `reached` says that somebody waits at it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for `release`."""
        self.reached.set()
        return super().wait(timeout)

    def set(self) -> None:
        """Do nothing: pynetdicom sets the checkpoint after each request."""

    def release(self) -> None:
        super().set()


def status_of(answer: Any) -> int | None:
    """Status of a response; pynetdicom gives an empty data set when none came."""
    status = getattr(answer, "Status", None)
    return None if status is None else int(status)


def hexadecimal(status: int | None) -> str:
    """A status as the standard writes it."""
    return "nothing" if status is None else f"0x{status:04X}"


#: Reason of a rejection → whose setting it is about (PS3.8 table 9-21, source 1).
_HINTS = {
    3: "; enter our AE title there (`listener.ae_title`)",
    7: "; is the peer's `ae_title` in our settings its own?",
}


def _no_association(made: Association, peer: Peer, timeout_s: float, *, reached: bool) -> PeerError:
    """Why there is no association, in words (PS3.8 9.3.4, table 9-21: result, source, reason)."""
    where = f"{peer.ae_title} at {peer.host}:{peer.port}"
    if not reached:
        return NobodyThereError(f"no connection to {where}")
    if made.is_rejected:
        answer = made.acceptor.primitive
        why = printable(str(getattr(answer, "reason_str", "no reason given")), LENGTH["LO"])
        # Result 1 is 'rejected permanent', 2 'rejected transient'. Most permanent rejections are an AE title that an
        # admin is about to enter: no object is given up for it, but the words say who has to act.
        for_good = getattr(answer, "result", 2) == 1
        how = "rejected the association until its settings change" if for_good else "rejected the association for now"
        # Source 1 is the service user, whose reasons 3 and 7 are the AE titles.
        hint = _HINTS.get(getattr(answer, "diagnostic", 0), "") if getattr(answer, "result_source", 0) == 1 else ""
        return PeerError(f"{where} {how}: {why}{hint}", permanent=False, reached=False)
    if made.rejected_contexts and not made.accepted_contexts:
        kinds = ", ".join(sorted({UID(str(c.abstract_syntax)).name for c in made.rejected_contexts}))
        return PeerError(f"{where} does not accept {kinds}", permanent=True)
    what = f"{where} aborted the association, or did not answer in {timeout_s:.0f} s"
    return PeerError(what, permanent=False, reached=False)
