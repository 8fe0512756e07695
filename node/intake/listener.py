"""The Storage SCP: associations in, instances to the spool, headers to the assembly.

C-ECHO and C-STORE over pynetdicom. Who may open an association is decided by `node.intake.admission`, what may be sent
over it by `node.intake.contexts`, and what is answered to an instance by `node.intake.store`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import structlog
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from pynetdicom.transport import AssociationServer

from node.identity import application_entity
from node.intake.admission import Admission, ListenerOptions, OpenAssociation
from node.intake.assembly import Assembly, AssociationId, Ending
from node.intake.contexts import common_negotiation, storage_contexts
from node.intake.spool import Spool
from node.intake.store import SUCCESS, IncomingInstance
from node.intake.transport import STOCK, receives_instance, serve
from node.intake.transport.pdu import MAXIMUM_PDU
from node.intake.transport.service import Answer, AssociationRequest, StoreRequest
from node.network.addresses import group, shown
from node.telemetry.logs import plainly
from node.telemetry.quota import LogQuota
from node.text import ae_title

log = structlog.stdlib.get_logger(__name__)

#: Seconds without an instance after which an association is idle. Some senders keep one open by C-ECHO, as they may;
#: without it `ListenerOptions.network_timeout_s` ends the association.
IDLE_S: Final = 60.0

#: Idle associations that one address may have; of any more, those that have been idle longest are ended. A sender needs
#: no more than one.
KEPT_IDLE: Final = 4

#: Seconds for a peer that has connected to ask for an association (the ARTIM timer, PS3.8 9.1.5): bounds port probes.
ACSE_TIMEOUT_S = 30.0

#: Seconds between two looks at what can be closed.
TICK_S = 0.25

#: Ticks between two signs of life in the spool.
ALIVE_EVERY = 20

#: Seconds that `stop` waits for associations to come to their end.
STOP_S = 10.0

#: pynetdicom's Event, whose attributes it types as everything that any event may carry.
_Event = Any


class Listener:
    """A running Storage SCP, between `start` and `stop`.

    Parameters
    ----------
    options
        AE title, address, peers and limits.
    spool, assembly
        Where instances go, and who puts series together from them. The assembly is ticked from here.
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
        self._associations: dict[Association, OpenAssociation] = {}
        self._lock = threading.RLock()
        #: Warnings that a caller can cause.
        self.quota = LogQuota(log, group)
        self._admission = Admission(options, spool, self.quota)
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
        # They are counted here: pynetdicom counts every connection, also one that never asks for an association.
        ae.maximum_associations = 1 << 30
        ae.network_timeout = ae.dimse_timeout = options.network_timeout_s
        ae.acse_timeout = ACSE_TIMEOUT_S
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_SOP_COMMON, common_negotiation),
            (evt.EVT_ESTABLISHED, self._on_established),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_C_ECHO, self._on_echo),
            *self._handlers,
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

        No series is closed from here on, as it is the stop itself that keeps its sender from going on. The next start
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
        """End the associations whose thread died without an event."""
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
                if now - one.busy_at > IDLE_S and not receives_instance(association):
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
                    hint=f"usually none; {address} keeps more than {KEPT_IDLE} associations open and sends nothing",
                )

    def _end(self, association: Association, ending: Ending) -> None:
        with self._lock:
            known = self._associations.pop(association, None)
        if known:
            self._assembly.association_ended(known.id, ending)

    def screen(self, request: AssociationRequest) -> Answer | None:
        """Whether a caller is let in at all, by its AE title and address; the A-ASSOCIATE-RJ where it is not."""
        return self._admission.of_caller(request)

    def admit(self, request: AssociationRequest) -> Answer | None:
        """Whether there is room for another association of a caller that was let in."""
        with self._lock:
            return self._admission.of_number(request, self._associations.values())

    def began(self, association: Association, request: AssociationRequest) -> None:
        """An association is about to be started."""
        who = AssociationId(next(self._numbers), request.calling_ae, request.called_ae, request.address)
        with self._lock:
            self._associations[association] = OpenAssociation(
                who, self._admission.standing(request) == "own", time.monotonic()
            )

    def failed(self, association: Association) -> None:
        """It could not be started."""
        self._end(association, "aborted")

    def begin(self, association: Association, request: StoreRequest) -> IncomingInstance:
        """An instance begins to come."""
        with self._lock:
            known = self._associations.get(association)
            if known is not None:
                known.busy_at = time.monotonic()
        who = known.id if known is not None else self._nobody(association)
        is_over = self._is_over(association)
        return IncomingInstance(self._spool, self._assembly, who, request, is_over, self.quota)

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
            answer = self._admission.of_disk(request)
        if answer is not None:
            self._end(association, "aborted")
            association.acse.send_reject(*answer)
            association.kill()
            return
        proposed = asked.presentation_context_definition_list
        association.acceptor.supported_contexts = [*self._contexts, *storage_contexts(proposed)]

    def _on_established(self, event: _Event) -> None:
        known = self._identify(event.assoc)
        self._assembly.association_began(known)
        log.info("association", calling_ae=known.calling_ae, address=known.address, number=known.number)

    def _on_released(self, event: _Event) -> None:
        self._end(event.assoc, "released")

    def _on_aborted(self, event: _Event) -> None:
        """By the peer, by the loss of the connection, or by ourselves because nothing came for too long."""
        association = event.assoc
        idle = association.dul.idle_timer_expired() and not receives_instance(association)
        known = self._identify(association)
        if known.number:
            reason = "nothing came for too long" if idle else "aborted, or the connection was lost"
            caller = {"calling_ae": known.calling_ae, "address": known.address}
            log.info("association ended", **caller, number=known.number, reason=reason)
        self._end(association, "idle" if idle else "aborted")

    def _on_echo(self, event: _Event) -> int:
        """A sender may keep its association open in this way for hours; it is sending no instance now."""
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


def _own_address(association: Association) -> str:
    """Our end of its connection; empty when it is closed already."""
    with suppress(OSError, AttributeError):
        return shown(association.dul.socket.socket.getsockname()[0])  # type: ignore[union-attr]
    return ""
