"""Which associations are let in: by AE title and address, by how many are open, and by the room on disk."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from node.intake.assembly import AssociationId
from node.intake.part import SpoolFullError
from node.intake.spool import Spool
from node.intake.transport import DIRECT, Transport
from node.intake.transport.service import Answer, AssociationRequest
from node.network.addresses import PeerAddresses, Standing
from node.telemetry.quota import LogQuota

#: A-ASSOCIATE-RJ (PS3.8 table 9-21) as (result, source, reason).
_CALLED_AE_UNKNOWN: Final = (1, 1, 7)
_CALLING_AE_UNKNOWN: Final = (1, 1, 3)
#: Transient: no reason given, temporary congestion, local limit exceeded.
_LATER: Final = (2, 1, 1)
_CONGESTED: Final = (2, 3, 1)
_LIMIT_EXCEEDED: Final = (2, 3, 2)

#: Share of the disk floor below which not even associations are taken: each would only end in refusals.
NO_ASSOCIATION_BELOW: Final = 0.5

#: Share of max_associations, in quarters, that one calling AE title may hold, so that no peer can starve the others.
#: Where addresses of peers are known, all callers together that are no peer at one of its own may hold as much.
ONE_PEER: Final = 3

#: Callers, by AE title and address, of whom it is remembered that they were let in with a warning.
_WARNED: Final = 1000


@dataclass(frozen=True)
class ListenerOptions:
    """Who we are on the network, and whom we let in."""

    ae_title: str
    port: int
    host: str = "0.0.0.0"
    #: Calling AE titles that are let in; None lets in every one.
    known_peers: frozenset[str] | None = None
    max_associations: int = 32
    #: Seconds without a byte, or for one PDU, after which a peer is taken to be gone.
    network_timeout_s: float = 60.0
    transport: Transport = DIRECT
    #: From where which AE title may be used; None binds no AE title to addresses.
    addresses: PeerAddresses | None = None


@dataclass(eq=False)
class OpenAssociation:
    """An association that is open."""

    id: AssociationId
    #: Whether it is a known peer at one of its own addresses.
    own: bool
    #: When its last instance began to come, or it began itself (monotonic seconds).
    busy_at: float


class Admission:
    """The rules; their answers are an A-ASSOCIATE-RJ, or None where an association may be made.

    Each refusal is logged, with what to do about it.
    """

    def __init__(self, options: ListenerOptions, spool: Spool, quota: LogQuota) -> None:
        self._options = options
        self._spool = spool
        self._quota = quota
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def of_caller(self, request: AssociationRequest) -> Answer | None:
        """Whether a caller is let in at all, by its AE title and address."""
        return self._rejected(request, self._stranger(request))

    def of_number(self, request: AssociationRequest, known: Collection[OpenAssociation]) -> Answer | None:
        """Whether another association of a caller may be open beside those that are `known`."""
        return self._rejected(request, self._crowded(request, known))

    def of_disk(self, request: AssociationRequest) -> Answer | None:
        """Whether there is so little room on disk that an association would only end in refusals."""
        return self._rejected(request, self._full())

    def standing(self, request: AssociationRequest) -> Standing:
        """What its address says of a caller."""
        addresses = self._options.addresses
        if addresses is None:
            return "unknown"
        return addresses.check(request.calling_ae, request.address, request.own_address)[0]

    def _rejected(self, request: AssociationRequest, refusal: _Refusal | None) -> Answer | None:
        if refusal is None:
            return None
        self._quota.warning(
            "association rejected",
            request.address,
            calling_ae=_printable(request.calling_ae),
            reason=refusal.reason,
            hint=refusal.hint,
        )
        return refusal.answer

    def _stranger(self, request: AssociationRequest) -> _Refusal | None:
        """Why a caller is not let in, by what it says of itself and where it calls from."""
        options, calling_ae, address = self._options, request.calling_ae, request.address
        if request.called_ae != options.ae_title.strip():
            hint = f"enter the AE title {options.ae_title} at the sender"
            return _Refusal(_CALLED_AE_UNKNOWN, f"it called {_printable(request.called_ae)}", hint)
        if not calling_ae or calling_ae != _printable(calling_ae):
            return _Refusal(_CALLING_AE_UNKNOWN, "its calling AE title is none (PS3.5 6.2)", "correct it at the sender")
        if options.known_peers is not None and calling_ae not in options.known_peers:
            hint = "add it to 'peers' with 'send' among what it may, or set listener.accept to any"
            return _Refusal(_CALLING_AE_UNKNOWN, "its calling AE title is no peer that may send", hint)
        if options.addresses is None:
            return None
        standing, peer = options.addresses.check(calling_ae, address, request.own_address)
        key = f"peers.{peer}.addresses"
        if standing == "elsewhere":
            hint = f"if this is {peer}, add {address} to {key}; if it is not, somebody uses the AE title of {peer}"
            return _Refusal(_CALLING_AE_UNKNOWN, f"{address} is no address of peer {peer}", hint)
        if standing == "unresolved":
            hint = f"check name resolution on this machine, or enter {address} in {key}; it will try again"
            return _Refusal(_LATER, f"the host name of peer {peer} could not be looked up yet", hint)
        if standing == "warned":
            self._warn(calling_ae, address, peer, key)
        return None

    def _warn(self, calling_ae: str, address: str, peer: str, key: str) -> None:
        with self._lock:
            if (calling_ae, address) in self._warned:
                return
            if len(self._warned) >= _WARNED:
                self._warned.clear()  # rather twice than never: whoever has many addresses must not hide the next one
            self._warned.add((calling_ae, address))
        self._quota.warning(
            "peer calls from an address that is not its own",
            address,
            calling_ae=calling_ae,
            peer=peer,
            hint=f"if this is {peer}, add {address} to {key}, for a later version refuses it; if it is not, set "
            "listener.addresses to enforce now",
        )

    def _crowded(self, request: AssociationRequest, known: Collection[OpenAssociation]) -> _Refusal | None:
        """Why there is no room for another association."""
        options = self._options
        if len(known) >= options.max_associations:
            hint = "raise listener.max_associations, or let the sender open fewer; it will try again"
            return _Refusal(_LIMIT_EXCEEDED, f"{options.max_associations} associations are open", hint)
        most, own = options.max_associations * ONE_PEER // 4, self.standing(request) == "own"
        # A caller that only uses a peer's AE title does not count as that peer.
        mine = sum(one.id.calling_ae == request.calling_ae and one.own == own for one in known)
        if options.max_associations >= 4 and mine >= most:
            hint = "let this sender open fewer, or raise listener.max_associations; it will try again"
            return _Refusal(_LIMIT_EXCEEDED, f"{mine} associations are open with this peer", hint)
        strangers = sum(not one.own for one in known)
        if options.max_associations >= 4 and options.addresses and not own and strangers >= most:
            hint = "enter the senders in 'peers' with their addresses, or raise listener.max_associations"
            return _Refusal(_LIMIT_EXCEEDED, f"{strangers} associations are open with callers that are no peers", hint)
        return None

    def _full(self) -> _Refusal | None:
        """Whether there is so little room on disk that an association would only end in refusals."""
        try:
            self._spool.require_room(NO_ASSOCIATION_BELOW)
        except SpoolFullError:
            hint = "free space, or lower listener.disk_floor_mb; the sender will try again"
            return _Refusal(_CONGESTED, "free disk space is far below the floor", hint)
        return None


@dataclass(frozen=True)
class _Refusal:
    """Why an association is rejected, and what to do about it."""

    answer: Answer
    reason: str
    hint: str


def _printable(ae_title: str) -> str:
    """An AE title as it may stand in a log (PS3.5 6.2: no control characters, no backslash)."""
    return "".join(one if " " <= one <= "~" and one != "\\" else "?" for one in ae_title)
