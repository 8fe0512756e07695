"""One C-STORE: an instance on its way from an association to the spool and the assembly, and the answer."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from node.images.elements import HeaderError
from node.intake.assembly import Assembly, AssociationId
from node.intake.header import InstanceHeader, read_header
from node.intake.part import Part, SpoolFullError
from node.intake.spool import Spool
from node.intake.transport.service import StoreRequest
from node.paths import InvalidUIDError
from node.telemetry.logs import plainly
from node.telemetry.quota import LogQuota

# C-STORE statuses (PS3.4 table B.2-1; PS3.7 9.1.1.1.9 and annex C).
SUCCESS: Final = 0x0000
#: Warning, Coercion of Data Elements: what is stored has other values than what was sent. Answered to an instance that
#: is here already with other content. The first is kept, so that results which refer to it stay true; a success would
#: claim that the bytes just sent are safe, and archives that correct patient data and send the study again would retry
#: a failure endlessly.
COERCED: Final = 0xB000
#: Failure, Refused: Out of Resources. Senders try again later.
OUT_OF_RESOURCES: Final = 0xA700
#: Failure, Error: Data Set Does Not Match SOP Class; here also for an instance UID unlike that of the request.
MISMATCH: Final = 0xA900
#: Failure, Error: Cannot Understand.
CANNOT_UNDERSTAND: Final = 0xC000
#: Failure, Processing Failure (PS3.7 C.5.6): a fault of ours. The sender keeps its copy.
PROCESSING_FAILURE: Final = 0x0110

#: Bytes of an instance that are held in memory: they hold its header, which says what series lacks it when it
#: cannot be stored.
_HEAD: Final = 64 * 1024


class IncomingInstance:
    """An instance on its way from an association to the spool and the assembly."""

    def __init__(
        self,
        spool: Spool,
        assembly: Assembly,
        association: AssociationId,
        request: StoreRequest,
        is_over: Callable[[], bool],
        quota: LogQuota,
    ) -> None:
        self._spool = spool
        self._assembly = assembly
        self._quota = quota
        self._association = association
        self._request = request
        #: Whether the association has ended before the instance did: `Listener.stop` may abort it.
        self._is_over = is_over
        self._part: Part | None = None
        #: Why the instance cannot be stored.
        self._failed: Exception | None = None
        #: Its first bytes.
        self._head = bytearray()
        try:
            self._part = spool.begin(
                sop_uid=request.sop_instance_uid,
                sop_class_uid=request.sop_class_uid,
                transfer_syntax_uid=request.transfer_syntax,
                calling_ae=association.calling_ae,
                called_ae=association.called_ae,
            )
        except (OSError, InvalidUIDError) as error:
            self._failed = error

    def write(self, fragments: Sequence[memoryview]) -> None:
        """Take the next bytes; once storing has failed they are discarded, as the answer can only come at the end."""
        for fragment in fragments:
            if len(self._head) < _HEAD:
                self._head += fragment[: _HEAD - len(self._head)]
        if self._part is not None:
            try:
                self._part.write(*fragments)
            except OSError as error:
                self._failed = error
                self.drop()

    def drop(self) -> None:
        """Leave nothing on disk."""
        part, self._part = self._part, None
        if part is not None:
            with suppress(OSError):
                part.drop()

    def end(self) -> tuple[int, str]:
        """Store, and return the C-STORE status with its Error Comment."""
        try:
            return self._store()
        except Exception as error:
            # Whatever it was, the sender must learn that its copy is the only one.
            self._error("C-STORE failed", error=plainly(error))
            return PROCESSING_FAILURE, "not stored: internal error"
        finally:
            self.drop()
            if self._is_over():
                # The assembly must not wait for what has ended.
                self._assembly.association_ended(self._association, "aborted")

    def _store(self) -> tuple[int, str]:
        request = self._request
        try:
            if self._part is None:
                return self._refused(self._failed)
            header = self._header(self._part)
            if mismatch := _mismatch(header, request):
                hint = "the sender's object and request differ; its manufacturer has to correct it"
                self._warn("C-STORE refused", status="A900", reason=mismatch, hint=hint)
                return MISMATCH, mismatch
            stored = self._part.keep(header.study_instance_uid, header.series_instance_uid, header.sop_instance_uid)
        except (HeaderError, InvalidUIDError) as error:
            return self._refused(error)
        except OSError as error:
            return self._refused(error)
        self._assembly.received(self._association, header, stored)
        if stored.outcome == "differs":
            hint = "usually none; a corrected study needs UIDs of its own"
            self._warn(
                "kept instance has other content than the one sent",
                sop_instance=header.sop_instance_uid,
                belongs_to=stored.belongs_to or self._association.calling_ae,
                hint=hint,
            )
            return COERCED, "instance known with other content; first one kept"
        return SUCCESS, ""

    def _header(self, part: Part) -> InstanceHeader:
        """The header, for nearly every instance without going back to what was written."""
        try:
            return read_header(self._head, self._request.transfer_syntax, size=part.size)
        except HeaderError:
            return read_header(part.dataset(), self._request.transfer_syntax)

    def _refused(self, error: Exception | None) -> tuple[int, str]:
        if isinstance(error, HeaderError | InvalidUIDError):
            hint = "the sender's object is damaged or not DICOM; its manufacturer has to correct it"
            self._warn("C-STORE refused", status="C000", reason=str(error), hint=hint)
            return CANNOT_UNDERSTAND, str(error)
        with suppress(HeaderError):
            header = read_header(self._head, self._request.transfer_syntax, whole=False)
            owner = self._spool.belongs_to(header.study_instance_uid, header.series_instance_uid)
            if owner in ("", self._association.calling_ae):
                self._assembly.refused(self._association, header)
        if isinstance(error, SpoolFullError):
            hint = "free space, or lower listener.disk_floor_mb; the sender has to send again"
            self._error("C-STORE refused", status="A700", reason=str(error), hint=hint)
            return OUT_OF_RESOURCES, "out of disk space"
        code = errno.errorcode.get(getattr(error, "errno", None) or 0, "unknown")
        hint = "look at the file system of the data folder; the sender has to send again"
        self._error("C-STORE failed", status="0110", error=code, hint=hint)
        return PROCESSING_FAILURE, "not stored: file system error"

    def _warn(self, event: str, **fields: Any) -> None:
        who = self._association
        self._quota.warning(event, who.address, calling_ae=who.calling_ae, number=who.number, **fields)

    def _error(self, event: str, **fields: Any) -> None:
        who = self._association
        self._quota.error(event, who.address, calling_ae=who.calling_ae, number=who.number, **fields)


def _mismatch(header: InstanceHeader, request: StoreRequest) -> str:
    """What of the data set is not what the request and its presentation context say; empty when all is."""
    if header.sop_class_uid != request.sop_class_uid or header.sop_class_uid != request.abstract_syntax:
        return "SOP class of data set and request differ"
    if header.sop_instance_uid != request.sop_instance_uid:
        return "SOP instance of data set and request differ"
    return ""
