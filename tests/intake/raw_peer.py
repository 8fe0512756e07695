"""A DICOM peer made of bytes, which can break every rule: PS3.8 PDUs and PS3.7 commands by hand."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian


def request(
    called: str = "LUNGNODE",
    calling: str = "CT1",
    sop_class: str = CTImageStorage,
    transfer_syntax: str = ExplicitVRLittleEndian,
) -> bytes:
    """A-ASSOCIATE-RQ with one presentation context (PS3.8 9.3.2)."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(body)) + body

    context = b"\x01\0\0\0" + item(0x30, sop_class.encode()) + item(0x40, transfer_syntax.encode())
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3")
    body = struct.pack(">HH", 1, 0) + called.ljust(16).encode() + calling.ljust(16).encode() + bytes(32)
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, context) + item(0x50, user)
    return pdu(1, body)


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBL", kind, 0, len(body)) + body


def pdv(control: int, fragment: bytes, context_id: int = 1) -> bytes:
    """A presentation data value (PS3.8 9.3.5.1)."""
    return struct.pack(">LBB", len(fragment) + 2, context_id, control) + fragment


def store_command(instance: str, sop_class: str = CTImageStorage, field: int = 1, data: int = 0) -> bytes:
    """C-STORE-RQ (PS3.7 9.3.1.1); `data` 0x0101 says that no data set follows."""
    elements = {
        0x0002: sop_class.encode(),
        0x0100: struct.pack("<H", field),
        0x0110: struct.pack("<H", 1),
        0x0700: struct.pack("<H", 0),
        0x0800: struct.pack("<H", data),
        0x1000: instance.encode(),
    }
    padded = {n: value + b"\0" * (len(value) % 2) for n, value in elements.items()}
    body = b"".join(struct.pack("<HHL", 0, n, len(value)) + value for n, value in padded.items())
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def store(instance: str, dataset: bytes, size: int = 16000) -> bytes:
    """PDUs of a C-STORE."""
    parts = [dataset[at : at + size] for at in range(0, len(dataset), size)] or [b""]
    data = [pdu(4, pdv(2 if n == len(parts) - 1 else 0, part)) for n, part in enumerate(parts)]
    return b"".join([pdu(4, pdv(3, store_command(instance))), *data])


RELEASE = pdu(5, bytes(4))


class RawPeer:
    """A connection, and what came over it."""

    def __init__(self, port: int, timeout: float = 10.0, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout, source_address=(source, 0))

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def associate(self, **changes: str) -> int:
        """Type of the PDU that answers: 2 accepted, 3 rejected."""
        self.socket.sendall(request(**changes))
        return self.answer()[0]

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def answer(self) -> tuple[int, bytes]:
        """The next PDU; (0, b"") when the connection is closed."""
        head = self._read(6)
        if len(head) < 6:
            return 0, b""
        return head[0], self._read(int.from_bytes(head[2:], "big"))

    def status(self) -> int | None:
        """Status of the next DIMSE response; None for an abort or the end of the connection."""
        kind, body = self.answer()
        if kind != 4:
            return None
        at, elements = 6, body
        while at < len(elements):
            _, element, length = struct.unpack_from("<HHL", elements, at)
            if element == 0x0900:
                return int(struct.unpack_from("<H", elements, at + 8)[0])
            at += 8 + length
        return None

    def _read(self, count: int) -> bytes:
        got = b""
        try:
            while len(got) < count and (more := self.socket.recv(count - len(got))):
                got += more
        except ConnectionError:
            return b""
        return got
