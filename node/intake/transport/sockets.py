"""The socket of an association: it waits for whole PDUs instead of polling for them."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from typing import Final

from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from node.intake.transport.pdu import MAXIMUM_PDU, PDU_HEAD
from node.intake.transport.service import Service
from node.network.addresses import shown

#: Seconds after which a wait ends though nothing happened; nothing depends on it.
POLL_S: Final = 1.0

#: Seconds that a peer has to close the connection after a release or an abort.
_LINGER_S: Final = 1.0


class WaitingSocket(AssociationSocket):
    """A socket with a buffer, that is ready when a whole PDU has come."""

    #: One of the largest PDUs, which stays in a core's cache between socket and file; room for four is slower.
    _ROOM = MAXIMUM_PDU + 16

    def __init__(self, association: Association, connection: socket.socket, received: bytes, service: Service) -> None:
        self._service = service
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)
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
            self._waker.send(b"\0")

    @property
    def ready(self) -> bool:
        """Wait for a whole PDU or the end of the stream. False when woken, or after `POLL_S`."""
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
        if self._end - self._at < PDU_HEAD.size:
            return None
        kind, _, length = PDU_HEAD.unpack_from(self._buffer, self._at)
        whole = self._end - self._at >= PDU_HEAD.size + length or length > MAXIMUM_PDU
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
                        self._woken.recv(64)
                    with suppress(BlockingIOError):
                        self.ended = not self.socket.recv_into(self._buffer)

    def free(self) -> None:
        """Let the file descriptors go; the reactor has ended."""
        self._shutdown_socket()
        for end in (self._woken, self._waker):
            end.close()

    def _wait(self) -> bool:
        """Whether there is something to be read."""
        wait = POLL_S
        if self._end > self._at:
            # A PDU that has begun must come to its end: one that comes byte by byte would stay for ever.
            wait = min(wait, self._since + (self.assoc.network_timeout or 60.0) - time.monotonic())
            if wait <= 0:
                self._service.quota.warning(
                    "association closed",
                    shown(self.assoc.requestor.address or ""),
                    reason="a PDU was begun and not sent to its end",
                    hint="look at the sender and the network between",
                )
                self.ended = True
                return False
        ready = [descriptor for descriptor, _ in self._poll.poll(wait * 1000)]
        if self._woken.fileno() in ready:
            with suppress(BlockingIOError):
                self._woken.recv(64)
            return False
        return bool(ready)

    def _shutdown_socket(self) -> None:
        connection = self.socket
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
