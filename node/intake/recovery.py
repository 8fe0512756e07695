"""What the listener takes up at a start: series that were open when the node went down, or that a lost ledger lacks.

A series at which the process died several times is set aside, so that no file can keep the listener from starting.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import structlog
from sqlalchemy import case, func, select

from node.files.series_folder import attempts, begin_attempt, end_attempt
from node.installation import Node
from node.intake.assembly import Assembly
from node.intake.series import AssociationId
from node.intake.spool import Spool
from node.intake.verdict import Verdict
from node.ledger.events import EventKind
from node.ledger.record import record_event
from node.ledger.tables import SET_ASIDE, Series
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds beyond the quiet period after which a series was surely closed: a peer that stalled was dropped meanwhile.
SETTLED_S = 120.0

#: Attempts to read a series, each of which ended the process or failed, after which nobody reads it again: no file may
#: keep the listener from starting, or from closing other series.
MOST_ATTEMPTS = 3

#: Series of a lost ledger that are open at a time.
OPEN_AT_ONCE = 50


def take_up(here: Node, spool: Spool, assembly: Assembly) -> None:
    """Open again what the ledger does not know, or not all of.

    Also one that it knows as incomplete and whose sender has come to its end since. A series that was silent for long
    while the node still ran was closed, so that the ledger did know it: a ledger that does not has been lost since. Its
    series are judged again by their geometry. There may be very many of them, so a thread opens a few at a time.
    """
    known = _known(here)
    settled = spool.last_alive - here.settings.listener.quiet_period_s - SETTLED_S
    lost = []
    for one in spool.all_series():
        key = one.study_uid, one.series_uid
        for other in one.others:
            sender = AssociationId(0, other, here.settings.listener.ae_title)
            assembly.restore_other(sender, *key, spool.belongs_to(*key))
        instances, complete = known.get(key, (0, False))
        if one.instances <= instances and (complete or not spool.ended(*key, one.instances)):
            continue
        if key not in known and one.last_at < settled:
            lost.append(key)
        else:
            _restore(here, spool, assembly, key, closed=False)
    if lost:
        log.warning("the ledger lacks spooled series; they are judged again", series=len(lost))
        arguments = (here, spool, assembly, lost)
        threading.Thread(target=_restore_lost, args=arguments, name="restore", daemon=True).start()


def _restore_lost(here: Node, spool: Spool, assembly: Assembly, lost: list[tuple[str, str]]) -> None:
    for key in lost:
        while assembly.open_series >= OPEN_AT_ONCE:
            time.sleep(1)
        _restore(here, spool, assembly, key, closed=True)


def _restore(here: Node, spool: Spool, assembly: Assembly, key: tuple[str, str], *, closed: bool) -> None:
    """Open a series again, or set it aside; whatever is wrong with it, the others go on."""
    try:
        folder = spool.folder(*key)
        if attempts(folder) >= MOST_ATTEMPTS:
            _end_unread(here, spool, key)
            return
        before = begin_attempt(folder)
        found = spool.series(*key)
        for one in found[:1]:
            sender = AssociationId(0, spool.belongs_to(*key) or one.calling_ae, one.called_ae)
            ended = spool.ended(*key, len(found))
            assembly.restore(sender, ((one.header, one.path) for one in found), ended=ended, closed=closed)
            log.info("open before the restart", series=key[1], instances=len(found), ended=ended, closed_before=closed)
        if found:
            end_attempt(folder, before)  # those of before count until it is closed, which may be what ended the process
    except Exception as error:
        log.error("a spooled series cannot be taken up", series=key[1], error=logs.plainly(error))


def _end_unread(here: Node, spool: Spool, key: tuple[str, str]) -> None:
    """Record a series that is set aside, by the names of its files alone."""
    paths = tuple(sorted(spool.folder(*key).glob("*.dcm")))
    verdict = set_aside(here, paths[0].parent)
    with here.ledger() as session:
        series = here.ledger.add_series(
            session,
            key[1],
            key[0],
            [path.stem for path in paths],
            calling_ae=spool.belongs_to(*key),
            instances=[str(path.relative_to(here.spool)) for path in paths],
            complete=False,
            closed_because="it could not be read after a start",
            verdict=verdict.reason,
        )
        if series is not None:
            record_event(session, series.id, EventKind.RECEIVED, instances=len(paths), reason="found after a start")
            record_event(session, series.id, EventKind.TRIAGED, decision=verdict.reason)
            log.error("set aside", series=key[1], reason=verdict.reason)
    spool.end(*key, None)  # or each start would take it up again


def _known(here: Node) -> dict[tuple[str, str], tuple[int, bool]]:
    """How many instances of each series the ledger knows, at most, and whether its newest generation is complete."""
    known: dict[tuple[str, str], tuple[int, bool]] = {}
    series = Series.study_instance_uid, Series.series_instance_uid
    with here.ledger.read() as session:
        # A row that is damaged counts as none.
        count = case((func.json_valid(Series.instances) == 1, func.json_array_length(Series.instances)), else_=0)
        query = select(*series, count, Series.complete).order_by(Series.id)
        for study, uid, instances, complete in session.execute(query):
            known[study, uid] = max(instances, known.get((study, uid), (0, False))[0]), complete
    return known


def set_aside(here: Node, folder: Path) -> Verdict:
    """What is said of a series that is not read any more."""
    where = folder.relative_to(here.settings.data)
    return Verdict(
        False,
        f"{SET_ASIDE}, as the listener failed or ended {attempts(folder)} times while it read the series; all "
        f"that was received is kept in {where}; the log says how it ended; to try again, move that folder away and "
        "send the series again",
    )
