"""Accepts connections, and makes an association of each whose A-ASSOCIATE-RQ has come whole and whose sender is let in.

Probes, silent connections, slow writers and strangers cost a socket each, no thread, and their number is bounded.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import selectors
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.transport import AssociationServer, RequestHandler

from node.intake.transport.pdu import ABORT_UNEXPECTED, ASSOCIATE_RJ, ASSOCIATE_RQ, PDU_HEAD
from node.intake.transport.reactor import Messages, Reactor
from node.intake.transport.request import MAXIMUM_REQUEST, REQUEST_HEAD, ae_titles, fault_in
from node.intake.transport.service import Answer, AssociationRequest, Service
from node.intake.transport.sockets import POLL_S, WaitingSocket
from node.network.addresses import group, shown

#: Connections that have not yet asked for an association. Accepting one more closes the oldest of the address that has
#: most of them; a genuine peer sends its request immediately, and nobody pushes others out. Peers behind one gateway
#: share an address, so it may have all of them while nobody else wants any.
MAXIMUM_PENDING: Final = 256


@dataclass(eq=False)
class _Pending:
    """A connection that has not yet asked for an association."""

    connection: socket.socket
    address: Any
    since: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    #: Bytes that have come, also those that were not kept.
    count: int = 0
    #: Who asks, once the head of the request has come.
    request: AssociationRequest | None = None
    #: How it will be rejected when its request has come whole.
    answer: Answer | None = None

    @functools.cached_property
    def group(self) -> str:
        """The addresses that it is counted with."""
        return group(str(self.address[0]))


class Server(AssociationServer):
    """Accepts connections, and makes an association of each whose A-ASSOCIATE-RQ has come whole."""

    request_queue_size = 256

    def __init__(self, *arguments: Any, service: Service, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.service = service
        self._woken, self._waker = socket.socketpair()
        self._stopping = False
        self._stopped = threading.Event()
        self._pending: dict[socket.socket, _Pending] = {}
        self._pending_of_group: Counter[str] = Counter()

    def serve_forever(self, poll_interval: float = POLL_S) -> None:
        """Serve until `shutdown`."""
        try:
            with selectors.DefaultSelector() as selector:
                self._selector = selector
                listening = self.socket
                assert listening is not None
                listening.setblocking(False)
                selector.register(listening, selectors.EVENT_READ)
                selector.register(self._woken, selectors.EVENT_READ)
                while not self._stopping:
                    for key, _ in selector.select(poll_interval):
                        if key.fileobj is listening:
                            self._accept()
                        elif key.fileobj is not self._woken and key.fileobj in self._pending:
                            self._receive(self._pending[key.fileobj])
                    self._close_overdue()
                for pending in list(self._pending.values()):
                    self._close(pending)
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """Accept nothing more; associations go on."""
        self._stopping = True
        self._waker.send(b"\0")
        self._stopped.wait()
        self.server_close()
        self._woken.close()
        self._waker.close()

    def _accept(self) -> None:
        # A burst is accepted in parts, so that connections accepted earlier are read meanwhile.
        for _ in range(64):
            try:
                connection, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the peer is gone again
                self._close_oldest("no file descriptor is left")
                if not self._pending:
                    time.sleep(0.1)  # all are associations, which need theirs
                    return
                continue
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._pending) >= MAXIMUM_PENDING:
                self._close_oldest("too many connections that ask for no association")
            self._pending[connection] = pending = _Pending(connection, address)
            self._pending_of_group[pending.group] += 1
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, pending: _Pending) -> None:
        try:
            data = pending.connection.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            return self._close(pending)  # a probe: connected, and that was it
        pending.count += len(data)
        if pending.answer is None:
            pending.received += data
        if len(pending.received) < PDU_HEAD.size:
            return None
        kind, _, length = PDU_HEAD.unpack_from(pending.received)
        if kind != ASSOCIATE_RQ or not REQUEST_HEAD.size <= length <= MAXIMUM_REQUEST:
            return self._abort(pending, "what came is no DICOM association request, or one that is too long")
        if pending.request is None and len(pending.received) >= PDU_HEAD.size + REQUEST_HEAD.size:
            pending.request = _request_of(pending)
            pending.answer = self.service.screen(pending.request)
            if pending.answer is not None:
                del pending.received[PDU_HEAD.size + REQUEST_HEAD.size :]
        if pending.request is None or pending.count < PDU_HEAD.size + length:
            return None
        request = memoryview(pending.received)[PDU_HEAD.size : PDU_HEAD.size + length]
        if pending.answer is None and (fault := fault_in(request)):
            return self._abort(pending, fault)
        # An answer goes out when the request has come whole: a connection that is closed on bytes nobody has read is
        # reset, and takes the answer with it.
        answer = pending.answer or self.service.admit(pending.request)
        if answer is None:
            self._forget(pending)
            self._associate(pending)
            return None
        with suppress(OSError):
            pending.connection.send(ASSOCIATE_RJ.pack(3, 0, 4, 0, *answer))
        return self._close(pending)

    def _abort(self, pending: _Pending, reason: str) -> None:
        with suppress(OSError):
            pending.connection.send(ABORT_UNEXPECTED)
        self._close(pending)
        self._warn(pending, reason)

    def _associate(self, pending: _Pending) -> None:
        try:
            Handler(pending, self)
        except Exception as error:  # such as no more threads; one connection must not end the others
            reason = "no association could be made of it"
            address = shown(str(pending.address[0]))
            self.service.quota.error("connection closed", address, reason=reason, error=type(error).__name__)
            self.shutdown_request(pending.connection)

    def _close_overdue(self) -> None:
        timeout = self.ae.acse_timeout or math.inf
        # In order of arrival, so the first that is in time ends the search.
        now, pending = time.monotonic(), self._pending.values()
        for overdue in list(itertools.takewhile(lambda one: now - one.since > timeout, pending)):
            self._close(overdue)
            self._warn(overdue, f"no association request came within {timeout:g} s")

    def _close_oldest(self, reason: str) -> None:
        """Close the oldest connection of the address that has most of them."""
        if self._pending:
            most = max(self._pending_of_group.values())
            pending = next(one for one in self._pending.values() if self._pending_of_group[one.group] == most)
            self._close(pending)
            self._warn(pending, reason)

    def _warn(self, pending: _Pending, reason: str) -> None:
        hint = "let only DICOM peers reach this port; health checks should send C-ECHO, or connect and close"
        self.service.quota.warning("connection closed", shown(str(pending.address[0])), reason=reason, hint=hint)

    def _close(self, pending: _Pending) -> None:
        self._forget(pending)
        self.shutdown_request(pending.connection)

    def _forget(self, pending: _Pending) -> None:
        self._selector.unregister(pending.connection)
        del self._pending[pending.connection]
        self._pending_of_group[pending.group] -= 1
        if not self._pending_of_group[pending.group]:
            del self._pending_of_group[pending.group]


class Handler(RequestHandler):
    """Makes an association of a connection, with providers that wait instead of polling."""

    server: Server

    def __init__(self, pending: _Pending, server: Server) -> None:
        self._pending = pending
        super().__init__(pending.connection, pending.address, server)

    def handle(self) -> None:
        """Start the association; it is counted before it runs, so that there are never more than may be."""
        association = self._create_association()
        assert self._pending.request is not None
        self.server.service.began(association, self._pending.request)
        try:
            evt.trigger(association, evt.EVT_CONN_OPEN, {"address": self.client_address})
            association.start()
        except Exception:
            self.server.service.failed(association)
            association.dul.socket.free()  # type: ignore[union-attr]  # a WaitingSocket
            raise

    def _create_association(self) -> Association:
        association: Association = super()._create_association()
        association.dul = reactor = Reactor(association, self.server.service)
        # Both setters pass the value on to the provider's timers.
        association.network_timeout = association.network_timeout
        association.acse_timeout = association.acse_timeout
        association.dimse = Messages(association, reactor.activity)
        association.set_socket(
            WaitingSocket(association, self.request, bytes(self._pending.received), self.server.service)
        )
        return association


def _request_of(pending: _Pending) -> AssociationRequest:
    """Who asks, by the head of the request; its padding is set right (`ae_titles`)."""
    called, calling = ae_titles(pending.received)
    try:
        own = shown(str(pending.connection.getsockname()[0]))
    except OSError:
        own = ""
    return AssociationRequest(called, calling, shown(str(pending.address[0])), own)
