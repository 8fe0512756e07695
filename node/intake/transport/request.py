"""An A-ASSOCIATE-RQ, as far as it is read before pynetdicom parses it (PS3.8 9.3.2).

Who calls whom stands in its first bytes, and counting its items takes no more than a look at their heads: a caller that
is not let in, or that asks for too much, costs no parsing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from node.intake.transport.pdu import PDU_HEAD, InvalidPduError

#: Bytes of an A-ASSOCIATE-RQ. 128 presentation contexts with 40 transfer syntaxes each make some 160 KB.
MAXIMUM_REQUEST: Final = 256 * 1024

#: Presentation contexts of a request: their IDs are the odd numbers of a byte (PS3.8 table 9-13).
MAXIMUM_CONTEXTS: Final = 128

#: Items and sub-items of a request, each of which pynetdicom makes an object of. 128 presentation contexts with 40
#: transfer syntaxes each have 5400.
MAXIMUM_ITEMS: Final = 8192

#: Those of them in its User Information: three kinds of negotiation for each SOP class (PS3.7 D.3.3) are some 400.
MAXIMUM_USER_ITEMS: Final = 1024

#: A-ASSOCIATE-RQ up to its variable items: version, reserved, called and calling AE title, reserved (PS3.8 table 9-11).
REQUEST_HEAD = struct.Struct(">HH16s16s32x")
#: Item type, reserved, length (PS3.8 9.3.2).
_ITEM = struct.Struct(">BBH")
_PRESENTATION_CONTEXT, _USER_INFORMATION = 0x20, 0x50


def ae_titles(received: bytearray) -> tuple[str, str]:
    """Called and calling AE title of a request that begins with `received`, in which NULs at their ends become spaces.

    Spaces at either end do not count (PS3.5 6.2), and NULs, which some senders pad with, mean no more.
    """
    _, _, called, calling = REQUEST_HEAD.unpack_from(received, PDU_HEAD.size)
    called, calling = (title.rstrip(b"\0 ").lstrip(b" ") for title in (called, calling))
    received[PDU_HEAD.size + 4 : PDU_HEAD.size + 36] = called.ljust(16) + calling.ljust(16)
    return called.decode("latin-1"), calling.decode("latin-1")


def fault_in(request: memoryview) -> str:
    """Why a request is not to be parsed, or empty; given without the head of its PDU. Only heads of items are read."""
    contexts = count = user = 0
    try:
        for kind, item in _items(request[REQUEST_HEAD.size :]):
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
    except InvalidPduError:
        return "an association request is malformed"
    return ""


def _items(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and value of each item (PS3.8 9.3.2)."""
    at = 0
    while at < len(body):
        if len(body) - at < _ITEM.size:
            raise InvalidPduError("an item ends within its head")
        kind, _, length = _ITEM.unpack_from(body, at)
        at += _ITEM.size + length
        if at > len(body):
            raise InvalidPduError("an item is longer than what holds it")
        yield kind, body[at - length : at]
