"""Received instances, durable on disk: root/STUDY/SERIES/SOP.dcm, and beside them when a sender came to an end.

A series belongs to the calling AE title that sent its first instance, whose name is kept beside the instances. What
another one sends of it and is not here yet is kept in a folder of its own, root/STUDY/SERIES/from-AE/SOP.dcm, which is
no part of the series: an acknowledged instance is never lost, and nobody adds to what another has sent. Only where that
sender has also sent all that is here, with the same content, do its instances join the series (`Spool.adopt`).

When `Part.keep` has returned, the bytes are under their final name and survive the loss of power: the file was
fsynced, then linked, then the folder was fsynced. A data set is kept as it was sent, never decoded and encoded again,
behind a File Meta Information of our own (PS3.10 7.1). One process at a time receives into a spool; any may read it.

The bytes are synced before they get their name, though that costs the journal two commits. With the name first a loss
of power could leave a file that was never acknowledged under its final name and without its bytes, and its resend would
be told that another is kept. Where a file system writes its journal in order one commit could do, but brings little:
0.1 of 1.1 ms a slice over one association, and nothing over eight, which share their commits.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import struct
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

import structlog

from node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from node.intake.header import FileSpan, HeaderError, InstanceHeader, read_header
from node.intake.received import LONGEST_META, opened
from node.paths import InvalidUIDError, valid_uid, within
from node.text import UID

log = structlog.stdlib.get_logger(__name__)

#: Name in a series' folder of the file that says how many instances there were when its sender came to an end.
END = "end"

#: Name in a series' folder of the file with the AE title that the series belongs to.
SENDER = "sender"

#: What names of folders begin with that hold what others sent of a series.
ASIDE = "from-"
#: Name in a series' folder of the file with a line for each attempt to read the series that was begun and not ended.
ATTEMPTS = "attempts"

#: A line of it, always of one length.
_ATTEMPT = "%Y-%m-%dT%H:%M:%S"

#: Bytes of such a file that are read.
_LONGEST_NOTE = 4096

#: Bytes compared at a time when a resent instance is checked against the one that is kept.
_BLOCK = 1 << 20

#: Folders whose way to the root is known to be on disk; forgotten at this number to bound memory.
_KNOWN_FOLDERS = 4096

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


@dataclass(frozen=True)
class Adoption:
    """What came of comparing what another sender sent with the series."""

    #: Whether it sent all that is in the series, with the same content, so that the rest of it joins the series.
    agreed: bool
    #: Instances of the series before.
    held: int
    #: Instances that it sent and the series does not have; they have joined it if `agreed`.
    extra: int
    #: SOP instance UIDs that were found to differ.
    differing: frozenset[str]


@dataclass(frozen=True)
class SpooledInstance:
    """One instance as found on disk."""

    header: InstanceHeader
    path: Path
    calling_ae: str
    called_ae: str


@dataclass(frozen=True)
class SpooledSeries:
    """One series as found on disk."""

    study_uid: str
    series_uid: str
    instances: int
    #: When the last instance came, seconds since the epoch.
    last_at: float
    #: AE titles of others that sent instances which are no part of it.
    others: tuple[str, ...] = ()


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
            raise _full(error) from error
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
                path = path.parent / _aside(self._sender) / path.name
                self._spool.ensure_aside(path.parent)
            os.fsync(self._file)
            try:
                os.link(self._path, path)
            except FileExistsError:
                return self._kept(path, belongs_to)
            _fsync_folder(path.parent)
            return Stored(path, "new", belongs_to)
        except OSError as error:
            raise _full(error) from error
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
            os.utime(path)  # what comes again is as young as what comes anew (`node.files.retention`)
        same = self._same_as(path)
        _fsync_folder(path.parent)
        path.stat()  # still here, and not dropped while it was compared
        return Stored(path, "same" if same else "differs", belongs_to)

    def _same_as(self, path: Path) -> bool:
        return _same(self._file, path)


class Spool:
    """The folder of received instances.

    Parameters
    ----------
    root
        Made when missing. Must be one filesystem that knows hard links: a link cannot overwrite, a rename can.
    floor_bytes
        Free space that is left to others; below it nothing more is taken.
    """

    def __init__(self, root: Path, floor_bytes: int = 0) -> None:
        self.root = root
        self._floor = floor_bytes
        self._incoming = root / "incoming"
        self._numbers = itertools.count(1)
        #: Series folders whose names are on disk, and whom each series belongs to.
        self._known: dict[Path, str] = {}
        self._folders = threading.Lock()
        self._incoming.mkdir(parents=True, exist_ok=True)
        #: When the spool was last received into before now, seconds since the epoch.
        self.last_alive = self._incoming.stat().st_mtime
        for left_over in self._incoming.iterdir():
            try:
                left_over.unlink()
            except OSError as error:
                mend = f"remove {left_over.name} from {self._incoming}; it is not ours"
                log.error("a left-over cannot be removed", error=error.strerror, mend=mend)
        _fsync_folder(root)
        _fsync_folder(root.parent)

    def begin(
        self, *, sop_uid: str, sop_class_uid: str, transfer_syntax_uid: str, calling_ae: str, called_ae: str
    ) -> Part:
        """Begin to receive an instance.

        Raises
        ------
        InvalidUIDError
            A UID is not digits and dots, or too long.
        SpoolFullError
            Less than the floor is free, or the filesystem is full.
        OSError
            The filesystem failed otherwise. Nothing is left behind after any of the three.
        """
        meta = file_meta(sop_class_uid, sop_uid, transfer_syntax_uid, calling_ae, called_ae)
        self.require_room()
        try:
            return Part(self, self._incoming / f"{next(self._numbers)}.part", meta, calling_ae)
        except OSError as error:
            raise _full(error) from error

    def require_room(self, share: float = 1.0) -> None:
        """Raise `SpoolFullError` when less than this share of the floor is free."""
        if shutil.disk_usage(self.root).free < self._floor * share:
            raise SpoolFullError(errno.ENOSPC, "less than the configured floor of free space is left")

    def series(self, study_uid: str, series_uid: str) -> list[SpooledInstance]:
        """Instances kept of one series, by file name; files that cannot be read are logged and left out."""
        found = []
        for path in sorted(self.folder(study_uid, series_uid).glob("*.dcm")):
            try:
                found.append(_read(path))
            except (OSError, ValueError, struct.error) as error:
                log.error("spooled file cannot be read", file=path.name, error=type(error).__name__)
        return found

    def all_series(self) -> Iterator[SpooledSeries]:
        """Every series on disk; what is no folder, or cannot be listed, is logged and left out."""
        for study in _folders(self.root):
            for series in _folders(study):
                try:
                    names = [entry.name for entry in os.scandir(series)]
                    files = sum(name.endswith(".dcm") for name in names)
                    others = tuple(unquote(name.removeprefix(ASIDE)) for name in names if name.startswith(ASIDE))
                    # A folder's time is that of its last new name, and spares a look at each file.
                    yield SpooledSeries(study.name, series.name, files, series.stat().st_mtime, others)
                except OSError as error:
                    log.error("a series in the spool cannot be listed", series=series.name, error=error.strerror)

    def end(self, study_uid: str, series_uid: str, instances: int | None) -> None:
        """Note that the sender came to an end of a series when so many instances were here; None withdraws the note.

        Not synced: the note outlives the process, and where the loss of power takes it the series is in doubt.
        """
        try:
            note = self.folder(study_uid, series_uid) / END
            if instances is None:
                note.unlink(missing_ok=True)
            else:
                note.write_text(f"{instances}", encoding="ascii")
        except InvalidUIDError:
            return  # of an instance that was refused: nothing of its series is here
        except OSError as error:
            log.warning("the end of a series is not noted", series=series_uid, error=error.strerror)

    def ended(self, study_uid: str, series_uid: str, instances: int) -> bool:
        """Whether the sender came to an end of a series with so many instances: none has come since."""
        try:
            return _note(self.folder(study_uid, series_uid) / END) == f"{instances}"
        except (OSError, ValueError):
            return False

    def still_alive(self) -> None:
        """Leave a sign for `last_alive` of the next start."""
        os.utime(self._incoming)

    def folder(self, study_uid: str, series_uid: str) -> Path:
        """Where instances of a series are kept; raises `InvalidUIDError` for what is no UID."""
        return within(self.root, valid_uid(study_uid), valid_uid(series_uid))

    def ensure(self, folder: Path, sender: str) -> str:
        """Make a series folder; the names that lead to it are on disk when this returns.

        Gives the AE title that the series belongs to: `sender`, unless another one has sent of it before.
        """
        with self._folders:
            known = self._known.get(folder)
            if known is not None and folder.is_dir():
                return known
            folder.mkdir(parents=True, exist_ok=True)
            owner = self._owner(folder)
            if not owner:
                owner = sender
                self._claim(folder, sender)
            _fsync_folder(folder.parent)
            _fsync_folder(self.root)
            if len(self._known) >= _KNOWN_FOLDERS:
                self._known.clear()
            self._known[folder] = owner
            return owner

    def ensure_aside(self, folder: Path) -> None:
        """Make a folder for what another sender sent of a series; its name is on disk when this returns."""
        folder.mkdir(parents=True, exist_ok=True)
        _fsync_folder(folder.parent)

    def belongs_to(self, study_uid: str, series_uid: str) -> str:
        """The AE title that a series belongs to; empty where nothing is here of it."""
        with suppress(InvalidUIDError):
            folder = self.folder(study_uid, series_uid)
            with self._folders:
                return self._known.get(folder) or self._owner(folder)
        return ""

    def adopt(self, study_uid: str, series_uid: str, sender: str, same: Collection[str]) -> Adoption:
        """Let what another sender sent of a series join it, where that sender sent all that is in it alike.

        Parameters
        ----------
        sender
            Its AE title.
        same
            SOP instance UIDs of the series that it sent with the content that is here.

        Raises
        ------
        OSError
            The filesystem failed. What had joined the series is part of it, and the rest is where it was.
        """
        folder = self.folder(study_uid, series_uid)
        held = {path.stem for path in folder.glob("*.dcm")}
        alike, differing, extra = set(same), set[str](), list[Path]()
        for path in sorted((folder / _aside(sender)).glob("*.dcm")):
            if path.stem not in held:
                extra.append(path)
            elif self._is_same(path, folder / path.name):
                # It came from both at once: this one first, and then from whom the series belongs to.
                alike.add(path.stem)
                path.unlink()
            else:
                differing.add(path.stem)
        agreed = held <= alike
        if agreed:
            self._join(folder, extra)
            if not held:  # nothing is here of whom it belonged to
                with self._folders:
                    self._claim(folder, sender)
                    self._known[folder] = sender
        with suppress(OSError):  # not empty, or not there
            (folder / _aside(sender)).rmdir()
        return Adoption(agreed, len(held), len(extra), frozenset(differing))

    def _join(self, folder: Path, extra: list[Path]) -> None:
        for path in extra:
            with suppress(FileExistsError, PermissionError):
                os.link(path, folder / path.name)
                path.touch()  # as young as the series that it makes another
        _fsync_folder(folder)
        for path in extra:
            if path.samefile(folder / path.name):
                path.unlink()

    def _is_same(self, path: Path, kept: Path) -> bool:
        with path.open("rb") as file:
            return _same(file.fileno(), kept)

    def _owner(self, folder: Path) -> str:
        """Whom a series belongs to by what is on disk; empty where nothing of it is."""
        with suppress(OSError, ValueError):
            if note := _note(folder / SENDER):
                return note
        # Received by an earlier version, or there was no room for the note.
        for path in sorted(folder.glob("*.dcm")):
            with suppress(OSError, ValueError, struct.error):
                return _sender(path)
        return ""

    def _claim(self, folder: Path, sender: str) -> None:
        """Note whom a series belongs to; its name is on disk with that of the first instance."""
        with suppress(OSError), (folder / SENDER).open("w", encoding="ascii", errors="replace") as note:
            note.write(sender)
            note.flush()
            os.fsync(note.fileno())


def files(folder: Path) -> list[Path]:
    """All instances in a series folder, also those that are no part of the series."""
    return [*folder.glob("*.dcm"), *folder.glob(f"{ASIDE}*/*.dcm")]


def attempts(folder: Path) -> int:
    """Attempts to read a series that were begun and not ended: at each of them the process died, or failed."""
    with suppress(OSError, ValueError):
        return _note(folder / ATTEMPTS).count("\n")
    return 0


def begin_attempt(folder: Path) -> int:
    """Count an attempt to read a series, durably and before it; gives those before it that were not ended.

    Where nothing can be written the attempt is not counted.
    """
    before = attempts(folder)
    try:
        with _same_time(folder):
            note = os.open(
                folder / ATTEMPTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640
            )
            try:
                os.write(note, f"{time.strftime(_ATTEMPT)}\n".encode())
                os.fsync(note)
            finally:
                os.close(note)
    except OSError as error:
        log.warning("an attempt to read a series is not counted", series=folder.name, error=error.strerror)
    return before


def end_attempt(folder: Path, before: int) -> None:
    """The attempt came to its end: those count that were `before`."""
    with suppress(OSError), _same_time(folder):
        if before:
            os.truncate(folder / ATTEMPTS, before * len(f"{time.strftime(_ATTEMPT)}\n"))
        else:
            (folder / ATTEMPTS).unlink(missing_ok=True)


@contextmanager
def _same_time(folder: Path) -> Iterator[None]:
    """Leave a series' folder the time at which its last instance came."""
    then = folder.stat()
    yield
    os.utime(folder, ns=(then.st_atime_ns, then.st_mtime_ns))


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


#: Offset of the first element after the group length, whose own 12 bytes follow preamble and prefix.
_META_START = 128 + 4 + 12


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    """An element of group 0002, which is always Explicit VR Little Endian (PS3.10 7.1)."""
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    if vr == b"OB":
        return struct.pack("<HH2sHL", 2, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value


def _aside(sender: str) -> str:
    """Name of the folder for what `sender` sent of another's series; an AE title may hold slashes (PS3.5 6.2)."""
    return ASIDE + quote(sender, safe=" ")


def _same(descriptor: int, path: Path) -> bool:
    """Whether an open file and the one at `path` have the same data set behind their File Meta Information."""
    mine = _dataset_start(os.pread(descriptor, _META_START, 0))
    with path.open("rb") as file:
        at = _dataset_start(file.read(_META_START))
        if os.fstat(file.fileno()).st_size - at != os.fstat(descriptor).st_size - mine:
            return False
        while block := os.pread(descriptor, _BLOCK, mine):
            if os.pread(file.fileno(), len(block), at) != block:
                return False
            at, mine = at + len(block), mine + len(block)
    return True


def _note(path: Path) -> str:
    """A small file beside the instances."""
    with opened(path) as file:
        return os.pread(file, _LONGEST_NOTE, 0).decode("ascii")


def _folders(parent: Path) -> list[Path]:
    """Folders in a folder whose names are UIDs; empty where it cannot be listed."""
    try:
        return sorted(path for path in parent.iterdir() if UID.match(path.name) and path.is_dir())
    except OSError as error:
        log.error("a folder of the spool cannot be listed", folder=parent.name, error=error.strerror)
        return []


def _dataset_start(head: bytes) -> int:
    return _META_START + int(struct.unpack_from("<L", head, _META_START - 4)[0])


def _read(path: Path) -> SpooledInstance:
    """Header and sender of a file that a `Part` became."""
    with _described(path) as (file, start, meta):
        header = read_header(FileSpan(file, start, os.fstat(file).st_size - start), meta.get(0x0010, ""))
    return SpooledInstance(header, path, meta.get(0x0016, ""), meta.get(0x0018, ""))


def _sender(path: Path) -> str:
    """Who sent a file that a `Part` became."""
    with _described(path) as (_, _, meta):
        return meta.get(0x0016, "")


@contextmanager
def _described(path: Path) -> Iterator[tuple[int, int, dict[int, str]]]:
    """The open file, where its data set begins, and its File Meta Information by element number."""
    with opened(path) as file:
        raw = os.pread(file, LONGEST_META, 0)
        if raw[128:132] != b"DICM":
            raise HeaderError("no DICOM file")
        start, at, meta = _dataset_start(raw), _META_START, dict[int, str]()
        while at < start:
            _, number, vr, length = struct.unpack_from("<HH2sH", raw, at)
            at += 8
            if vr == b"OB":
                length = struct.unpack_from("<L", raw, at)[0]
                at += 4
            meta[number] = raw[at : at + length].decode("ascii", "replace").strip("\0 ")
            at += length
        yield file, start, meta


def _full(error: OSError) -> OSError:
    """The error as `SpoolFullError` where it says that there is no room."""
    if error.errno in _FULL and not isinstance(error, SpoolFullError):
        return SpoolFullError(error.errno, "no space left for the instance")
    return error


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
