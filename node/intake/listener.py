"""The Storage SCP: associations in, instances to the spool, headers to the assembly.

C-ECHO and C-STORE over pynetdicom, with every storage SOP class, also private ones: a study that is sent here may hold
objects that nobody analyses, and a sender whose private object is refused calls the whole study failed.
"""

from __future__ import annotations

import errno
import functools
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import evt, sop_class
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import AllStoragePresentationContexts, PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from pynetdicom.transport import AssociationServer

from node.identity import application_entity
from node.images.elements import HeaderError
from node.intake.assembly import Assembly, AssociationId, Ending
from node.intake.header import InstanceHeader, read_header
from node.intake.part import Part, SpoolFullError
from node.intake.spool import Spool
from node.intake.transport import (
    DIRECT,
    MAXIMUM_PDU,
    STOCK,
    Answer,
    AssociationRequest,
    StoreRequest,
    Transport,
    amid_instance,
    serve,
)
from node.network.addresses import PeerAddresses, Standing, group, shown
from node.paths import InvalidUIDError
from node.telemetry.logs import plainly
from node.telemetry.quota import LogQuota
from node.text import ae_title

log = structlog.stdlib.get_logger(__name__)

# C-STORE statuses (PS3.4 table B.2-1; PS3.7 9.1.1.1.9 and annex C).
SUCCESS: Final = 0x0000
#: Warning, Coercion of Data Elements: what is stored has other values than what was sent. Answered to an instance that
#: is here already with other content. The first is kept, so that results which refer to it stay true; a success would
#: claim that the bytes just sent are safe, and a failure would be tried again for ever by archives that correct
#: patient data and send the study anew.
COERCED: Final = 0xB000
#: Failure, Refused: Out of Resources. Senders try again later.
OUT_OF_RESOURCES: Final = 0xA700
#: Failure, Error: Data Set Does Not Match SOP Class; here also for an instance UID unlike that of the request.
MISMATCH: Final = 0xA900
#: Failure, Error: Cannot Understand.
CANNOT_UNDERSTAND: Final = 0xC000
#: Failure, Processing Failure (PS3.7 C.5.6): a fault of ours. The sender keeps its copy.
PROCESSING_FAILURE: Final = 0x0110

#: A-ASSOCIATE-RJ (PS3.8 table 9-21) as (result, source, reason).
_CALLED_AE_UNKNOWN: Final = (1, 1, 7)
_CALLING_AE_UNKNOWN: Final = (1, 1, 3)
#: Transient: no reason given, temporary congestion, local limit exceeded.
_LATER: Final = (2, 1, 1)
_CONGESTED: Final = (2, 3, 1)
_LIMIT_EXCEEDED: Final = (2, 3, 2)

#: Share of the disk floor below which not even associations are taken: each would only end in refusals.
NO_ASSOCIATION_BELOW: Final = 0.5

#: Quarters of all associations that one calling AE title may have: one peer must not shut out the others. So may, all
#: together, those who are no known peer at one of its own addresses, where there are peers whose addresses are known.
ONE_PEER: Final = 3

#: Seconds without an instance after which an association is idle. Some senders keep one open by C-ECHO, which is theirs
#: to do; without it `ListenerOptions.network_timeout_s` ends the association.
IDLE_S: Final = 60.0

#: Idle associations that one address may have; of more the ones that are idle longest are ended. A sender keeps one.
KEPT_IDLE: Final = 4

#: Callers, by AE title and address, of whom it is remembered that they were let in with a warning.
_WARNED: Final = 1000

#: Bytes of an instance that are held in memory: they hold its header, and tell which series lacks it when it cannot be
#: stored.
_HEAD: Final = 64 * 1024

#: Seconds for a peer that has connected to ask for an association (the ARTIM timer, PS3.8 9.1.5): bounds port probes.
ACSE_TIMEOUT_S = 30.0

#: Seconds between two looks at what can be closed.
TICK_S = 0.25

#: Ticks between two signs of life in the spool.
ALIVE_EVERY = 20

#: Seconds that `stop` waits for associations to come to their end.
STOP_S = 10.0

#: Presentation contexts are answered with the first of these that is proposed (PS3.8 9.3.3.2): whole pixels that any
#: reader can read, then lossless, then lossy, for a sender that offers a choice may compress for us. Last, what can
#: only be kept.
TRANSFER_SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless SV1
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.202",  # High-Throughput JPEG 2000 RPCL Lossless
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.8.1",  # Deflated Image Frame
    "1.2.840.10008.1.2.4.92",  # JPEG 2000 part 2 Lossless
    "1.2.840.10008.1.2.4.110",  # JPEG XL Lossless
    "1.2.840.10008.1.2.4.111",  # JPEG XL JPEG Recompression
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.4.93",  # JPEG 2000 part 2
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    *(f"1.2.840.10008.1.2.4.{n}" for n in (*range(52, 57), *range(58, 67))),  # JPEG processes retired in 2001
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(100, 109)),  # MPEG2, MPEG-4, HEVC
    *(f"1.2.840.10008.1.2.4.{n}.1" for n in range(100, 107)),  # the same, fragmentable
)

#: Service class that private and unknown SOP classes are served as (PS3.4 B.1, Storage Service Class).
_STORAGE_SERVICE = "1.2.840.10008.4.2"


#: pynetdicom's Event, whose attributes it types as everything that any event may carry.
_Event = Any


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
class _Open:
    """An association that is open."""

    id: AssociationId
    #: Whether it is a known peer at one of its own addresses.
    own: bool
    #: When its last instance began to come, or it began itself (monotonic seconds).
    busy_at: float


@dataclass(frozen=True)
class _Refusal:
    """Why an association is rejected, and what to do about it."""

    answer: Answer
    reason: str
    mend: str


class Listener:
    """A running Storage SCP, between `start` and `stop`.

    Parameters
    ----------
    options
        AE title, address, peers and limits.
    spool, assembly
        Where instances go, and who is told of them. The assembly is ticked from here.
    contexts, handlers
        Presentation contexts and pynetdicom event handlers of further services that answer at the same address, such
        as Storage Commitment's N-EVENT-REPORT.
    stopped
        Called at the end of `stop`.
    """

    def __init__(
        self,
        options: ListenerOptions,
        spool: Spool,
        assembly: Assembly,
        *,
        contexts: Sequence[PresentationContext] = (),
        handlers: Sequence[tuple[Any, ...]] = (),
        stopped: Callable[[], None] = lambda: None,
    ) -> None:
        if options.known_peers is not None and not options.known_peers:
            raise ValueError("no peer may send: name the peers that may, or accept any calling AE title")
        self.options = options
        self._spool = spool
        self._assembly = assembly
        self._contexts = [build_context(Verification), *contexts]
        self._handlers = list(handlers)
        self._stopped = stopped
        self._server: AssociationServer | None = None
        self._numbers = itertools.count(1)
        self._associations: dict[Association, _Open] = {}
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        #: Warnings that a caller can cause.
        self.quota = LogQuota(log, group)
        self._stopping = threading.Event()
        self._ticker: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that is listened on, also when port 0 asked for any."""
        return int(self._server.server_address[1]) if self._server else self.options.port

    @property
    def associations(self) -> int:
        """Associations that are open now."""
        return len(self._associations)

    def start(self) -> None:
        """Listen, from threads of their own.

        Raises
        ------
        OSError
            The address or port cannot be had.
        """
        options = self.options
        ae = application_entity(options.ae_title)
        ae.maximum_pdu_size = MAXIMUM_PDU
        # Counted and told by us: pynetdicom counts every connection, also one that never asks for an association.
        ae.maximum_associations = 1 << 30
        ae.network_timeout = ae.dimse_timeout = options.network_timeout_s
        ae.acse_timeout = ACSE_TIMEOUT_S
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_SOP_COMMON, _on_common_negotiation),
            (evt.EVT_ESTABLISHED, self._on_established),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_C_ECHO, self._on_echo),
            *self._handlers,
        ]
        if options.transport == STOCK:
            handlers += [
                (evt.EVT_CONN_OPEN, self._on_connection),
                (evt.EVT_CONN_CLOSE, _on_connection_closed),
                (evt.EVT_C_STORE, self._on_store),
            ]
        self._stopping.clear()
        if options.addresses is not None:
            options.addresses.start()
        address = (options.host, options.port)
        self._server = serve(ae, address, self._contexts, handlers, options.transport, self)
        self._ticker = threading.Thread(target=self._tick, name="assembly", daemon=True)
        self._ticker.start()
        log.info("listening", ae_title=options.ae_title, port=self.port, transport=options.transport)

    def stop(self) -> None:
        """Take no more associations, let those that are open end, and abort what remains.

        No series is closed from here on: it is the stop itself that keeps its sender from going on. The next start
        takes up what is open.
        """
        if self._server is None:
            return
        self._stopping.set()
        if self._ticker:
            self._ticker.join()
        server, self._server = self._server, None
        server.shutdown()
        deadline = time.monotonic() + STOP_S
        while (left := server.active_associations) and time.monotonic() < deadline:
            time.sleep(0.05)
        for association in left:
            association.abort()
        self._end_dead()
        if self.options.addresses is not None:
            self.options.addresses.stop()
        self._stopped()
        log.info("stopped listening", ae_title=self.options.ae_title)

    def _tick(self) -> None:
        for n in itertools.count():
            if n % ALIVE_EVERY == 0:
                with suppress(OSError):
                    self._spool.still_alive()
            if self._stopping.wait(TICK_S):
                break
            try:
                self._end_dead()
                self._end_idle()
                self.quota.flush()
                self._assembly.tick()
            except Exception as error:  # without this thread no series closes
                log.error("closing failed; it is tried again", error=plainly(error))

    def _end_dead(self) -> None:
        """Associations whose thread died without a word have ended too."""
        with self._lock:
            # One without a number has not been started yet.
            dead = [one for one in self._associations if one.ident is not None and not one.is_alive()]
        for association in dead:
            self._end(association, "aborted")

    def _end_idle(self) -> None:
        """Keep no more idle associations of one address than it may have."""
        now, idle = time.monotonic(), dict[str, list[tuple[float, Association]]]()
        with self._lock:
            for association, one in self._associations.items():
                if now - one.busy_at > IDLE_S and not amid_instance(association):
                    idle.setdefault(group(one.id.address), []).append((one.busy_at, association))
        for address, found in idle.items():
            for busy_at, association in sorted(found, key=lambda one: one[0])[: -KEPT_IDLE or None]:
                known = self._identify(association)
                self._end(association, "idle")
                # It waits for the peer, which the assembly must not.
                threading.Thread(target=association.abort, name="abort", daemon=True).start()
                self.quota.warning(
                    "idle association ended",
                    known.address,
                    calling_ae=known.calling_ae,
                    number=known.number,
                    idle_s=round(now - busy_at),
                    mend=f"usually none; {address} keeps more than {KEPT_IDLE} associations open and sends nothing",
                )

    def _end(self, association: Association, ending: Ending) -> None:
        with self._lock:
            known = self._associations.pop(association, None)
        if known:
            self._assembly.association_ended(known.id, ending)

    def _on_connection(self, event: _Event) -> None:
        """Bound the wait for a peer that stalls within a PDU: the listening socket's timeout is not inherited."""
        transport = event.assoc.dul.socket.socket
        transport.settimeout(self.options.network_timeout_s)
        transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def screen(self, request: AssociationRequest) -> Answer | None:
        """Whether a caller is let in at all, by its AE title and address; the A-ASSOCIATE-RJ where it is not."""
        return self._rejected(request, self._stranger(request))

    def admit(self, request: AssociationRequest) -> Answer | None:
        """Whether there is room for another association of a caller that was let in."""
        with self._lock:
            refusal = self._crowded(request)
        return self._rejected(request, refusal)

    def began(self, association: Association, request: AssociationRequest) -> None:
        """An association is about to be started."""
        who = AssociationId(next(self._numbers), request.calling_ae, request.called_ae, request.address)
        with self._lock:
            self._associations[association] = _Open(who, self._standing(request) == "own", time.monotonic())

    def failed(self, association: Association) -> None:
        """It could not be started."""
        self._end(association, "aborted")

    def begin(self, association: Association, request: StoreRequest) -> _Instance:
        """An instance begins to come."""
        with self._lock:
            known = self._associations.get(association)
            if known is not None:
                known.busy_at = time.monotonic()
        who = known.id if known is not None else self._nobody(association)
        is_over = self._is_over(association)
        return _Instance(self._spool, self._assembly, who, request, is_over, self.quota)

    def _on_requested(self, event: _Event) -> None:
        """Reject an association that there is no room for, or support what it proposes, as far as that is storage."""
        association = event.assoc
        asked = association.requestor.primitive
        ends = ae_title(asked.called_ae_title), ae_title(asked.calling_ae_title)
        request = AssociationRequest(*ends, shown(association.requestor.address or ""), _own_address(association))
        answer = None
        if self.options.transport == STOCK:
            # The other transport has done so before there was an association.
            answer = self.screen(request)
            with self._lock:
                answer = answer or self.admit(request)
                if answer is None:
                    self.began(association, request)
        if answer is None:
            answer = self._rejected(request, self._full())
        if answer is not None:
            self._end(association, "aborted")
            association.acse.send_reject(*answer)
            association.kill()
            return
        proposed = asked.presentation_context_definition_list
        association.acceptor.supported_contexts = [*self._contexts, *_storage_contexts(proposed)]

    def _rejected(self, request: AssociationRequest, refusal: _Refusal | None) -> Answer | None:
        if refusal is None:
            return None
        self.quota.warning(
            "association rejected",
            request.address,
            calling_ae=_printable(request.calling_ae),
            reason=refusal.reason,
            mend=refusal.mend,
        )
        return refusal.answer

    def _standing(self, request: AssociationRequest) -> Standing:
        addresses = self.options.addresses
        if addresses is None:
            return "unknown"
        return addresses.check(request.calling_ae, request.address, request.own_address)[0]

    def _stranger(self, request: AssociationRequest) -> _Refusal | None:
        """Why a caller is not let in, by what it says of itself and where it calls from."""
        options, calling_ae, address = self.options, request.calling_ae, request.address
        if request.called_ae != options.ae_title.strip():
            mend = f"enter the AE title {options.ae_title} at the sender"
            return _Refusal(_CALLED_AE_UNKNOWN, f"it called {_printable(request.called_ae)}", mend)
        if not calling_ae or calling_ae != _printable(calling_ae):
            return _Refusal(_CALLING_AE_UNKNOWN, "its calling AE title is none (PS3.5 6.2)", "correct it at the sender")
        if options.known_peers is not None and calling_ae not in options.known_peers:
            mend = "add it to 'peers' with 'send' among what it may, or set listener.accept to any"
            return _Refusal(_CALLING_AE_UNKNOWN, "its calling AE title is no peer that may send", mend)
        if options.addresses is None:
            return None
        standing, peer = options.addresses.check(calling_ae, address, request.own_address)
        key = f"peers.{peer}.addresses"
        if standing == "elsewhere":
            mend = f"if this is {peer}, add {address} to {key}; if it is not, somebody uses the AE title of {peer}"
            return _Refusal(_CALLING_AE_UNKNOWN, f"{address} is no address of peer {peer}", mend)
        if standing == "unresolved":
            mend = f"check name resolution on this machine, or enter {address} in {key}; it will try again"
            return _Refusal(_LATER, f"the host name of peer {peer} could not be looked up yet", mend)
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
        self.quota.warning(
            "peer calls from an address that is not its own",
            address,
            calling_ae=calling_ae,
            peer=peer,
            mend=f"if this is {peer}, add {address} to {key}, for a later version refuses it; if it is not, set "
            "listener.addresses to enforce now",
        )

    def _crowded(self, request: AssociationRequest) -> _Refusal | None:
        """Why there is no room for another association, under the lock."""
        options, known = self.options, self._associations.values()
        if len(known) >= options.max_associations:
            mend = "raise listener.max_associations, or let the sender open fewer; it will try again"
            return _Refusal(_LIMIT_EXCEEDED, f"{options.max_associations} associations are open", mend)
        most, own = options.max_associations * ONE_PEER // 4, self._standing(request) == "own"
        # Who only uses a peer's AE title does not count as that peer.
        mine = sum(one.id.calling_ae == request.calling_ae and one.own == own for one in known)
        if options.max_associations >= 4 and mine >= most:
            mend = "let this sender open fewer, or raise listener.max_associations; it will try again"
            return _Refusal(_LIMIT_EXCEEDED, f"{mine} associations are open with this peer", mend)
        strangers = sum(not one.own for one in known)
        if options.max_associations >= 4 and options.addresses and not own and strangers >= most:
            mend = "enter the senders in 'peers' with their addresses, or raise listener.max_associations"
            return _Refusal(_LIMIT_EXCEEDED, f"{strangers} associations are open with callers that are no peers", mend)
        return None

    def _full(self) -> _Refusal | None:
        """Whether there is so little room on disk that an association would only end in refusals."""
        try:
            self._spool.require_room(NO_ASSOCIATION_BELOW)
        except SpoolFullError:
            mend = "free space, or lower listener.disk_floor_mb; the sender will try again"
            return _Refusal(_CONGESTED, "free disk space is far below the floor", mend)
        return None

    def _on_established(self, event: _Event) -> None:
        known = self._identify(event.assoc)
        self._assembly.association_began(known)
        log.info("association", calling_ae=known.calling_ae, address=known.address, number=known.number)

    def _on_released(self, event: _Event) -> None:
        self._end(event.assoc, "released")

    def _on_aborted(self, event: _Event) -> None:
        """By the peer, by the loss of the connection, or by ourselves because nothing came for too long."""
        association = event.assoc
        idle = association.dul.idle_timer_expired() and not amid_instance(association)
        known = self._identify(association)
        if known.number:
            reason = "nothing came for too long" if idle else "aborted, or the connection was lost"
            caller = {"calling_ae": known.calling_ae, "address": known.address}
            log.info("association ended", **caller, number=known.number, reason=reason)
        self._end(association, "idle" if idle else "aborted")

    def _on_echo(self, event: _Event) -> int:
        """A sender may keep its association open so for hours, and is amid no instance."""
        self._assembly.pauses(self._identify(event.assoc))
        return SUCCESS

    def _identify(self, association: Association) -> AssociationId:
        """Our name for an association that was let in; of one that has ended meanwhile, a name that nobody has."""
        with self._lock:
            known = self._associations.get(association)
        return known.id if known is not None else self._nobody(association)

    def _nobody(self, association: Association) -> AssociationId:
        requestor = association.requestor
        ends = ae_title(requestor.ae_title), ae_title(association.acceptor.ae_title)
        return AssociationId(0, *ends, shown(requestor.address or ""))

    def _is_over(self, association: Association) -> Callable[[], bool]:
        return lambda: association not in self._associations

    def _on_store(self, event: _Event) -> Dataset:
        """A C-STORE by the stock transport."""
        asked, context = event.request, event.context
        request = StoreRequest(
            str(asked.AffectedSOPClassUID),
            str(asked.AffectedSOPInstanceUID),
            str(context.abstract_syntax),
            str(context.transfer_syntax),
        )
        instance = self.begin(event.assoc, request)
        instance.write([asked.DataSet.getbuffer()])
        return _answer(*instance.end())


class _Instance:
    """An instance on its way from an association to the spool and the assembly."""

    def __init__(
        self,
        spool: Spool,
        assembly: Assembly,
        association: AssociationId,
        request: StoreRequest,
        is_over: Callable[[], bool],
        quota: LogQuota,
    ) -> None:
        self._spool = spool
        self._assembly = assembly
        self._quota = quota
        self._association = association
        self._request = request
        #: Whether the association has ended before the instance did: `Listener.stop` may abort it.
        self._is_over = is_over
        self._part: Part | None = None
        #: Why the instance cannot be stored.
        self._failed: Exception | None = None
        #: Its first bytes.
        self._head = bytearray()
        try:
            self._part = spool.begin(
                sop_uid=request.sop_instance_uid,
                sop_class_uid=request.sop_class_uid,
                transfer_syntax_uid=request.transfer_syntax,
                calling_ae=association.calling_ae,
                called_ae=association.called_ae,
            )
        except (OSError, InvalidUIDError) as error:
            self._failed = error

    def write(self, fragments: Sequence[memoryview]) -> None:
        """Take the next bytes; once storing has failed they are heard out, for the answer can only come at the end."""
        for fragment in fragments:
            if len(self._head) < _HEAD:
                self._head += fragment[: _HEAD - len(self._head)]
        if self._part is not None:
            try:
                self._part.write(*fragments)
            except OSError as error:
                self._failed = error
                self.drop()

    def drop(self) -> None:
        """Leave nothing on disk."""
        part, self._part = self._part, None
        if part is not None:
            with suppress(OSError):
                part.drop()

    def end(self) -> tuple[int, str]:
        """Store, and give the C-STORE status with its Error Comment."""
        try:
            return self._store()
        except Exception as error:
            # Whatever it was, the sender must be told that its copy is the only one.
            self._error("C-STORE failed", error=plainly(error))
            return PROCESSING_FAILURE, "not stored: internal error"
        finally:
            self.drop()
            if self._is_over():
                # The assembly must not wait for what has ended.
                self._assembly.association_ended(self._association, "aborted")

    def _store(self) -> tuple[int, str]:
        request = self._request
        try:
            if self._part is None:
                return self._refused(self._failed)
            header = self._header(self._part)
            if mismatch := _mismatch(header, request):
                mend = "the sender's object and request differ; its maker has to mend it"
                self._warn("C-STORE refused", status="A900", reason=mismatch, mend=mend)
                return MISMATCH, mismatch
            stored = self._part.keep(header.study_instance_uid, header.series_instance_uid, header.sop_instance_uid)
        except (HeaderError, InvalidUIDError) as error:
            return self._refused(error)
        except OSError as error:
            return self._refused(error)
        self._assembly.received(self._association, header, stored)
        if stored.outcome == "differs":
            mend = "usually none; a corrected study needs UIDs of its own"
            self._warn(
                "kept instance has other content than the one sent",
                sop_instance=header.sop_instance_uid,
                belongs_to=stored.belongs_to or self._association.calling_ae,
                mend=mend,
            )
            return COERCED, "instance known with other content; first one kept"
        return SUCCESS, ""

    def _header(self, part: Part) -> InstanceHeader:
        """The header, for nearly every instance without going back to what was written."""
        try:
            return read_header(self._head, self._request.transfer_syntax, size=part.size)
        except HeaderError:
            return read_header(part.dataset(), self._request.transfer_syntax)

    def _refused(self, error: Exception | None) -> tuple[int, str]:
        if isinstance(error, HeaderError | InvalidUIDError):
            mend = "the sender's object is damaged or not DICOM; its maker has to mend it"
            self._warn("C-STORE refused", status="C000", reason=str(error), mend=mend)
            return CANNOT_UNDERSTAND, str(error)
        with suppress(HeaderError):
            header = read_header(self._head, self._request.transfer_syntax, whole=False)
            owner = self._spool.belongs_to(header.study_instance_uid, header.series_instance_uid)
            if owner in ("", self._association.calling_ae):
                self._assembly.refused(self._association, header)
        if isinstance(error, SpoolFullError):
            mend = "free space, or lower listener.disk_floor_mb; the sender has to send again"
            self._error("C-STORE refused", status="A700", reason=str(error), mend=mend)
            return OUT_OF_RESOURCES, "out of disk space"
        code = errno.errorcode.get(getattr(error, "errno", None) or 0, "unknown")
        mend = "look at the file system of the data folder; the sender has to send again"
        self._error("C-STORE failed", status="0110", error=code, mend=mend)
        return PROCESSING_FAILURE, "not stored: file system error"

    def _warn(self, event: str, **fields: Any) -> None:
        who = self._association
        self._quota.warning(event, who.address, calling_ae=who.calling_ae, number=who.number, **fields)

    def _error(self, event: str, **fields: Any) -> None:
        who = self._association
        self._quota.error(event, who.address, calling_ae=who.calling_ae, number=who.number, **fields)


def _printable(ae_title: str) -> str:
    """An AE title as it may stand in a log (PS3.5 6.2: no control characters, no backslash)."""
    return "".join(one if " " <= one <= "~" and one != "\\" else "?" for one in ae_title)


def _own_address(association: Association) -> str:
    """Our end of its connection; empty when it is closed already."""
    with suppress(OSError, AttributeError):
        return shown(association.dul.socket.socket.getsockname()[0])  # type: ignore[union-attr]
    return ""


_KNOWN_STORAGE = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)


def _storage_contexts(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """Contexts for those proposed SOP classes that are storage, private, or younger than our list."""
    return [_storage_context(uid) for uid in {str(cx.abstract_syntax) for cx in proposed} if _is_storage(uid)]


@functools.lru_cache(512)
def _storage_context(uid: str) -> PresentationContext:
    """A context, which an acceptor only reads; to make those of one association anew takes 20 ms."""
    return build_context(uid, list(TRANSFER_SYNTAXES))


@functools.lru_cache(512)
def _is_storage(uid: str) -> bool:
    known = UID(uid)
    return uid in _KNOWN_STORAGE or known.is_private or not hasattr(sop_class, known.keyword or "?")


def _on_connection_closed(event: _Event) -> None:
    """Let the thread of a probe go, which connects and asks for nothing.

    It would wait out the ACSE timeout and count as an association meanwhile, so that a load balancer that looks every
    second would fill the listener (pynetdicom #328, #669). None is what it gets when it has waited in vain.
    """
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


def _on_common_negotiation(event: _Event) -> dict[UID, SOPClassCommonExtendedNegotiation]:
    """Tell pynetdicom that unknown SOP classes belong to the Storage Service Class (PS3.7 D.3.3.6).

    The acceptor's view of this negotiation is never sent to the peer, so it is the supported way to have an unknown
    SOP class served; `_config.UNRESTRICTED_STORAGE_SERVICE` would also take transfer syntaxes that nobody can read.
    """
    served = {}
    for context in event.assoc.requestor.primitive.presentation_context_definition_list:
        uid = UID(context.abstract_syntax)
        if uid not in _KNOWN_STORAGE and _is_storage(uid):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = uid
            item.service_class_uid = UID(_STORAGE_SERVICE)
            served[uid] = item
    return served


def _mismatch(header: InstanceHeader, request: StoreRequest) -> str:
    """What of the data set is not what the request and its presentation context say; empty when all is."""
    if header.sop_class_uid != request.sop_class_uid or header.sop_class_uid != request.abstract_syntax:
        return "SOP class of data set and request differ"
    if header.sop_instance_uid != request.sop_instance_uid:
        return "SOP instance of data set and request differ"
    return ""


def _answer(status: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]  # VR LO
    return answer
