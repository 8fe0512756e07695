"""One instance on its way to disk: bytes in, then a name that is never given twice.

When `Part.keep` has returned, the bytes are under their final name and survive the loss of power: the file was
fsynced, then linked, then the folder was fsynced.

The bytes are synced before they get their name, though that costs the journal two commits. With the name first a loss
of power could leave a file that was never acknowledged under its final name and without its bytes, and its resend would
be answered as if another were kept. On file systems with an ordered journal a single commit would suffice, but the gain
is small: 0.1 of 1.1 ms per slice over one association, and nothing over eight, which share their commits.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from node.files.series_folder import ASIDE, aside
from node.images.elements import FileSpan
from node.intake.file_meta import META_START, dataset_start
from node.paths import valid_uid, within

if TYPE_CHECKING:
    from node.intake.spool import Spool

#: Bytes compared at a time when a resent instance is checked against the one that is kept.
_BLOCK = 1 << 20

#: Bytes of one instance after which the free space is looked at again and what came is synced: the last sync, which the
#: sender waits for, must not have gigabytes to write.
_CHECK_EVERY = 16 << 20

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class SpoolFullError(OSError):
    """There is too little room on disk to keep another instance."""


@dataclass(frozen=True)
class Stored:
    """Where an instance is kept, and how it compares to what was kept before."""

    path: Path
    #: 'new'; 'same' bytes were there already; other bytes were there and have been kept ('differs').
    outcome: Literal["new", "same", "differs"]
    #: AE title that the series belongs to, where another one sent this instance; else empty.
    belongs_to: str = ""

    @property
    def aside(self) -> bool:
        """Whether it is kept beside the series and is no part of it."""
        return self.path.parent.name.startswith(ASIDE)


class Part:
    """An instance on its way in: a temporary file that is kept under its name in the end, or leaves nothing.

    Memory does not grow with the instance. For one thread at a time.
    """

    def __init__(self, spool: Spool, path: Path, meta: bytes, sender: str) -> None:
        self._spool = spool
        self._path = path
        self._sender = sender
        self._start = len(meta)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        #: Bytes of the data set so far.
        self.size = 0
        self._unwritten: tuple[bytes, ...] = (meta,)
        self._unchecked = 0

    def write(self, *fragments: bytes | bytearray | memoryview) -> None:
        """Append bytes of the data set, at most 1000 fragments of it.

        Raises
        ------
        SpoolFullError
            The floor is reached or the filesystem is full.
        OSError
            The filesystem failed otherwise.
        """
        count = sum(map(len, fragments))
        self._unchecked += count
        if self._unchecked >= _CHECK_EVERY:
            self._unchecked = 0
            self._spool.require_room()
            os.fsync(self._file)
        rest = [*self._unwritten, *fragments]
        self._unwritten = ()
        try:
            while rest:
                written = os.writev(self._file, rest)
                while rest and written >= len(rest[0]):
                    written -= len(rest.pop(0))
                if written:
                    rest[0] = memoryview(rest[0])[written:]
        except OSError as error:
            raise disk_error(error) from error
        self.size += count

    def dataset(self) -> FileSpan:
        """The data set as far as it was written."""
        return FileSpan(self._file, self._start, self.size)

    def keep(self, study_uid: str, series_uid: str, sop_uid: str) -> Stored:
        """Give the instance its name; durable when this returns.

        Safe to call from several threads, each with a part of its own, also for one and the same instance. What is
        kept is never overwritten.

        Raises
        ------
        InvalidUIDError
            A UID is not digits and dots, or too long: it could not be a path, nor be sent on.
        SpoolFullError
            The filesystem is full.
        OSError
            The filesystem failed otherwise. Nothing is left behind after any of the three.
        """
        try:
            path = within(self._spool.folder(study_uid, series_uid), f"{valid_uid(sop_uid)}.dcm")
            owner = self._spool.ensure(path.parent, self._sender)
            belongs_to = owner if owner != self._sender else ""
            with suppress(FileNotFoundError):
                return self._kept(path, belongs_to)
            # Again, for it may have been dropped by age a moment ago.
            owner = self._spool.ensure(path.parent, self._sender)
            if belongs_to := owner if owner != self._sender else "":
                path = path.parent / aside(self._sender) / path.name
                self._spool.ensure_aside(path.parent)
            os.fsync(self._file)
            try:
                os.link(self._path, path)
            except FileExistsError:
                return self._kept(path, belongs_to)
            fsync_folder(path.parent)
            return Stored(path, "new", belongs_to)
        except OSError as error:
            raise disk_error(error) from error
        finally:
            self.drop()

    def drop(self) -> None:
        """Leave nothing behind. May be called twice, and after `keep`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)

    def _kept(self, path: Path, belongs_to: str) -> Stored:
        """Compare with what is kept. Another thread may have linked it just now, so its names are brought to disk.

        Raises
        ------
        FileNotFoundError
            Nothing is kept, or it was dropped by age a moment ago.
        """
        with suppress(PermissionError):  # another user's file, of a backup that was restored
            os.utime(path)  # what comes again is as young as what is new (`node.files.retention`)
        same = self._same_as(path)
        fsync_folder(path.parent)
        path.stat()  # still here, and not dropped while it was compared
        return Stored(path, "same" if same else "differs", belongs_to)

    def _same_as(self, path: Path) -> bool:
        return same_dataset(self._file, path)


def same_dataset(descriptor: int, path: Path) -> bool:
    """Whether an open file and the one at `path` have the same data set behind their File Meta Information."""
    mine = dataset_start(os.pread(descriptor, META_START, 0))
    with path.open("rb") as file:
        at = dataset_start(file.read(META_START))
        if os.fstat(file.fileno()).st_size - at != os.fstat(descriptor).st_size - mine:
            return False
        while block := os.pread(descriptor, _BLOCK, mine):
            if os.pread(file.fileno(), len(block), at) != block:
                return False
            at, mine = at + len(block), mine + len(block)
    return True


def disk_error(error: OSError) -> OSError:
    """The error as `SpoolFullError` where it says that there is no room."""
    if error.errno in _FULL and not isinstance(error, SpoolFullError):
        return SpoolFullError(error.errno, "no space left for the instance")
    return error


def fsync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
