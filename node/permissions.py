"""Who on this machine may read what lungnode writes: its user, its group to read, nobody else.

Folders are 0750 and files 0640 by the umask of every process; `close` repairs what an older version, a copy or a
restored backup left open.
"""

from __future__ import annotations

import os
import resource
import stat
import threading
import time
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

#: What others may do with a file (anything), and the group (write it), that is taken away.
UMASK = 0o027

#: Entries after which the walk pauses, and for how many seconds: it must not hold up the listener.
_PAUSE_EVERY, _PAUSE_S = 2000, 0.05

_HINT = (
    "chown the data folder to the user of lungnode and start it again, or take the rights away: chmod -R g-w,o-rwx; "
    "a file system without modes needs a mount option for them (umask=027)"
)


def keep_private() -> None:
    """Let what this process and its children write be closed to others, and leave no memory dump.

    An umask that takes away more is left as it is.
    """
    before = os.umask(0o077)
    os.umask(before | UMASK)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def close(folder: Path, *, everything: bool = False) -> threading.Thread | None:
    """Take away what others may do with the data folder and what lies directly in it, so that nothing below is reached.

    Parameters
    ----------
    folder
        The data folder; a symbolic link to it is followed, none below it is.
    everything
        Whether to go through all that lies below too, in a thread of its own, which is returned. Of a million files it
        takes about a minute.
    """
    folder = folder.resolve()
    repair = _Repair(folder)
    repair.take(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            repair.take(Path(entry.path))
    repair.report()
    if not everything:
        return None
    thread = threading.Thread(target=_close_below, args=(folder,), name="permissions", daemon=True)
    thread.start()
    return thread


def _close_below(folder: Path) -> None:
    repair = _Repair(folder)
    seen = 0
    # Through open folders (openat), so that none that is renamed meanwhile leads elsewhere.
    for top, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False, onerror=repair.failed):
        for name in (*folders, *files):
            repair.take(Path(top) / name, name, descriptor)
            seen += 1
            if seen % _PAUSE_EVERY == 0:
                time.sleep(_PAUSE_S)
    repair.report()


class _Repair:
    """Counts what was closed, and what could not be."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._closed, self._open, self._links = 0, 0, 0

    def take(self, path: Path, name: str | None = None, folder: int | None = None) -> None:
        """Close one entry; a symbolic link is left alone, and what another user owns is counted."""
        where = path if name is None else name
        try:
            found = os.stat(where, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                self._links += _is_open(os.stat(where, dir_fd=folder))
            elif _is_open(found):
                os.chmod(where, stat.S_IMODE(found.st_mode) & ~UMASK, dir_fd=folder)
                # Some file systems take the call and keep no modes.
                if _is_open(os.stat(where, dir_fd=folder, follow_symlinks=False)):
                    self._open += 1
                else:
                    self._closed += 1
        except FileNotFoundError:
            return  # gone meanwhile
        except OSError as error:
            self.failed(error)

    def failed(self, _error: OSError) -> None:
        """Something belongs to another user, or its file system takes no modes."""
        self._open += 1

    def report(self) -> None:
        """One line for each kind of finding."""
        if self._closed:
            log.warning("other users of this machine could read the data; closed now", entries=self._closed)
        if self._open:
            log.error("other users of this machine may read some of the data", entries=self._open, hint=_HINT)
        if self._links:
            hint = "symbolic links are not followed: take the rights away where they lead to, with chmod -R g-w,o-rwx"
            log.error("other users of this machine may read what links lead to", entries=self._links, hint=hint)


def _is_open(found: os.stat_result) -> bool:
    return bool(stat.S_IMODE(found.st_mode) & UMASK)
