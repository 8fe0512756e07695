"""Received instances, durable on disk: root/STUDY/SERIES/SOP.dcm, with notes beside them (`node.files.series_folder`).

A series belongs to the calling AE title that sent its first instance, whose name is kept beside the instances. What
another one sends of it and is not here yet is kept in a folder of its own, root/STUDY/SERIES/from-AE/SOP.dcm, which is
no part of the series: an acknowledged instance is never lost, and nobody adds to what another has sent. Only where that
sender has also sent all that is here, with the same content, do its instances join the series (`Spool.adopt`).

A data set is kept as it was sent, never decoded and encoded again, behind a File Meta Information of our own (PS3.10
7.1). One process at a time receives into a spool; any may read it.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import struct
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from node.files.series_folder import END, SENDER, aside, read_note, sender_aside
from node.images.elements import FileSpan
from node.intake.file_meta import described, file_meta
from node.intake.header import InstanceHeader, read_header
from node.intake.part import Part, SpoolFullError, disk_error, fsync_folder, same_dataset
from node.intake.series import Adoption
from node.paths import InvalidUIDError, valid_uid, within
from node.text import UID

log = structlog.stdlib.get_logger(__name__)

#: Folders whose way to the root is known to be on disk; forgotten at this number to bound memory.
_KNOWN_FOLDERS = 4096


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
                hint = f"remove {left_over.name} from {self._incoming}; it is not ours"
                log.error("a left-over cannot be removed", error=error.strerror, hint=hint)
        fsync_folder(root)
        fsync_folder(root.parent)

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
            raise disk_error(error) from error

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
                    others = tuple(sender for name in names if (sender := sender_aside(name)) is not None)
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
            return read_note(self.folder(study_uid, series_uid) / END) == f"{instances}"
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

        Returns the AE title that the series belongs to: `sender`, unless another one has sent of it before.
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
            fsync_folder(folder.parent)
            fsync_folder(self.root)
            if len(self._known) >= _KNOWN_FOLDERS:
                self._known.clear()
            self._known[folder] = owner
            return owner

    def ensure_aside(self, folder: Path) -> None:
        """Make a folder for what another sender sent of a series; its name is on disk when this returns."""
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)

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
        for path in sorted((folder / aside(sender)).glob("*.dcm")):
            if path.stem not in held:
                extra.append(path)
            elif _same_files(path, folder / path.name):
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
            (folder / aside(sender)).rmdir()
        return Adoption(agreed, len(held), len(extra), frozenset(differing))

    def _join(self, folder: Path, extra: list[Path]) -> None:
        for path in extra:
            with suppress(FileExistsError, PermissionError):
                os.link(path, folder / path.name)
                path.touch()  # as young as the series that it makes another
        fsync_folder(folder)
        for path in extra:
            if path.samefile(folder / path.name):
                path.unlink()

    def _owner(self, folder: Path) -> str:
        """Whom a series belongs to by what is on disk; empty where nothing of it is."""
        with suppress(OSError, ValueError):
            if note := read_note(folder / SENDER):
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


def _same_files(path: Path, kept: Path) -> bool:
    with path.open("rb") as file:
        return same_dataset(file.fileno(), kept)


def _folders(parent: Path) -> list[Path]:
    """Folders in a folder whose names are UIDs; empty where it cannot be listed."""
    try:
        return sorted(path for path in parent.iterdir() if UID.match(path.name) and path.is_dir())
    except OSError as error:
        log.error("a folder of the spool cannot be listed", folder=parent.name, error=error.strerror)
        return []


def _read(path: Path) -> SpooledInstance:
    """Header and sender of a file that a `Part` became."""
    with described(path) as (file, start, meta):
        header = read_header(FileSpan(file, start, os.fstat(file).st_size - start), meta.get(0x0010, ""))
    return SpooledInstance(header, path, meta.get(0x0016, ""), meta.get(0x0018, ""))


def _sender(path: Path) -> str:
    """Who sent a file that a `Part` became."""
    with described(path) as (_, _, meta):
        return meta.get(0x0016, "")
