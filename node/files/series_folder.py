"""What lies beside the instances of a received series: its sender, whether it ended, attempts to read it.

    STUDY/SERIES/SOP.dcm            an instance of the series
    STUDY/SERIES/from-AE/SOP.dcm    an instance that another peer sent, which is no part of the series
    STUDY/SERIES/sender             the AE title that the series belongs to
    STUDY/SERIES/end                how many instances there were when its sender came to an end
    STUDY/SERIES/attempts           a line for each attempt to read the series that was begun and not ended

Intake writes them, and whoever keeps or drops files must know them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

import structlog

from node.images.received import opened

log = structlog.stdlib.get_logger(__name__)

#: Name of the file with the number of instances that were here when the sender came to an end.
END = "end"

#: Name of the file with the AE title that the series belongs to.
SENDER = "sender"

#: Name of the file with a line for each attempt to read the series that was begun and not ended.
ATTEMPTS = "attempts"

#: What the names of folders begin with that hold what other senders sent of a series.
ASIDE = "from-"

#: A line of `ATTEMPTS`, always of one length.
_ATTEMPT = "%Y-%m-%dT%H:%M:%S"

#: Bytes of a note that are read.
_LONGEST_NOTE = 4096


def files(folder: Path) -> list[Path]:
    """All instances in a series folder, also those that are no part of the series."""
    return [*folder.glob("*.dcm"), *folder.glob(f"{ASIDE}*/*.dcm")]


def aside(sender: str) -> str:
    """Name of the folder for what `sender` sent of another's series; an AE title may hold slashes (PS3.5 6.2)."""
    return ASIDE + quote(sender, safe=" ")


def sender_aside(name: str) -> str | None:
    """The AE title that `aside` made a folder's name of; None for any other name."""
    return unquote(name.removeprefix(ASIDE)) if name.startswith(ASIDE) else None


def read_note(path: Path) -> str:
    """The text of a note.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is not ASCII.
    """
    with opened(path) as file:
        return os.pread(file, _LONGEST_NOTE, 0).decode("ascii")


def attempts(folder: Path) -> int:
    """Attempts to read a series that were begun and not ended: at each of them the process died, or failed."""
    with suppress(OSError, ValueError):
        return read_note(folder / ATTEMPTS).count("\n")
    return 0


def begin_attempt(folder: Path) -> int:
    """Count an attempt to read a series, durably and before it; returns those before it that were not ended.

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
