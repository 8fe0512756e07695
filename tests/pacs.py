"""A PACS that misbehaves as told: what Orthanc cannot be made to do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from conftest import free_port
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage,
    CTImageStorage,
    SegmentationStorage,
    StorageCommitmentPushModel,
    Verification,
)

from node.config import Peer

CLASSES = (CTImageStorage, SegmentationStorage, Comprehensive3DSRStorage)

#: How it answers a commitment request: at once on the same association, later to our listener, or never.
Answer = Literal["same", "later", "never"]


@dataclass
class BadPacs:
    """Takes objects unless told otherwise; change the fields while it runs."""

    port: int = field(default_factory=free_port)
    #: Called with the number of the C-STORE, from 1, and the SOP instance UID; gives the status.
    on_store: Callable[[int, str], int] = lambda _n, _uid: 0x0000
    #: Bytes on a connection after which it is closed.
    cut_after: int | None = None
    answer: Answer = "never"
    #: Status of the answer to N-ACTION; None for no answer but an A-ABORT.
    takes_on: int | None = 0x0000
    #: Whether it rejects associations that propose storage commitment.
    rejects_commitment: bool = False
    #: Called with the SOP instance UIDs of a request; gives those that failed, with reasons.
    fails: Callable[[list[str]], dict[str, int]] = lambda _uids: {}
    #: Where reports go that come later.
    listener: tuple[str, int] | None = None
    stored: list[str] = field(default_factory=list)
    associations: int = 0
    #: (transaction UID, SOP instance UIDs) of each request.
    requests: list[tuple[str, list[str]]] = field(default_factory=list)
    server: Any = None
    _stores: int = 0
    _bytes: dict[Any, int] = field(default_factory=dict)

    def peer(self, **more: Any) -> Peer:
        return Peer(ae_title="BAD", host="127.0.0.1", port=self.port, **more)

    def drop_all(self) -> None:
        """Close the connections that are open, without a word."""
        for association in self.server.active_associations:
            association.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    def handle_store(self, event: Any) -> int:
        if self._is_cut(event.assoc):  # what lay in the socket's buffer when it was closed can still be read
            return 0xA700
        self._stores += 1
        uid = str(event.request.AffectedSOPInstanceUID)
        status = self.on_store(self._stores, uid)
        if status in (0x0000, 0xB000):
            self.stored.append(uid)
        return status

    def handle_data(self, event: Any) -> None:
        was_cut = self._is_cut(event.assoc)
        self._bytes[event.assoc] = self._bytes.get(event.assoc, 0) + len(event.data)
        if self._is_cut(event.assoc) and not was_cut:
            event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    def _is_cut(self, association: Any) -> bool:
        return self.cut_after is not None and self._bytes.get(association, 0) > self.cut_after

    def handle_requested(self, event: Any) -> None:
        proposed = {cx.abstract_syntax for cx in event.assoc.requestor.primitive.presentation_context_definition_list}
        if self.rejects_commitment and StorageCommitmentPushModel in proposed:
            event.assoc.acse.send_reject(1, 1, 1)
            event.assoc.kill()

    def handle_established(self, _event: Any) -> None:
        self.associations += 1

    def handle_action(self, event: Any) -> tuple[int, None]:
        request = event.action_information
        uids = [str(item.ReferencedSOPInstanceUID) for item in request.ReferencedSOPSequence]
        self.requests.append((str(request.TransactionUID), uids))
        if self.takes_on is None:
            event.assoc.abort()
            return 0x0110, None
        if self.takes_on == 0x0000 and self.answer != "never":
            threading.Timer(0.2, self.report, (request, event.assoc if self.answer == "same" else None)).start()
        return self.takes_on, None

    def report(self, request: Dataset, assoc: Any = None) -> int:
        """Send the N-EVENT-REPORT for a request; gives the status that comes back."""
        failed = self.fails([str(item.ReferencedSOPInstanceUID) for item in request.ReferencedSOPSequence])
        said = Dataset()
        said.TransactionUID = request.TransactionUID
        said.ReferencedSOPSequence = []
        said.FailedSOPSequence = []
        for item in request.ReferencedSOPSequence:
            if item.ReferencedSOPInstanceUID in failed:
                item.FailureReason = failed[item.ReferencedSOPInstanceUID]
                said.FailedSOPSequence.append(item)
            else:
                said.ReferencedSOPSequence.append(item)
        if not failed:
            del said.FailedSOPSequence
        own = None
        if assoc is None:
            assert self.listener is not None
            entity = AE(ae_title="BAD")
            entity.add_requested_context(StorageCommitmentPushModel)
            own = assoc = entity.associate(
                *self.listener, ae_title="LUNGNODE", ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)]
            )
            assert assoc.is_established
        where = (StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")
        status, _ = assoc.send_n_event_report(said, 2 if failed else 1, *where)
        if own is not None:
            own.release()
        return int(status.Status)


@contextmanager
def bad_pacs(
    pacs: BadPacs | None = None, classes: Sequence[str] = CLASSES, only: Sequence[str] = (), commits: bool = True
) -> Iterator[BadPacs]:
    """One that listens; `classes` are taken, and only from the AE titles of `only` if there are any."""
    pacs = pacs or BadPacs()
    entity = AE(ae_title="BAD")
    entity.require_calling_aet = list(only)
    entity.add_supported_context(Verification)
    if commits:
        entity.add_supported_context(StorageCommitmentPushModel)
    for uid in classes:
        entity.add_supported_context(uid, ExplicitVRLittleEndian)
    handlers = [
        (evt.EVT_C_STORE, pacs.handle_store),
        (evt.EVT_DATA_RECV, pacs.handle_data),
        (evt.EVT_REQUESTED, pacs.handle_requested),
        (evt.EVT_ESTABLISHED, pacs.handle_established),
        (evt.EVT_N_ACTION, pacs.handle_action),
    ]
    server = entity.start_server(("127.0.0.1", pacs.port), block=False, evt_handlers=handlers)
    pacs.server = server
    try:
        yield pacs
    finally:
        server.shutdown()
        for association in server.active_associations:
            association.abort()
