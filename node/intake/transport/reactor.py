"""The DUL and DIMSE service providers of an association: threads that wait, and a C-STORE path without copies.

pynetdicom keeps its state machine (PS3.8 9.2) and serves every request but C-STORE. The fragments of a C-STORE go
straight from the socket's buffer to whoever takes the instance.
"""

from __future__ import annotations

import queue
import threading
from typing import Any, Final

from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA

from node.intake.transport.dimse import (
    C_STORE_RQ,
    COMMAND_FIELD,
    DATA_SET_TYPE,
    NO_DATA_SET,
    SOP_CLASS,
    SOP_INSTANCE,
    Elements,
    elements_of,
    store_response,
    uid_in,
)
from node.intake.transport.pdu import (
    ABORT,
    ASSOCIATE_RQ,
    MAXIMUM_PDU,
    P_DATA_TF,
    PDU_HEAD,
    PDV,
    RELEASE_RQ,
    SENDERS_FAULT,
    InvalidPduError,
)
from node.intake.transport.service import Incoming, Service, StoreRequest
from node.intake.transport.sockets import POLL_S, WaitingSocket
from node.network.addresses import shown
from node.text import ae_title

#: Bytes of a command set, and of a data set that goes with another request than C-STORE; real ones are kilobytes.
MAXIMUM_COMMAND: Final = 1 << 20

#: Requests other than C-STORE that wait for their answer in memory. A peer may send one at a time, as more are not
#: negotiated (Asynchronous Operations Window, PS3.7 D.3.3.3).
MAXIMUM_UNANSWERED: Final = 4

#: Fragments that are passed on at a time; a vectored write takes 1024 of them (IOV_MAX).
_MOST_FRAGMENTS: Final = 1000


class Reactor(DULServiceProvider):
    """The DUL service provider; what comes as P-DATA is taken here and not by the state machine."""

    socket: WaitingSocket | None

    def __init__(self, association: Association, service: Service) -> None:
        super().__init__(association)
        self._run_loop_delay = 0
        self.daemon = True
        self._service = service
        #: Set when there is something for the association's thread.
        self.activity = threading.Event()
        self.to_user_queue = _NotifyingQueue(self.activity)
        self.incoming: Incoming | None = None
        self._request: Elements = {}
        #: The presentation context of the message that is coming.
        self._context_id: int | None = None
        self._command = bytearray()
        #: What was read of an instance and not yet passed on.
        self._fragments: list[memoryview] = []
        #: Bytes of the data set of a message that pynetdicom takes; None while none is due.
        self._other: int | None = None
        self._storing = False

    def run_reactor(self) -> None:
        """Run until the connection has ended."""
        try:
            super().run_reactor()
        except Exception as error:
            # An event that the state machine does not know in its state: the peer broke the protocol.
            self._warn("association ended", reason="protocol error", error=type(error).__name__)
            self.assoc.is_established = False
            self.assoc._kill = True
        finally:
            if self.incoming is not None:
                self.incoming.drop()
                self.incoming = None
            if self.socket is not None:
                self.socket.free()
            if self.assoc.requestor.primitive is None:
                # What came first was no request that could be decoded: its thread would wait for one.
                self._warn("connection closed", reason="an association request is malformed", hint=SENDERS_FAULT)
                waiting: queue.Queue[Any] = self.to_user_queue
                waiting.put(None)
            self.activity.set()

    def send_pdu(self, primitive: Any) -> None:
        """Give a primitive to the reactor, and wake it."""
        super().send_pdu(primitive)
        if self.socket is not None and threading.current_thread() is not self:
            self.socket.wake()

    def kill_dul(self) -> None:
        """End the reactor."""
        super().kill_dul()
        if self.socket is not None:
            self.socket.wake()
        self.activity.set()

    def idle_timer_expired(self) -> bool:
        """Whether the peer has been silent for too long; time that we take to store is not the peer's."""
        return not self._storing and bool(super().idle_timer_expired())

    def _is_transport_event(self) -> bool:
        if self.state_machine.current_state == "Sta13" and self.socket is not None:
            self.socket.linger()
            self.socket.close()
            return True
        received = False
        # P-DATA needs nothing more once it has been read. The loop sleeps a little in each round, and so lets another
        # thread have the interpreter: it is left alone until something else comes or is to be sent.
        while self.event_queue.empty() and self.to_provider_queue.empty() and not self._kill_thread:
            if self.socket is None or not self.socket.ready:
                break
            self._read_pdu_data()
            self._idle_timer.restart()
            received = True
        return received

    def _read_pdu_data(self) -> None:
        """Take all the P-DATA-TF PDUs that are here; leave every other PDU to pynetdicom."""
        try:
            self._read_pdus()
        finally:
            self._pass_on()

    def _read_pdus(self) -> None:
        connection = self.socket
        assert connection is not None
        while (head := connection.head()) is not None:
            kind, length = head
            if length > MAXIMUM_PDU and kind != ASSOCIATE_RQ:  # whose length the server has checked
                limit = f"a PDU of type {kind} is longer than {MAXIMUM_PDU} bytes"
                return self._refuse(limit, "the sender ignores the maximum length that was negotiated")
            if self.state_machine.current_state != "Sta6":
                break
            if kind in (RELEASE_RQ, ABORT):
                break
            if kind != P_DATA_TF:
                return self._refuse(f"a PDU of type {kind} came where none may come", SENDERS_FAULT)
            try:
                self._take(connection.take(PDU_HEAD.size + length)[PDU_HEAD.size :])
            except InvalidPduError as fault:
                return self._refuse(str(fault), SENDERS_FAULT)
            except Exception as error:  # pynetdicom's, of a command set that it cannot decode
                return self._refuse(f"a request cannot be decoded ({type(error).__name__})", SENDERS_FAULT)
            if not self.to_provider_queue.empty():
                return None
        else:
            if not connection.ended:
                return None
        return super()._read_pdu_data()

    def _refuse(self, reason: str, hint: str) -> None:
        """Abort the association (AA-8, PS3.8 table 9-10)."""
        self._warn("association aborted", calling_ae=ae_title(self.assoc.requestor.ae_title), reason=reason, hint=hint)
        self.event_queue.put("Evt19")

    def _warn(self, event: str, **fields: Any) -> None:
        self._service.quota.warning(event, shown(self.assoc.requestor.address or ""), **fields)

    def _take(self, pdu: memoryview) -> None:
        """Presentation data values (PS3.8 9.3.5.1), each a fragment of a command or of its data set (annex E.2)."""
        at = 0
        while at < len(pdu):
            if len(pdu) - at < PDV.size:
                raise InvalidPduError("a PDU ends within the head of a presentation data value")
            length, context_id, control = PDV.unpack_from(pdu, at)
            if length < 2 or at + 4 + length > len(pdu):
                raise InvalidPduError("a presentation data value is longer than its PDU, or has no head")
            fragment, last = pdu[at + PDV.size : at + 4 + length], bool(control & 2)
            at += 4 + length
            if self._context_id is None:
                self._context_id = context_id
            if context_id != self._context_id:
                raise InvalidPduError("a message changes its presentation context")
            if control & 1:
                self._take_command(fragment, last)
            elif self.incoming is not None:
                self._take_instance(self.incoming, fragment, last)
            elif self._other is not None:
                self._take_other(fragment, last)
            else:
                raise InvalidPduError("a data set comes without a command")

    def _take_command(self, fragment: memoryview, last: bool) -> None:
        if self.incoming is not None or self._other is not None:
            raise InvalidPduError("a command comes before the end of the data set of the one before")
        self._command += fragment
        if len(self._command) > MAXIMUM_COMMAND:
            raise InvalidPduError("a command set is too long")
        if not last:
            return
        command, self._command = bytes(self._command), bytearray()
        elements = elements_of(command)
        has_data = elements.get(DATA_SET_TYPE, b"") != NO_DATA_SET
        if elements.get(COMMAND_FIELD) == C_STORE_RQ:
            context = self.assoc._accepted_cx.get(self._context_id or 0)
            if context is None:
                raise InvalidPduError("the presentation context is not one that was accepted")
            self._request = elements
            request = StoreRequest(
                uid_in(elements, SOP_CLASS),
                uid_in(elements, SOP_INSTANCE),
                str(context.abstract_syntax),
                str(context.transfer_syntax[0]),
            )
            self.incoming = self._service.begin(self.assoc, request)
            if not has_data:
                self._take_instance(self.incoming, memoryview(b""), True)
            return
        if self.assoc.dimse.msg_queue.qsize() >= MAXIMUM_UNANSWERED:
            raise InvalidPduError("more requests come than are answered")
        self._other = 0 if has_data else None
        self._give(3, command)
        if not has_data:
            self._context_id = None

    def _take_instance(self, incoming: Incoming, fragment: memoryview, last: bool) -> None:
        self._fragments.append(fragment)
        if last or len(self._fragments) >= _MOST_FRAGMENTS:
            self._pass_on()
        if not last:
            return
        self._storing = True
        try:
            status, comment = incoming.end()
        finally:
            self.incoming = None
            self._idle_timer.restart()
            self._storing = False
        assert self.socket is not None
        assert self._context_id is not None
        self.socket.send(store_response(self._context_id, self._request, status, comment))
        self._context_id = None

    def _pass_on(self) -> None:
        """Write what has come of an instance in one call, as each lets another thread have the interpreter."""
        fragments, self._fragments = self._fragments, []
        if fragments and self.incoming is not None:
            self.incoming.write(fragments)

    def _take_other(self, fragment: memoryview, last: bool) -> None:
        """The data set of a request that pynetdicom serves."""
        self._other = (self._other or 0) + len(fragment)
        if self._other > MAXIMUM_COMMAND:
            raise InvalidPduError("the data set of a request other than C-STORE is too long")
        self._give(2 if last else 0, bytes(fragment))
        if last:
            self._other = self._context_id = None

    def _give(self, control: int, fragment: bytes) -> None:
        primitive = P_DATA()
        assert self._context_id is not None
        value = [self._context_id, bytes((control,)) + fragment]
        primitive.presentation_data_value_list = [value]  # type: ignore[list-item]  # it takes lists only
        self.assoc.dimse.receive_primitive(primitive)


class _NotifyingQueue(queue.Queue[Any]):
    """A queue that sets an event when something is put into it."""

    def __init__(self, activity: threading.Event) -> None:
        super().__init__()
        self._activity = activity

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put, and set the event."""
        super().put(item, block, timeout)
        self._activity.set()


class Messages(DIMSEServiceProvider):
    """The DIMSE service provider; the association's thread, which asks it for messages, waits here."""

    def __init__(self, association: Association, activity: threading.Event) -> None:
        super().__init__(association)
        self._activity = activity
        self.msg_queue = _NotifyingQueue(activity)

    def get_msg(self, block: bool = False) -> Any:
        """The next message, if any, once something has happened that the association's thread must look at."""
        if not block and self.msg_queue.empty():
            self._activity.wait(POLL_S)
            self._activity.clear()
        return super().get_msg(block)
