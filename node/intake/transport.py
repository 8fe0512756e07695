"""How bytes come from the network: pynetdicom with its waiting and its C-STORE path replaced, or pynetdicom as it is.

`DIRECT` keeps pynetdicom's state machine (PS3.8 9.2) and negotiation, and changes three things through the hooks that
it has for that, `AE.make_server` with a server and a request handler of one's own:

- Threads wait for the socket instead of sleeping a millisecond at a time, so that an idle association costs nothing.
- The fragments of a C-STORE go straight from the socket's buffer to whoever takes the instance, in the thread that
  read them: no object a PDU, no copy, and memory that does not grow with the instance.
- A connection gets threads only when its whole A-ASSOCIATE-RQ has come and its sender is let in, so that probes,
  silence, slow writers and strangers cost a socket, and are bounded. Who calls whom is read from the first bytes of the
  request (PS3.8 9.3.2), and a request that is not let in is answered without being parsed.

`STOCK` is pynetdicom unchanged, to fall back to should a peer not get on with `DIRECT`: half as fast, and an instance
is held in memory while it comes in. There each connection has two threads, and each request is parsed, before it can be
rejected. The underscored names that are used here are why pynetdicom is held to 3.0.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import queue
import select
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler, ThreadedAssociationServer

from node.network.addresses import group, shown
from node.telemetry.quota import LogQuota
from node.text import ae_title

Transport = Literal["direct", "stock"]
DIRECT: Final = "direct"
STOCK: Final = "stock"

#: Bytes; the largest P-DATA-TF variable field that we take, and the largest that DCMTK sends. Larger brings nothing.
MAXIMUM_PDU: Final = 128 * 1024

#: Bytes of an A-ASSOCIATE-RQ. 128 presentation contexts with 40 transfer syntaxes each make some 160 KB.
MAXIMUM_REQUEST: Final = 256 * 1024

#: Presentation contexts of a request: their IDs are the odd numbers of a byte (PS3.8 table 9-13).
MAXIMUM_CONTEXTS: Final = 128

#: Items and sub-items of a request, each of which pynetdicom makes an object of. 128 presentation contexts with 40
#: transfer syntaxes each have 5400.
MAXIMUM_ITEMS: Final = 8192

#: Those of them in its User Information: three kinds of negotiation for each SOP class (PS3.7 D.3.3) are some 400.
MAXIMUM_USER_ITEMS: Final = 1024

#: Bytes of a command set, and of a data set that goes with another request than C-STORE; real ones are kilobytes.
MAXIMUM_COMMAND: Final = 1 << 20

#: Requests other than C-STORE that wait for their answer in memory. A peer may send one at a time, as more are not
#: negotiated (Asynchronous Operations Window, PS3.7 D.3.3.3).
MAXIMUM_UNANSWERED: Final = 4

#: Connections that have not yet asked for an association. One more closes the oldest of the address that has most of
#: them: who means it asks at once, and nobody pushes others out. Peers behind one gateway share an address, so that it
#: may have all of them while nobody else wants any.
PORCH: Final = 256

#: Fragments that are passed on at a time; a vectored write takes 1024 of them (IOV_MAX).
_MOST_FRAGMENTS: Final = 1000

#: Seconds after which a wait looks round again though nothing happened; nothing depends on it.
_LOOK_ROUND_S: Final = 1.0

#: Seconds that a peer has to close the connection after a release or an abort.
_LINGER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A C-STORE-RQ, with what was negotiated for its data set."""

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax: str
    transfer_syntax: str


class Incoming(Protocol):
    """Takes the data set of one C-STORE; none of its methods raises."""

    def write(self, fragments: Sequence[memoryview]) -> None:
        """Take the next bytes, which are gone when this returns."""

    def end(self) -> tuple[int, str]:
        """The data set is whole: C-STORE status and Error Comment to answer."""

    def drop(self) -> None:
        """No more will come, and nobody waits for an answer."""


@dataclass(frozen=True, slots=True)
class AssociationRequest:
    """Who asks for an association, from where; the AE titles without the spaces, or NULs, that fill them up."""

    called_ae: str
    calling_ae: str
    #: Its address, and the one of ours that it called.
    address: str
    own_address: str


#: A-ASSOCIATE-RJ as result, source and reason (PS3.8 table 9-21).
Answer = tuple[int, int, int]


class Service(Protocol):
    """What `DIRECT` asks of who takes instances. None of its methods raises or waits for the network."""

    quota: LogQuota

    def screen(self, request: AssociationRequest) -> Answer | None:
        """How to reject a request, by who makes it; None lets it in. Called before the rest of it has come."""

    def admit(self, request: AssociationRequest) -> Answer | None:
        """How to reject a request that was let in, for want of room; None where an association is to be made of it."""

    def began(self, association: Association, request: AssociationRequest) -> None:
        """The association was made, and is about to be started."""

    def failed(self, association: Association) -> None:
        """It could not be started."""

    def begin(self, association: Association, request: StoreRequest) -> Incoming:
        """An instance begins to come."""


def serve(
    ae: AE,
    address: tuple[str, int],
    contexts: list[PresentationContext],
    handlers: Sequence[tuple[Any, ...]],
    transport: Transport,
    service: Service,
) -> AssociationServer:
    """Listen from a thread of its own; `service` is asked by `DIRECT` only, `STOCK` calls its `handlers`.

    Raises
    ------
    OSError
        The address or port cannot be had.
    """
    if transport == STOCK:
        server = ae.start_server(address, block=False, evt_handlers=list(handlers), contexts=contexts)
        assert isinstance(server, ThreadedAssociationServer)
        return server
    direct = ae.make_server(
        address,
        contexts=contexts,
        evt_handlers=list(handlers),
        server_class=_Server,
        request_handler=_Handler,
        service=service,
    )
    threading.Thread(target=direct.serve_forever, name="listener", daemon=True).start()
    return direct


def amid_instance(association: Association) -> bool:
    """Whether an instance has begun to come and is not whole."""
    dul = association.dul
    return association.dimse.message is not None or (isinstance(dul, _Reactor) and dul.incoming is not None)


class _Invalid(Exception):  # noqa: N818 - what a PDU is
    """A PDU that breaks PS3.8 or what was negotiated; the message says how."""


@dataclass(eq=False)
class _Caller:
    """A connection that has not yet asked for an association."""

    connection: socket.socket
    address: Any
    since: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    #: Bytes that have come, also those that were not kept.
    count: int = 0
    #: Who asks, once that has come.
    request: AssociationRequest | None = None
    #: How it will be rejected when its request has come whole.
    answer: Answer | None = None

    @functools.cached_property
    def group(self) -> str:
        """What it is counted with."""
        return group(str(self.address[0]))


class _Server(AssociationServer):
    """Accepts connections, and makes an association of each whose A-ASSOCIATE-RQ has come whole."""

    request_queue_size = 256

    def __init__(self, *arguments: Any, service: Service, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.service = service
        self._bell, self._rope = socket.socketpair()
        self._stopping = False
        self._stopped = threading.Event()
        self._porch: dict[socket.socket, _Caller] = {}
        self._waiting: Counter[str] = Counter()

    def serve_forever(self, poll_interval: float = _LOOK_ROUND_S) -> None:
        """Until `shutdown`."""
        try:
            with selectors.DefaultSelector() as selector:
                self._selector = selector
                listening = self.socket
                assert listening is not None
                listening.setblocking(False)
                selector.register(listening, selectors.EVENT_READ)
                selector.register(self._bell, selectors.EVENT_READ)
                while not self._stopping:
                    for key, _ in selector.select(poll_interval):
                        if key.fileobj is listening:
                            self._accept()
                        elif key.fileobj is not self._bell and key.fileobj in self._porch:
                            self._hear(self._porch[key.fileobj])
                    self._close_silent()
                for caller in list(self._porch.values()):
                    self._close(caller)
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """Accept nothing more; associations go on."""
        self._stopping = True
        self._rope.send(b"\0")
        self._stopped.wait()
        self.server_close()
        self._bell.close()
        self._rope.close()

    def _accept(self) -> None:
        # A burst is taken in bits, so that those who are in are heard meanwhile.
        for _ in range(64):
            try:
                connection, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the peer is gone again
                self._turn_away("no file descriptor is left")
                if not self._porch:
                    time.sleep(0.1)  # all are associations, which need theirs
                    return
                continue
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._porch) >= PORCH:
                self._turn_away("too many connections that ask for no association")
            self._porch[connection] = caller = _Caller(connection, address)
            self._waiting[caller.group] += 1
            self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, caller: _Caller) -> None:
        try:
            heard = caller.connection.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError:
            heard = b""
        if not heard:
            return self._close(caller)  # a probe: connected, and that was it
        caller.count += len(heard)
        if caller.answer is None:
            caller.received += heard
        if len(caller.received) < _HEAD.size:
            return None
        kind, _, length = _HEAD.unpack_from(caller.received)
        if kind != _ASSOCIATE_RQ or not _FIXED.size <= length <= MAXIMUM_REQUEST:
            return self._abort(caller, "what came is no DICOM association request, or one that is too long")
        if caller.request is None and len(caller.received) >= _HEAD.size + _FIXED.size:
            caller.request = _asked(caller)
            caller.answer = self.service.screen(caller.request)
            if caller.answer is not None:
                del caller.received[_HEAD.size + _FIXED.size :]
        if caller.request is None or caller.count < _HEAD.size + length:
            return None
        if caller.answer is None and (fault := _fault(memoryview(caller.received)[_HEAD.size : _HEAD.size + length])):
            return self._abort(caller, fault)
        # An answer goes out when the request has come whole: a connection that is closed on bytes nobody has read is
        # reset, and takes the answer with it.
        answer = caller.answer or self.service.admit(caller.request)
        if answer is None:
            self._leave(caller)
            self._associate(caller)
            return None
        with suppress(OSError):
            caller.connection.send(_ASSOCIATE_RJ.pack(3, 0, 4, 0, *answer))
        return self._close(caller)

    def _abort(self, caller: _Caller, reason: str) -> None:
        with suppress(OSError):
            caller.connection.send(_ABORT_UNEXPECTED)
        self._close(caller)
        self._tell(caller, reason)

    def _associate(self, caller: _Caller) -> None:
        try:
            _Handler(caller, self)
        except Exception as error:  # such as no more threads; one connection must not end the others
            reason = "no association could be made of it"
            address = shown(str(caller.address[0]))
            self.service.quota.error("connection closed", address, reason=reason, error=type(error).__name__)
            self.shutdown_request(caller.connection)

    def _close_silent(self) -> None:
        timeout = self.ae.acse_timeout or math.inf
        # In order of arrival, so that the first who is in time ends it.
        for caller in list(itertools.takewhile(lambda c: time.monotonic() - c.since > timeout, self._porch.values())):
            self._close(caller)
            self._tell(caller, f"no association request came within {timeout:g} s")

    def _turn_away(self, reason: str) -> None:
        """Close the oldest connection of the address that has most of them."""
        if self._porch:
            most = max(self._waiting.values())
            caller = next(one for one in self._porch.values() if self._waiting[one.group] == most)
            self._close(caller)
            self._tell(caller, reason)

    def _tell(self, caller: _Caller, reason: str) -> None:
        mend = "let only DICOM peers reach this port; health checks should send C-ECHO, or connect and close"
        self.service.quota.warning("connection closed", shown(str(caller.address[0])), reason=reason, mend=mend)

    def _close(self, caller: _Caller) -> None:
        self._leave(caller)
        self.shutdown_request(caller.connection)

    def _leave(self, caller: _Caller) -> None:
        self._selector.unregister(caller.connection)
        del self._porch[caller.connection]
        self._waiting[caller.group] -= 1
        if not self._waiting[caller.group]:
            del self._waiting[caller.group]


class _Handler(RequestHandler):
    """Makes an association of a connection, with providers that wait instead of polling."""

    server: _Server

    def __init__(self, caller: _Caller, server: _Server) -> None:
        self._caller = caller
        super().__init__(caller.connection, caller.address, server)

    def handle(self) -> None:
        """Start the association; it is counted before it runs, so that there are never more than may be."""
        association = self._create_association()
        assert self._caller.request is not None
        self.server.service.began(association, self._caller.request)
        try:
            evt.trigger(association, evt.EVT_CONN_OPEN, {"address": self.client_address})
            association.start()
        except Exception:
            self.server.service.failed(association)
            association.dul.socket.free()  # type: ignore[union-attr]  # a _Socket
            raise

    def _create_association(self) -> Association:
        association: Association = super()._create_association()
        association.dul = reactor = _Reactor(association, self.server.service)
        # Both setters pass the value on to the provider's timers.
        association.network_timeout = association.network_timeout
        association.acse_timeout = association.acse_timeout
        association.dimse = _Messages(association, reactor.bell)
        association.set_socket(_Socket(association, self.request, bytes(self._caller.received), self.server.service))
        return association


class _Socket(AssociationSocket):
    """A socket with a buffer, that is ready when a whole PDU has come."""

    #: One of the largest PDUs, which stays in a core's cache between socket and file; room for four is slower.
    _ROOM = MAXIMUM_PDU + 16

    def __init__(self, association: Association, connection: socket.socket, received: bytes, service: Service) -> None:
        self._service = service
        self._bell, self._rope = socket.socketpair()
        for end in (self._bell, self._rope):
            end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)
        self._buffer = memoryview(bytearray(max(self._ROOM, len(received))))
        self._buffer[: len(received)] = received
        self._at, self._end = 0, len(received)
        #: Since when a PDU has been coming that is not whole.
        self._since = time.monotonic()
        self.ended = False
        super().__init__(association, client_socket=connection)

    def wake(self) -> None:
        """End a wait in `ready`, now or to come; from any thread."""
        with suppress(OSError):
            self._rope.send(b"\0")

    @property
    def ready(self) -> bool:
        """Wait for a whole PDU or the end of the stream. False when woken, or when it is time to look round."""
        while self.socket is not None and self._is_connected:
            if self.ended or self.head() is not None:
                return True
            if self._at == self._end or (self._at and self._end == len(self._buffer)):
                self._buffer[: self._end - self._at] = self._buffer[self._at : self._end]
                self._at, self._end = 0, self._end - self._at
            try:
                count = self.socket.recv_into(self._buffer[self._end :])
            except BlockingIOError:
                if not self._wait():
                    return self.ended
            except OSError:
                self.ended = True
            else:
                if self._at == self._end:
                    self._since = time.monotonic()
                self._end += count
                self.ended = not count
        return False

    def head(self) -> tuple[int, int] | None:
        """Type and length of the PDU that is next, when it has come whole or is longer than may be."""
        if self._end - self._at < _HEAD.size:
            return None
        kind, _, length = _HEAD.unpack_from(self._buffer, self._at)
        whole = self._end - self._at >= _HEAD.size + length or length > MAXIMUM_PDU
        return (kind, length) if whole else None

    def take(self, count: int) -> memoryview:
        """The next bytes, valid until the next call of `ready`."""
        taken = self._buffer[self._at : min(self._at + count, self._end)]
        self._at += len(taken)
        self._since = time.monotonic()
        return taken

    def recv(self, nr_bytes: int) -> bytearray:
        """The next bytes; fewer when the stream has ended."""
        return bytearray(self.take(nr_bytes))

    def send(self, bytestream: bytes) -> None:
        """Send all, waiting for the peer to take it for as long as the network timeout."""
        rest = memoryview(bytestream)
        try:
            while rest and self.socket is not None:
                try:
                    rest = rest[self.socket.send(rest) :]
                except BlockingIOError:
                    taken = select.poll()
                    taken.register(self.socket, select.POLLOUT)
                    if not taken.poll((self.assoc.network_timeout or 60.0) * 1000):
                        raise TimeoutError from None
        except (OSError, ValueError):
            self.event_queue.put("Evt17")

    def linger(self) -> None:
        """Discard what still comes until the peer closes: closing first could take from it what it has not yet read."""
        until = time.monotonic() + _LINGER_S
        with suppress(OSError):
            while self.socket is not None and not self.ended and (left := until - time.monotonic()) > 0:
                if self._poll.poll(left * 1000):
                    with suppress(BlockingIOError):
                        self._bell.recv(64)
                    with suppress(BlockingIOError):
                        self.ended = not self.socket.recv_into(self._buffer)

    def free(self) -> None:
        """Let the file descriptors go; the reactor has ended."""
        self._shutdown_socket()
        for end in (self._bell, self._rope):
            end.close()

    def _wait(self) -> bool:
        """Whether there is something to be read."""
        wait = _LOOK_ROUND_S
        if self._end > self._at:
            # A PDU that has begun must come to its end: one that comes byte by byte would stay for ever.
            wait = min(wait, self._since + (self.assoc.network_timeout or 60.0) - time.monotonic())
            if wait <= 0:
                self._service.quota.warning(
                    "association closed",
                    shown(self.assoc.requestor.address or ""),
                    reason="a PDU was begun and not sent to its end",
                    mend="look at the sender and the network between",
                )
                self.ended = True
                return False
        ready = [descriptor for descriptor, _ in self._poll.poll(wait * 1000)]
        if self._bell.fileno() in ready:
            with suppress(BlockingIOError):
                self._bell.recv(64)
            return False
        return bool(ready)

    def _shutdown_socket(self) -> None:
        connection = self.socket
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class _Reactor(DULServiceProvider):
    """The DUL service provider; what comes as P-DATA is taken here and not by the state machine."""

    socket: _Socket | None

    def __init__(self, association: Association, service: Service) -> None:
        super().__init__(association)
        self._run_loop_delay = 0
        self.daemon = True
        self._service = service
        #: Rung for the association's thread: something is there for it.
        self.bell = threading.Event()
        self.to_user_queue = _BellQueue(self.bell)
        self.incoming: Incoming | None = None
        self._request: _Elements = {}
        #: The presentation context of the message that is coming.
        self._context_id: int | None = None
        self._command = bytearray()
        #: What was read of an instance and not yet passed on.
        self._fragments: list[memoryview] = []
        #: Bytes of the data set of a message that pynetdicom takes; None while none is due.
        self._other: int | None = None
        self._storing = False

    def run_reactor(self) -> None:
        """Until the connection has ended."""
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
                self._warn("connection closed", reason="an association request is malformed", mend=_SENDERS_FAULT)
                self.to_user_queue.put(None)
            self.bell.set()

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
        self.bell.set()

    def idle_timer_expired(self) -> bool:
        """Whether the peer has been silent for too long; time that we take to store is not the peer's."""
        return not self._storing and bool(super().idle_timer_expired())

    def _is_transport_event(self) -> bool:
        if self.state_machine.current_state == "Sta13" and self.socket is not None:
            self.socket.linger()
            self.socket.close()
            return True
        heard = False
        # What comes as P-DATA is done with when it has been read; the loop, which sleeps a little in each round and
        # lets another thread have the interpreter, has nothing to do until something else comes or is to be sent.
        while self.event_queue.empty() and self.to_provider_queue.empty() and not self._kill_thread:
            if self.socket is None or not self.socket.ready:
                break
            self._read_pdu_data()
            self._idle_timer.restart()
            heard = True
        return heard

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
            if length > MAXIMUM_PDU and kind != _ASSOCIATE_RQ:  # whose length the server has checked
                limit = f"a PDU of type {kind} is longer than {MAXIMUM_PDU} bytes"
                return self._refuse(limit, "the sender ignores the maximum length that was negotiated")
            if self.state_machine.current_state != "Sta6":
                break
            if kind in (_RELEASE_RQ, _ABORT):
                break
            if kind != _P_DATA_TF:
                return self._refuse(f"a PDU of type {kind} came where none may come", _SENDERS_FAULT)
            try:
                self._take(connection.take(_HEAD.size + length)[_HEAD.size :])
            except _Invalid as fault:
                return self._refuse(str(fault), _SENDERS_FAULT)
            except Exception as error:  # pynetdicom's, of a command set that it cannot decode
                return self._refuse(f"a request cannot be decoded ({type(error).__name__})", _SENDERS_FAULT)
            if not self.to_provider_queue.empty():
                return None
        else:
            if not connection.ended:
                return None
        return super()._read_pdu_data()

    def _refuse(self, reason: str, mend: str) -> None:
        """Abort the association (AA-8, PS3.8 table 9-10)."""
        self._warn("association aborted", calling_ae=ae_title(self.assoc.requestor.ae_title), reason=reason, mend=mend)
        self.event_queue.put("Evt19")

    def _warn(self, event: str, **fields: Any) -> None:
        self._service.quota.warning(event, shown(self.assoc.requestor.address or ""), **fields)

    def _take(self, pdu: memoryview) -> None:
        """Presentation data values (PS3.8 9.3.5.1), each a fragment of a command or of its data set (annex E.2)."""
        at = 0
        while at < len(pdu):
            if len(pdu) - at < _PDV.size:
                raise _Invalid("a PDU ends within the head of a presentation data value")
            length, context_id, control = _PDV.unpack_from(pdu, at)
            if length < 2 or at + 4 + length > len(pdu):
                raise _Invalid("a presentation data value is longer than its PDU, or has no head")
            fragment, last = pdu[at + _PDV.size : at + 4 + length], bool(control & 2)
            at += 4 + length
            if self._context_id is None:
                self._context_id = context_id
            if context_id != self._context_id:
                raise _Invalid("a message changes its presentation context")
            if control & 1:
                self._take_command(fragment, last)
            elif self.incoming is not None:
                self._take_instance(self.incoming, fragment, last)
            elif self._other is not None:
                self._take_other(fragment, last)
            else:
                raise _Invalid("a data set comes without a command")

    def _take_command(self, fragment: memoryview, last: bool) -> None:
        if self.incoming is not None or self._other is not None:
            raise _Invalid("a command comes before the end of the data set of the one before")
        self._command += fragment
        if len(self._command) > MAXIMUM_COMMAND:
            raise _Invalid("a command set is too long")
        if not last:
            return
        command, self._command = bytes(self._command), bytearray()
        elements = _elements(command)
        has_data = elements.get(_DATA_SET_TYPE, b"") != _NO_DATA_SET
        if elements.get(_COMMAND_FIELD) == _C_STORE_RQ:
            context = self.assoc._accepted_cx.get(self._context_id or 0)
            if context is None:
                raise _Invalid("the presentation context is not one that was accepted")
            self._request = elements
            request = StoreRequest(
                _uid(elements, _SOP_CLASS),
                _uid(elements, _SOP_INSTANCE),
                str(context.abstract_syntax),
                str(context.transfer_syntax[0]),
            )
            self.incoming = self._service.begin(self.assoc, request)
            if not has_data:
                self._take_instance(self.incoming, memoryview(b""), True)
            return
        if self.assoc.dimse.msg_queue.qsize() >= MAXIMUM_UNANSWERED:
            raise _Invalid("more requests come than are answered")
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
        self.socket.send(_store_response(self._context_id, self._request, status, comment))
        self._context_id = None

    def _pass_on(self) -> None:
        """Write what has come of an instance, at one go: each call lets another thread have the interpreter."""
        fragments, self._fragments = self._fragments, []
        if fragments and self.incoming is not None:
            self.incoming.write(fragments)

    def _take_other(self, fragment: memoryview, last: bool) -> None:
        """The data set of a request that pynetdicom serves."""
        self._other = (self._other or 0) + len(fragment)
        if self._other > MAXIMUM_COMMAND:
            raise _Invalid("the data set of a request other than C-STORE is too long")
        self._give(2 if last else 0, bytes(fragment))
        if last:
            self._other = self._context_id = None

    def _give(self, control: int, fragment: bytes) -> None:
        primitive = P_DATA()
        assert self._context_id is not None
        value = [self._context_id, bytes((control,)) + fragment]
        primitive.presentation_data_value_list = [value]  # type: ignore[list-item]  # it takes lists only
        self.assoc.dimse.receive_primitive(primitive)


class _BellQueue(queue.Queue[Any]):
    """A queue that says when something is put into it."""

    def __init__(self, bell: threading.Event) -> None:
        super().__init__()
        self._bell = bell

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put, and ring."""
        super().put(item, block, timeout)
        self._bell.set()


class _Messages(DIMSEServiceProvider):
    """The DIMSE service provider; the association's thread, which asks it for messages, waits here."""

    def __init__(self, association: Association, bell: threading.Event) -> None:
        super().__init__(association)
        self._bell = bell
        self.msg_queue = _BellQueue(bell)

    def get_msg(self, block: bool = False) -> Any:
        """The next message, if any, once something has happened that the association's thread must look at."""
        if not block and self.msg_queue.empty():
            self._bell.wait(_LOOK_ROUND_S)
            self._bell.clear()
        return super().get_msg(block)


_SENDERS_FAULT = "a fault of the sender; its maker has to mend it"

#: PDU type, reserved, length of what follows (PS3.8 9.3.1).
_HEAD = struct.Struct(">BBL")
#: A-ASSOCIATE-RQ up to its variable items: version, reserved, called and calling AE title, reserved (PS3.8 table 9-11).
_FIXED = struct.Struct(">HH16s16s32x")
#: A-ASSOCIATE-RJ: type, reserved, length, reserved, result, source, reason (PS3.8 table 9-21).
_ASSOCIATE_RJ = struct.Struct(">BBLBBBB")
#: Item type, reserved, length (PS3.8 9.3.2).
_ITEM = struct.Struct(">BBH")
_PRESENTATION_CONTEXT, _USER_INFORMATION = 0x20, 0x50
#: Item length, presentation context ID, message control header (PS3.8 9.3.5.1, E.2).
_PDV = struct.Struct(">LBB")
_ASSOCIATE_RQ, _P_DATA_TF, _RELEASE_RQ, _ABORT = 0x01, 0x04, 0x05, 0x07
#: A-ABORT by the service provider, unexpected PDU (PS3.8 table 9-26).
_ABORT_UNEXPECTED = b"\x07\0\0\0\0\x04\0\0\x02\x02"


def _asked(caller: _Caller) -> AssociationRequest:
    """Who asks, from the fixed part of the request, in which NULs that fill an AE title up become spaces.

    Spaces at either end do not count (PS3.5 6.2), and NULs, which some senders fill up with, mean no more.
    """
    _, _, called, calling = _FIXED.unpack_from(caller.received, _HEAD.size)
    called, calling = (title.rstrip(b"\0 ").lstrip(b" ") for title in (called, calling))
    caller.received[_HEAD.size + 4 : _HEAD.size + 36] = called.ljust(16) + calling.ljust(16)
    try:
        own = shown(str(caller.connection.getsockname()[0]))
    except OSError:
        own = ""
    return AssociationRequest(called.decode("latin-1"), calling.decode("latin-1"), shown(str(caller.address[0])), own)


def _fault(request: memoryview) -> str:
    """Why no association is made of a request; empty when one may be. It looks at no more than the heads of items."""
    contexts = count = user = 0
    try:
        for kind, item in _items(request[_FIXED.size :]):
            count += 1
            contexts += kind == _PRESENTATION_CONTEXT
            parts = {_PRESENTATION_CONTEXT: item[4:], _USER_INFORMATION: item}.get(kind)
            for _ in _items(parts) if parts is not None else ():
                count += 1
                user += kind == _USER_INFORMATION
                if count > MAXIMUM_ITEMS or user > MAXIMUM_USER_ITEMS or contexts > MAXIMUM_CONTEXTS:
                    return "an association request has more presentation contexts or items than any sender needs"
            if count > MAXIMUM_ITEMS:
                return "an association request has more items than any sender needs"
    except _Invalid:
        return "an association request is malformed"
    return ""


def _items(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and value of each item (PS3.8 9.3.2)."""
    at = 0
    while at < len(body):
        if len(body) - at < _ITEM.size:
            raise _Invalid("an item ends within its head")
        kind, _, length = _ITEM.unpack_from(body, at)
        at += _ITEM.size + length
        if at > len(body):
            raise _Invalid("an item is longer than what holds it")
        yield kind, body[at - length : at]


_Elements = dict[int, bytes]
#: Elements of group 0000 (PS3.7 9.3.1).
_SOP_CLASS, _COMMAND_FIELD, _MESSAGE_ID, _REPLY_TO, _DATA_SET_TYPE = 0x0002, 0x0100, 0x0110, 0x0120, 0x0800
_STATUS, _ERROR_COMMENT, _SOP_INSTANCE = 0x0900, 0x0902, 0x1000
_C_STORE_RQ, _C_STORE_RSP, _NO_DATA_SET = b"\x01\0", b"\x01\x80", b"\x01\x01"


def _elements(command: bytes) -> _Elements:
    """Elements of a command set, which is Implicit VR Little Endian (PS3.7 6.3.1)."""
    found, at = {}, 0
    while at < len(command):
        if len(command) - at < 8:
            raise _Invalid("a command set ends within an element")
        group, element, length = struct.unpack_from("<HHL", command, at)
        if group or at + 8 + length > len(command):
            raise _Invalid("a command set holds something that is no command element")
        found[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def _uid(elements: _Elements, element: int) -> str:
    return elements.get(element, b"").decode("ascii", "replace").rstrip("\0 ")


def _store_response(context_id: int, request: _Elements, status: int, comment: str) -> bytes:
    """A C-STORE-RSP (PS3.7 9.3.1.2) in a P-DATA-TF PDU of its own."""
    text = comment.encode("ascii", "replace")[:64]  # VR LO
    elements = {
        _SOP_CLASS: request.get(_SOP_CLASS, b""),
        _COMMAND_FIELD: _C_STORE_RSP,
        _REPLY_TO: request.get(_MESSAGE_ID, b"\0\0"),
        _DATA_SET_TYPE: _NO_DATA_SET,
        _STATUS: struct.pack("<H", status),
        **({_ERROR_COMMENT: text + b" " * (len(text) % 2)} if text else {}),
        _SOP_INSTANCE: request.get(_SOP_INSTANCE, b""),
    }
    body = b"".join(struct.pack("<HHL", 0, n, len(value)) + value for n, value in elements.items())
    body = struct.pack("<HHLL", 0, 0, 4, len(body)) + body
    return _HEAD.pack(_P_DATA_TF, 0, len(body) + _PDV.size) + _PDV.pack(len(body) + 2, context_id, 3) + body
