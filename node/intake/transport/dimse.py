"""DIMSE command sets, as far as C-STORE needs them (PS3.7 6.3.1, 9.3.1)."""

from __future__ import annotations

import struct

from node.intake.transport.pdu import P_DATA_TF, PDU_HEAD, PDV, InvalidPduError

#: Elements of a command set by their number in group 0000.
Elements = dict[int, bytes]
#: Elements of group 0000 (PS3.7 9.3.1).
SOP_CLASS, COMMAND_FIELD, MESSAGE_ID, REPLY_TO, DATA_SET_TYPE = 0x0002, 0x0100, 0x0110, 0x0120, 0x0800
STATUS, ERROR_COMMENT, SOP_INSTANCE = 0x0900, 0x0902, 0x1000
C_STORE_RQ, C_STORE_RSP, NO_DATA_SET = b"\x01\0", b"\x01\x80", b"\x01\x01"


def elements_of(command: bytes) -> Elements:
    """Elements of a command set, which is Implicit VR Little Endian (PS3.7 6.3.1)."""
    found, at = {}, 0
    while at < len(command):
        if len(command) - at < 8:
            raise InvalidPduError("a command set ends within an element")
        group, element, length = struct.unpack_from("<HHL", command, at)
        if group or at + 8 + length > len(command):
            raise InvalidPduError("a command set holds something that is no command element")
        found[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def uid_in(elements: Elements, element: int) -> str:
    """A UID without its padding; empty where it is absent."""
    return elements.get(element, b"").decode("ascii", "replace").rstrip("\0 ")


def store_response(context_id: int, request: Elements, status: int, comment: str) -> bytes:
    """A C-STORE-RSP (PS3.7 9.3.1.2) in a P-DATA-TF PDU of its own."""
    text = comment.encode("ascii", "replace")[:64]  # VR LO
    elements = {
        SOP_CLASS: request.get(SOP_CLASS, b""),
        COMMAND_FIELD: C_STORE_RSP,
        REPLY_TO: request.get(MESSAGE_ID, b"\0\0"),
        DATA_SET_TYPE: NO_DATA_SET,
        STATUS: struct.pack("<H", status),
        **({ERROR_COMMENT: text + b" " * (len(text) % 2)} if text else {}),
        SOP_INSTANCE: request.get(SOP_INSTANCE, b""),
    }
    body = b"".join(struct.pack("<HHL", 0, n, len(value)) + value for n, value in elements.items())
    body = struct.pack("<HHLL", 0, 0, 4, len(body)) + body
    return PDU_HEAD.pack(P_DATA_TF, 0, len(body) + PDV.size) + PDV.pack(len(body) + 2, context_id, 3) + body
