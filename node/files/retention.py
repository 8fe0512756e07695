"""How long files stay: received series and results are dropped by age, once no work on them is due; and how full the
disk is.

A series goes when its newest file and its newest generation are old enough and all work on all its generations has
come to an end: done, confirmed, superseded, or refused. What failed stays, for somebody may retry it. The ledger keeps
its rows, so that the same series sent again is known.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import delete, select

from node.config import Settings
from node.files.series_folder import ASIDE, ATTEMPTS, END, SENDER, files
from node.ledger.events import EventKind
from node.ledger.ledger import Ledger
from node.ledger.record import now, record_event
from node.ledger.tables import SET_ASIDE, Commitment, Series
from node.ledger.transitions import State
from node.paths import within
from node.text import UID

log = structlog.get_logger(__name__)

_DAY_S = 86400.0

#: States in which work is over for good.
_FINAL = frozenset((State.DONE, State.CONFIRMED, State.REFUSED, State.SUPERSEDED))


def pressure(settings: Settings) -> str | None:
    """A warning when the disk fills up, well before the listener has to refuse; None while all is well."""
    free_mb = shutil.disk_usage(settings.data).free >> 20
    floor = settings.listener.disk_floor_mb
    if free_mb >= max(settings.retention.warn_free_mb, floor):
        return None
    then = "C-STORE is refused" if free_mb < floor else f"below {floor} MB C-STORE is refused"
    return f"{free_mb} MB of disk are free; {then}. Free space, or lower retention.days"


def drop_old(settings: Settings, ledger: Ledger) -> int:
    """Drop the files of series that are old and finished; gives their number. Harmless in any number of processes."""
    if settings.retention.days is None:
        return 0
    before = time.time() - settings.retention.days * _DAY_S
    dropped = 0
    for folder in sorted((settings.data / "spool").glob("*/*")):
        if not UID.match(folder.name) or not _is_old(folder, before):
            continue
        if not _finished(ledger, folder.name, before) or not _remove(folder, before):
            continue
        _remove_tree(within(settings.data / "results", folder.name))
        with suppress(OSError):
            folder.parent.rmdir()  # the study, once it is empty
        with ledger() as session:
            for series in session.scalars(select(Series).where(Series.series_instance_uid == folder.name)):
                series.dropped_at = now(session)
                record_event(session, series.id, EventKind.FILES_DROPPED, days=settings.retention.days)
        dropped += 1
    with ledger() as session:
        session.execute(delete(Commitment).where(Commitment.asked_at < before))
    if dropped:
        log.info("dropped old series", series=dropped)
    return dropped


def _finished(ledger: Ledger, series_uid: str, before: float) -> bool:
    """Whether every generation of a series was closed before then and no work on it is due or failed."""
    with ledger() as session:
        generations = session.scalars(select(Series).where(Series.series_instance_uid == series_uid)).all()
        works = [analysis for one in generations for analysis in one.analyses]
        sent = [delivery for analysis in works for made in analysis.objects for delivery in made.deliveries]
        old = all(one.closed_at < before for one in generations)
        read = not any(one.verdict.startswith(SET_ASIDE) for one in generations)
        return bool(generations) and old and read and all(work.state in _FINAL for work in (*works, *sent))


def _is_old(folder: Path, before: float) -> bool:
    """Whether a series folder has files, and all of them came, or came again, before then."""
    with suppress(OSError):
        return max((_came(path) for path in files(folder)), default=before) < before
    return False


def _came(path: Path) -> float:
    """When a file came last; never for one that another process has removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path, before: float) -> bool:
    """Remove a folder's files one by one, and the folder; gives whether they were still old.

    Its sender may begin to send it again at any time: what comes, or comes again, stays.
    """
    found = files(folder)
    if any(_came(path) >= before for path in found):
        return False
    for path in found:
        if _came(path) < before:
            path.unlink(missing_ok=True)
    for aside in folder.glob(f"{ASIDE}*"):
        with suppress(OSError):
            aside.rmdir()
    if not files(folder):
        for note in (END, SENDER, ATTEMPTS):
            (folder / note).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return True


def _remove_tree(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
