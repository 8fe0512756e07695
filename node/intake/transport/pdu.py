"""The fixed parts of the PDUs that are read and written here (PS3.8 9.3)."""

from __future__ import annotations

import struct
from typing import Final

#: Bytes; the largest P-DATA-TF variable field that we take, and the largest that DCMTK sends. Larger brings nothing.
MAXIMUM_PDU: Final = 128 * 1024

#: PDU types (PS3.8 9.3.1).
ASSOCIATE_RQ, P_DATA_TF, RELEASE_RQ, ABORT = 0x01, 0x04, 0x05, 0x07

#: PDU type, reserved, length of what follows (PS3.8 9.3.1).
PDU_HEAD = struct.Struct(">BBL")
#: A-ASSOCIATE-RJ: type, reserved, length, reserved, result, source, reason (PS3.8 table 9-21).
ASSOCIATE_RJ = struct.Struct(">BBLBBBB")
#: Item length, presentation context ID, message control header (PS3.8 9.3.5.1, E.2).
PDV = struct.Struct(">LBB")
#: A-ABORT by the service provider, unexpected PDU (PS3.8 table 9-26).
ABORT_UNEXPECTED = b"\x07\0\0\0\0\x04\0\0\x02\x02"

#: The hint where a peer breaks the protocol.
SENDERS_FAULT = "a fault of the sender, which its manufacturer has to correct"


class InvalidPduError(Exception):
    """A PDU breaks PS3.8 or what was negotiated; the message says how."""
