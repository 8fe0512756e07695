"""The Storage SCP: associations in, instances to the spool, headers to the assembly.

C-ECHO and C-STORE over pynetdicom, with every storage SOP class, also private ones: a study that is sent here may hold
objects that nobody analyses, and a sender whose private object is refused calls the whole study failed.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, evt, sop_class
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import AllStoragePresentationContexts, PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from pynetdicom.transport import ThreadedAssociationServer

from node.intake.assembly import Assembly, AssociationId, Ending
from node.intake.header import HeaderError, InstanceHeader, read_header
from node.intake.spool import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION,
    InvalidUIDError,
    Spool,
    SpoolFullError,
    Stored,
)
from node.telemetry.logs import plainly

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

# A-ASSOCIATE-RJ (PS3.8 table 9-21), as (result, source, reason), sent by pynetdicom:
#   (1, 1, 7) permanent, service user, called AE title not recognized
#   (1, 1, 3) permanent, service user, calling AE title not recognized
#   (2, 3, 2) transient, service provider (presentation), local limit exceeded

#: Bytes; the largest that DCMTK uses. Larger brings nothing.
MAXIMUM_PDU = 128 * 1024

#: Seconds for a peer that has connected to ask for an association (the ARTIM timer, PS3.8 9.1.5): bounds port probes.
ACSE_TIMEOUT_S = 30.0

#: Seconds between two looks at what can be closed.
TICK_S = 0.25

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
    #: Seconds without a byte after which a peer is taken to be gone.
    network_timeout_s: float = 60.0


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
    """

    def __init__(
        self,
        options: ListenerOptions,
        spool: Spool,
        assembly: Assembly,
        *,
        contexts: Sequence[PresentationContext] = (),
        handlers: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        if options.known_peers is not None and not options.known_peers:
            raise ValueError("no peer may send: name the peers that may, or accept any calling AE title")
        self.options = options
        self._spool = spool
        self._assembly = assembly
        self._contexts = [build_context(Verification), *contexts]
        self._handlers = list(handlers)
        self._server: ThreadedAssociationServer | None = None
        self._numbers = itertools.count(1)
        self._associations: dict[Association, AssociationId] = {}
        self._lock = threading.Lock()
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
        ae = AE(options.ae_title)
        ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        ae.implementation_version_name = IMPLEMENTATION_VERSION
        ae.maximum_pdu_size = MAXIMUM_PDU
        ae.maximum_associations = options.max_associations
        ae.network_timeout = ae.dimse_timeout = options.network_timeout_s
        ae.acse_timeout = ACSE_TIMEOUT_S
        ae.require_called_aet = True
        ae.require_calling_aet = sorted(options.known_peers or ())
        handlers = [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_CONN_CLOSE, _on_connection_closed),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_SOP_COMMON, _on_common_negotiation),
            (evt.EVT_ESTABLISHED, self._on_established),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            *self._handlers,
        ]
        self._stopping.clear()
        self._server = ae.start_server(
            (options.host, options.port), block=False, evt_handlers=handlers, contexts=self._contexts
        )
        self._ticker = threading.Thread(target=self._tick, name="assembly", daemon=True)
        self._ticker.start()
        log.info("listening", ae_title=options.ae_title, port=self.port)

    def stop(self) -> None:
        """Take no more associations, let those that are open end, abort what remains, and close proved series."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        deadline = time.monotonic() + STOP_S
        while (left := server.active_associations) and time.monotonic() < deadline:
            time.sleep(0.05)
        for association in left:
            association.abort()
        self._stopping.set()
        if self._ticker:
            self._ticker.join()
        log.info("stopped listening", ae_title=self.options.ae_title)

    def _tick(self) -> None:
        while not self._stopping.wait(TICK_S):
            self._end_dead()
            self._assembly.tick()
        self._end_dead()
        self._assembly.tick(final=True)

    def _end_dead(self) -> None:
        """Associations whose thread died without a word have ended too."""
        with self._lock:
            dead = [association for association in self._associations if not association.is_alive()]
        for association in dead:
            self._end(association, "aborted")

    def _end(self, association: Association, ending: Ending) -> None:
        with self._lock:
            known = self._associations.pop(association, None)
        if known:
            self._assembly.association_ended(known, ending)

    def _on_connection(self, event: _Event) -> None:
        """Bound the wait for a peer that stalls within a PDU: the listening socket's timeout is not inherited."""
        transport = event.assoc.dul.socket.socket
        transport.settimeout(self.options.network_timeout_s)
        transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_requested(self, event: _Event) -> None:
        """Support what is proposed, as far as it is storage, rather than some list of SOP classes."""
        proposed = event.assoc.requestor.primitive.presentation_context_definition_list
        event.assoc.acceptor.supported_contexts = [*self._contexts, *_storage_contexts(proposed)]

    def _on_established(self, event: _Event) -> None:
        association = event.assoc
        self._identify(association)
        log.info(
            "association", calling_ae=association.requestor.ae_title, number=self._associations[association].number
        )

    def _on_rejected(self, event: _Event) -> None:
        log.warning("association rejected", calling_ae=event.assoc.requestor.ae_title)

    def _on_released(self, event: _Event) -> None:
        self._end(event.assoc, "released")

    def _on_aborted(self, event: _Event) -> None:
        """By the peer, by the loss of the connection, or by ourselves because nothing came for too long."""
        association = event.assoc
        idle = association.dul.idle_timer_expired() and association.dimse.message is None
        self._end(association, "idle" if idle else "aborted")

    def _identify(self, association: Association) -> AssociationId:
        """Our name for an association. The first object can arrive before the event that it is established."""
        with self._lock:
            if association not in self._associations:
                ends = association.requestor.ae_title, association.acceptor.ae_title
                self._associations[association] = AssociationId(next(self._numbers), *ends)
            return self._associations[association]

    def _on_store(self, event: _Event) -> Dataset:
        association = self._identify(event.assoc)
        try:
            status, comment = self._store(event, association)
        except Exception as error:
            # Whatever it was, the sender must be told that its copy is the only one.
            log.error("C-STORE failed", error=plainly(error), number=association.number)
            status, comment = PROCESSING_FAILURE, "not stored: internal error"
        if event.assoc not in self._associations:
            # Aborted by `stop` meanwhile: the assembly must not wait for it.
            self._assembly.association_ended(association, "aborted")
        return _answer(status, comment)

    def _store(self, event: _Event, association: AssociationId) -> tuple[int, str]:
        """Status and its Error Comment."""
        request, transfer_syntax = event.request, str(event.context.transfer_syntax)
        dataset: bytes = request.DataSet.getvalue()
        try:
            header = read_header(dataset, transfer_syntax)
            if mismatch := _mismatch(header, request, event.context.abstract_syntax):
                log.warning("C-STORE refused", status="A900", reason=mismatch, number=association.number)
                return MISMATCH, mismatch
            stored = self._keep(header, transfer_syntax, association, dataset)
        except (HeaderError, InvalidUIDError) as error:
            log.warning("C-STORE refused", status="C000", reason=str(error), number=association.number)
            return CANNOT_UNDERSTAND, str(error)
        except SpoolFullError as error:
            self._assembly.refused(association, header)
            log.error("C-STORE refused", status="A700", reason=str(error), sop_instance=header.sop_instance_uid)
            return OUT_OF_RESOURCES, "out of disk space"
        except OSError as error:
            self._assembly.refused(association, header)
            code = errno.errorcode.get(error.errno or 0, "unknown")
            log.error("C-STORE failed", status="0110", error=code, sop_instance=header.sop_instance_uid)
            return PROCESSING_FAILURE, "not stored: file system error"
        self._assembly.received(association, header, stored)
        if stored.outcome == "differs":
            log.warning("kept instance has other content than the one sent", sop_instance=header.sop_instance_uid)
            return COERCED, "instance known with other content; first one kept"
        return SUCCESS, ""

    def _keep(self, header: InstanceHeader, transfer_syntax: str, association: AssociationId, dataset: bytes) -> Stored:
        return self._spool.store(
            study_uid=header.study_instance_uid,
            series_uid=header.series_instance_uid,
            sop_uid=header.sop_instance_uid,
            sop_class_uid=header.sop_class_uid,
            transfer_syntax_uid=transfer_syntax,
            calling_ae=association.calling_ae,
            called_ae=association.called_ae,
            dataset=dataset,
        )


_KNOWN_STORAGE = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)


def _storage_contexts(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """Contexts for those proposed SOP classes that are storage, private, or younger than our list."""
    return [
        build_context(uid, list(TRANSFER_SYNTAXES))
        for uid in {str(cx.abstract_syntax) for cx in proposed}
        if _is_storage(uid)
    ]


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


def _mismatch(header: InstanceHeader, request: Any, abstract_syntax: str) -> str:
    """What of the data set is not what the request and its presentation context say; empty when all is."""
    if header.sop_class_uid != request.AffectedSOPClassUID or header.sop_class_uid != abstract_syntax:
        return "SOP class of data set and request differ"
    if header.sop_instance_uid != request.AffectedSOPInstanceUID:
        return "SOP instance of data set and request differ"
    return ""


def _answer(status: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]  # VR LO
    return answer
