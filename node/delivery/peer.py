"""C-STORE of Part 10 files to a peer, as they lie on disk."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from node.images.elements import HeaderError
from node.images.received import read_received
from node.network import associations
from node.network.associations import PeerError, hexadecimal, status_of

#: Bytes a second that a slow line must carry at least: the wait for the answer to an object grows by its size over
#: this, for pynetdicom counts from when it begins to send.
SLOWEST_LINE = 100_000


@dataclass(frozen=True)
class Outgoing:
    """A Part 10 file on its way: what negotiation needs to know of it."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    #: Whether its meta information names the instance. Some anonymisers drop that, and pynetdicom needs it to send a
    #: file straight from disk.
    meta_names_it: bool

    @classmethod
    def below(cls, folder: Path) -> list[Outgoing]:
        """All Part 10 files at or below a path, in the order of their names; what is none is left out."""
        files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        items = []
        for path in files:
            with suppress(InvalidDicomError, HeaderError, AttributeError):
                items.append(cls.read(path))
        return items

    @classmethod
    def read(cls, path: Path) -> Outgoing:
        """Read what a file says of itself.

        Raises
        ------
        InvalidDicomError, HeaderError, AttributeError
            It is not a Part 10 file, is damaged, or names no SOP class, SOP instance or transfer syntax.
        """
        header = read_received(path, ["SOPClassUID", "SOPInstanceUID"])
        meta = header.file_meta
        return cls(
            path,
            str(header.SOPClassUID),
            str(header.SOPInstanceUID),
            str(meta.TransferSyntaxUID),
            "MediaStorageSOPInstanceUID" in meta,
        )


def contexts_for(objects: Iterable[Outgoing]) -> list[PresentationContext]:
    """One context for each pair of SOP class and transfer syntax, so that nothing need be converted."""
    pairs = sorted({(item.sop_class_uid, item.transfer_syntax_uid) for item in objects})
    return [build_context(UID(sop_class), UID(syntax)) for sop_class, syntax in pairs]


class ByAssociation:
    """Sends objects over one open association."""

    def __init__(self, made: Association) -> None:
        self._made = made
        self._proposed = {(c.abstract_syntax, c.transfer_syntax[0]) for c in made.requestor.requested_contexts}

    def carries(self, item: Outgoing) -> bool:
        """Whether a context was proposed for the object, so that this association can tell of its fate."""
        return (item.sop_class_uid, item.transfer_syntax_uid) in self._proposed

    def send(self, item: Outgoing) -> str:
        """`store` it."""
        return store(self._made, item)


def store(open_association: Association, item: Outgoing) -> str:
    """C-STORE one object; gives '' or the peer's warning, raises `PeerError` (status codes: PS3.4 table B.2-1)."""
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in open_association.accepted_contexts}
    if (item.sop_class_uid, item.transfer_syntax_uid) not in accepted:
        kind = UID(item.sop_class_uid).name
        syntax = UID(item.transfer_syntax_uid).name
        raise PeerError(f"the peer does not accept {kind} in {syntax}", permanent=True)
    open_association.dimse_timeout = associations.TIMEOUT_S + item.path.stat().st_size / SLOWEST_LINE
    status = status_of(open_association.send_c_store(item.path if item.meta_names_it else dcmread(item.path)))
    if status is None:
        raise PeerError("no answer to C-STORE", permanent=False, reached=False)
    if status == 0x0000:
        return ""
    # 0x0111: duplicate SOP instance. Our UIDs are derived, so it is this very object, from a push whose bookkeeping was
    # lost.
    if status in (0x0001, 0x0107, 0x0111, 0x0116) or 0xB000 <= status <= 0xBFFF:
        return f"stored with warning {hexadecimal(status)}"
    # 0xA700: out of resources; 0x0110: processing failure; 0x0213: resource limitation. These pass. The rest names
    # something wrong with the object or with our rights, which the same object will meet again.
    passes = 0xA700 <= status <= 0xA7FF or status in (0x0110, 0x0213)
    raise PeerError(f"C-STORE answered {hexadecimal(status)}", permanent=not passes)
