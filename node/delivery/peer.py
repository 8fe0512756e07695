"""Associations with a peer as service class user: C-ECHO, and C-STORE of Part 10 files as they lie on disk."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from pynetdicom import _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from node.config import Peer
from node.identity import application_entity
from node.intake.header import HeaderError
from node.intake.received import read_received
from node.text import LENGTH, printable

# Files go out from disk in fragments, never whole in memory (a 166 MB object took 145 MB instead of 547 MB).
_config.STORE_SEND_CHUNKED_DATASET = True

#: Verification SOP class (PS3.4 annex A).
VERIFICATION = "1.2.840.10008.1.1"

#: Seconds to wait for a peer's answer on each level. A PACS that takes longer over one object is counted as failing:
#: the object is sent again later, and its UID keeps it single.
TIMEOUT_S = 30.0

#: Seconds to wait for a connection: one that is refused or filtered must not hold up what goes to other peers.
CONNECT_S = 5.0

#: Bytes a second that a slow line must carry at least: the wait for the answer to an object grows by its size over
#: this, for pynetdicom counts from when it begins to send.
SLOWEST_LINE = 100_000

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


@dataclass(frozen=True)
class Outgoing:
    """A Part 10 file on its way: what negotiation needs to know of it."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    #: Whether its meta information names the instance. Some anonymisers drop that, and pynetdicom needs it to send a
    #: file straight from disk.
    meta_names_it: bool

    @classmethod
    def below(cls, folder: Path) -> list[Outgoing]:
        """All Part 10 files at or below a path, in the order of their names; what is none is left out."""
        files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        items = []
        for path in files:
            with suppress(InvalidDicomError, HeaderError, AttributeError):
                items.append(cls.read(path))
        return items

    @classmethod
    def read(cls, path: Path) -> Outgoing:
        """Read what a file says of itself.

        Raises
        ------
        InvalidDicomError, HeaderError, AttributeError
            It is not a Part 10 file, is damaged, or names no SOP class, SOP instance or transfer syntax.
        """
        header = read_received(path, ["SOPClassUID", "SOPInstanceUID"])
        meta = header.file_meta
        return cls(
            path,
            str(header.SOPClassUID),
            str(header.SOPInstanceUID),
            str(meta.TransferSyntaxUID),
            "MediaStorageSOPInstanceUID" in meta,
        )


def echo(peer: Peer, calling_ae: str) -> None:
    """C-ECHO (PS3.7 9.1.5); raises `PeerError` that says what is wrong."""
    with association(peer, calling_ae, [build_context(VERIFICATION)]) as open_association:
        status = status_of(open_association.send_c_echo())
        if status != 0x0000:
            raise PeerError(f"C-ECHO answered {hexadecimal(status)}", permanent=False)


@contextmanager
def association(peer: Peer, calling_ae: str, contexts: list[PresentationContext]) -> Iterator[Association]:
    """An association on which we alone ask, released at the end; raises `PeerError` when there is none to be had."""
    with answering_association(peer, calling_ae, contexts) as made, _sends_without_race(made):
        yield made


@contextmanager
def answering_association(
    peer: Peer, calling_ae: str, contexts: list[PresentationContext], handlers: Sequence[tuple[Any, ...]] = ()
) -> Iterator[Association]:
    """An association on which `handlers` answer what the peer asks; otherwise as `association`."""
    entity = application_entity(calling_ae)
    entity.connection_timeout = CONNECT_S
    entity.acse_timeout = entity.dimse_timeout = TIMEOUT_S
    entity.network_timeout = 2 * TIMEOUT_S
    connections: list[socket.socket] = []

    def opened(event: Any) -> None:
        # pynetdicom leaves the connection without a timeout, and a peer that stands still would hold us for ever.
        connections.append(event.assoc.dul.socket.socket)
        connections[0].settimeout(TIMEOUT_S)

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
            raise _no_association(made, peer, bool(connections))
        yield made
    finally:
        if made.is_established:
            made.release()
        with suppress(RuntimeError):  # its thread never started
            made.dul.join(CONNECT_S)
        for connection in connections:  # pynetdicom shuts it down, and leaves the closing to chance
            connection.close()


def contexts_for(objects: Iterable[Outgoing]) -> list[PresentationContext]:
    """One context for each pair of SOP class and transfer syntax, so that nothing need be converted."""
    pairs = sorted({(item.sop_class_uid, item.transfer_syntax_uid) for item in objects})
    return [build_context(UID(sop_class), UID(syntax)) for sop_class, syntax in pairs]


class ByAssociation:
    """Sends objects over one open association."""

    def __init__(self, made: Association) -> None:
        self._made = made
        self._proposed = {(c.abstract_syntax, c.transfer_syntax[0]) for c in made.requestor.requested_contexts}

    def carries(self, item: Outgoing) -> bool:
        """Whether a context was proposed for the object, so that this association can tell of its fate."""
        return (item.sop_class_uid, item.transfer_syntax_uid) in self._proposed

    def send(self, item: Outgoing) -> str:
        """`store` it."""
        return store(self._made, item)


def store(open_association: Association, item: Outgoing) -> str:
    """C-STORE one object; gives '' or the peer's warning, raises `PeerError` (status codes: PS3.4 table B.2-1)."""
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in open_association.accepted_contexts}
    if (item.sop_class_uid, item.transfer_syntax_uid) not in accepted:
        kind = UID(item.sop_class_uid).name
        syntax = UID(item.transfer_syntax_uid).name
        raise PeerError(f"the peer does not accept {kind} in {syntax}", permanent=True)
    open_association.dimse_timeout = TIMEOUT_S + item.path.stat().st_size / SLOWEST_LINE
    status = status_of(open_association.send_c_store(item.path if item.meta_names_it else dcmread(item.path)))
    if status is None:
        raise PeerError("no answer to C-STORE", permanent=False, reached=False)
    if status == 0x0000:
        return ""
    # 0x0111: duplicate SOP instance. Our UIDs are derived, so it is this very object, from a push whose bookkeeping was
    # lost.
    if status in (0x0001, 0x0107, 0x0111, 0x0116) or 0xB000 <= status <= 0xBFFF:
        return f"stored with warning {hexadecimal(status)}"
    # 0xA700: out of resources; 0x0110: processing failure; 0x0213: resource limitation. These pass. The rest names
    # something wrong with the object or with our rights, which the same object will meet again.
    passes = 0xA700 <= status <= 0xA7FF or status in (0x0110, 0x0213)
    raise PeerError(f"C-STORE answered {hexadecimal(status)}", permanent=not passes)


@contextmanager
def _sends_without_race(made: Association) -> Iterator[None]:
    """Keep pynetdicom's reactor away from the responses that `send_c_store` waits for.

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
_MENDS = {
    3: "; enter our AE title there (`listener.ae_title`)",
    7: "; is the peer's `ae_title` in our settings its own?",
}


def _no_association(made: Association, peer: Peer, reached: bool) -> PeerError:
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
        mend = _MENDS.get(getattr(answer, "diagnostic", 0), "") if getattr(answer, "result_source", 0) == 1 else ""
        return PeerError(f"{where} {how}: {why}{mend}", permanent=False, reached=False)
    if made.rejected_contexts and not made.accepted_contexts:
        kinds = ", ".join(sorted({UID(str(c.abstract_syntax)).name for c in made.rejected_contexts}))
        return PeerError(f"{where} does not accept {kinds}", permanent=True)
    what = f"{where} aborted the association, or did not answer in {TIMEOUT_S:.0f} s"
    return PeerError(what, permanent=False, reached=False)
