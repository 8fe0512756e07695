"""Preamble and File Meta Information of the files that intake writes and reads (PS3.10 7.1).

They are written here and not by pydicom: it is done once for each instance, while its sender waits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from node.images.elements import HeaderError
from node.images.received import LONGEST_META, opened
from node.paths import valid_uid

#: Offset of the first element after the group length, whose own 12 bytes follow preamble and prefix.
META_START = 128 + 4 + 12


def file_meta(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, calling_ae: str, called_ae: str
) -> bytes:
    """Preamble, prefix and File Meta Information (PS3.10 table 7.1-1), which names sender and receiver.

    Raises
    ------
    InvalidUIDError
        A UID is no UID.
    """
    elements = b"".join(
        (
            _element(0x0001, b"OB", b"\0\1"),
            _element(0x0002, b"UI", valid_uid(sop_class_uid).encode()),
            _element(0x0003, b"UI", valid_uid(sop_instance_uid).encode()),
            _element(0x0010, b"UI", valid_uid(transfer_syntax_uid).encode()),
            _element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID.encode()),
            _element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode()),
            # Source and Receiving Application Entity Title.
            _element(0x0016, b"AE", calling_ae.encode("ascii", "replace")[:16]),
            _element(0x0018, b"AE", called_ae.encode("ascii", "replace")[:16]),
        )
    )
    return bytes(128) + b"DICM" + _element(0x0000, b"UL", struct.pack("<L", len(elements))) + elements


def dataset_start(head: bytes) -> int:
    """Offset of the data set in a file that begins with `head`, of `META_START` bytes or more."""
    return META_START + int(struct.unpack_from("<L", head, META_START - 4)[0])


@contextmanager
def described(path: Path) -> Iterator[tuple[int, int, dict[int, str]]]:
    """The open file, where its data set begins, and its File Meta Information by element number.

    Raises
    ------
    HeaderError
        It is no Part 10 file.
    OSError, struct.error
        It cannot be read, or ends within its File Meta Information.
    """
    with opened(path) as file:
        raw = os.pread(file, LONGEST_META, 0)
        if raw[128:132] != b"DICM":
            raise HeaderError("no DICOM file")
        start, at, meta = dataset_start(raw), META_START, dict[int, str]()
        while at < start:
            _, number, vr, length = struct.unpack_from("<HH2sH", raw, at)
            at += 8
            if vr == b"OB":
                length = struct.unpack_from("<L", raw, at)[0]
                at += 4
            meta[number] = raw[at : at + length].decode("ascii", "replace").strip("\0 ")
            at += length
        yield file, start, meta


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    """An element of group 0002, which is always Explicit VR Little Endian (PS3.10 7.1)."""
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    if vr == b"OB":
        return struct.pack("<HH2sHL", 2, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value
