"""Where intake meets the ledger: the listener of an installation, and the work that a closed series makes due."""

from __future__ import annotations

import fcntl
import os
import threading
import time

import structlog
from pydicom import Dataset
from sqlalchemy import func, select

from node.delivery import commitment, superseding
from node.intake.assembly import Assembly, AssociationId, ClosedSeries
from node.intake.listener import Listener, ListenerOptions
from node.intake.series_count import Counter
from node.intake.spool import Spool
from node.ledger.events import EventKind
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob, Series
from node.methods.pneumonia.triage import Verdict, triage
from node.tasks import Node, dispatch, first_header
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds beyond the quiet period after which a series was surely closed: a peer that stalled was dropped meanwhile.
SETTLED_S = 120.0

#: Seconds for which a series of which no file can be read is offered again before it is told of: long enough to start
#: a machine or mount a file system anew.
UNREADABLE_S = 600.0

#: Series of a lost ledger that are open at a time.
OPEN_AT_ONCE = 50

#: Descriptors that are kept open for as long as the process lives.
_LOCKS: list[int] = []


def intake(here: Node) -> Listener:
    """The listener of this installation, ready to start, with what was open when the last one ended."""
    me = here.settings.listener
    # Two listeners on one spool would clear away each other's half-written files. The lock goes with the process.
    lock = os.open(here.settings.data / "listener.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OSError(f"another listener works on {here.settings.data}") from None
    _LOCKS.append(lock)
    spool = Spool(here.spool, me.disk_floor_mb << 20)
    counting = {peer.ae_title: peer for peer in here.settings.peers_that_may("count").values()}
    counter = Counter(counting, me.ae_title)
    assembly = Assembly(
        lambda closed: series_closed(here, closed),
        me.quiet_period_s,
        recall=lambda study, series: ((one.header, one.path) for one in spool.series(study, series)),
        lacking=here.ledger.lacks,
        count=counter.ask,
        ended=spool.end,
    )
    _take_up(here, spool, assembly)
    senders = {peer.ae_title for peer in here.settings.peers_that_may("send").values()}
    senders |= commitment.reporters(here.settings)
    options = ListenerOptions(
        ae_title=me.ae_title,
        host=me.host,
        port=me.port,
        known_peers=None if me.accept == "any" else frozenset(senders),
        max_associations=me.max_associations,
        transport=me.transport,
    )
    contexts, handlers = commitment.services(here.ledger, here.settings)
    return Listener(options, spool, assembly, contexts=contexts, handlers=handlers, stopped=counter.stop)


def series_closed(here: Node, closed: ClosedSeries) -> None:
    """Triage a series that intake closed, and record the work that is due for it.

    Raises
    ------
    OSError
        Its files are there and none can be read now.
    """
    closed_because, complete = closed.reason, closed.complete
    try:
        verdicts = triage(closed)
        header = first_header(closed.paths)
        names = here.settings.peer_names(closed.calling_ae)
        route = next((route for route in here.settings.routes if route.takes(names, header)), None)
        urgent = _urgent(header) or (route is not None and route.urgent)
    except Exception as error:
        route, urgent = None, False
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            if closed.offered_for_s < UNREADABLE_S:
                raise  # it may pass (EMFILE, EIO, ESTALE): the assembly offers the series again
            # Not complete, so that its sender, or the next start, may bring it again.
            complete, closed_because = False, f"incomplete: what was kept of it cannot be read; {closed.reason}"
            where = closed.paths[0].parent.relative_to(here.settings.data)
            mend = f"mend the disk, or remove {where}, then send the series again"
            why = f"not analysed: none of its files can be read ({logs.plainly(error)}); {mend}"
            verdicts = [Verdict(False, why)]
        else:
            # Whatever is wrong with its header, the series must come to an end that can be seen.
            verdicts = [Verdict(False, f"not analysed: its header cannot be read ({logs.plainly(error)})")]
    decision = "; ".join(f"{one.acquisition}: {one.reason}" if one.acquisition else one.reason for one in verdicts)
    if any(one.analyse for one in verdicts):
        decision = "not analysed: no route takes it" if route is None else f"route '{route.name}': {decision}"
    with here.ledger() as session:
        series = here.ledger.add_series(
            session,
            closed.series_instance_uid,
            closed.study_instance_uid,
            [header.sop_instance_uid for header in closed.instances],
            calling_ae=closed.calling_ae,
            instances=[str(path.relative_to(here.spool)) for path in closed.paths],
            complete=complete,
            closed_because=closed_because,
            verdict=decision,
        )
        if series is None:
            log.info("received again, unchanged", series=closed.series_instance_uid)
            return
        record_event(session, series.id, EventKind.RECEIVED, instances=len(closed.paths), reason=closed_because)
        record_event(session, series.id, EventKind.TRIAGED, decision=decision)
        for verdict in verdicts:
            if route is not None and (verdict.analyse or (verdict.tell and route.tell_not_analysed)):
                series.analyses.append(
                    AnalysisJob(
                        route=route.name,
                        urgent=urgent,
                        destinations={peer: list(kinds) for peer, kinds in route.to.items()},
                        report=route.tell_not_analysed,
                        not_analysed=None if verdict.analyse else verdict.reason.removeprefix("not analysed: "),
                        instances=[str(closed.paths[n].relative_to(here.spool)) for n in verdict.part] or None,
                        acquisition=verdict.acquisition,
                        note=verdict.note,
                    )
                )
        session.flush()
        superseding.drop_waiting(session, series)
        due = [analysis.id for analysis in series.analyses]
    log.info("triaged", series=closed.series_instance_uid, decision=decision)
    dispatch("analyse", due)


def _urgent(header: Dataset) -> bool:
    """Whether the Requested Procedure Priority (0040,1003) says so, of the image or of its request (PS3.3 C.4.11)."""
    requests = header.get("RequestAttributesSequence") or ()
    return any(str(one.get("RequestedProcedurePriority") or "") in ("STAT", "HIGH") for one in (header, *requests))


def _take_up(here: Node, spool: Spool, assembly: Assembly) -> None:
    """Open again what the ledger does not know, or not all of.

    Also one that it knows as incomplete and whose sender has come to its end since. A series that was silent for long
    while the node still ran was closed, so that the ledger did know it: a ledger that does not has been lost since. Its
    series are judged anew by their geometry. There may be very many of them, so a thread opens them bit by bit.
    """
    known = _known(here)
    settled = spool.last_alive - here.settings.listener.quiet_period_s - SETTLED_S
    lost = []
    for one in spool.all_series():
        key = one.study_uid, one.series_uid
        instances, complete = known.get(key, (0, False))
        if one.instances <= instances and (complete or not spool.ended(*key, one.instances)):
            continue
        if key not in known and one.last_at < settled:
            lost.append(key)
        else:
            _restore(spool, assembly, key, closed=False)
    if lost:
        log.warning("the ledger lacks spooled series; they are judged anew", series=len(lost))
        threading.Thread(target=_restore_lost, args=(spool, assembly, lost), name="restore", daemon=True).start()


def _restore_lost(spool: Spool, assembly: Assembly, lost: list[tuple[str, str]]) -> None:
    for key in lost:
        while assembly.open_series >= OPEN_AT_ONCE:
            time.sleep(1)
        _restore(spool, assembly, key, closed=True)


def _restore(spool: Spool, assembly: Assembly, key: tuple[str, str], *, closed: bool) -> None:
    found = spool.series(*key)
    for one in found[:1]:
        sender = AssociationId(0, one.calling_ae, one.called_ae)
        ended = spool.ended(*key, len(found))
        assembly.restore(sender, ((one.header, one.path) for one in found), ended=ended, closed=closed)
        log.info("open before the restart", series=key[1], instances=len(found), ended=ended, closed_before=closed)


def _known(here: Node) -> dict[tuple[str, str], tuple[int, bool]]:
    """How many instances of each series the ledger knows, at most, and whether its newest generation is complete."""
    known: dict[tuple[str, str], tuple[int, bool]] = {}
    series = Series.study_instance_uid, Series.series_instance_uid
    with here.ledger.read() as session:
        query = select(*series, func.json_array_length(Series.instances), Series.complete).order_by(Series.id)
        for study, uid, instances, complete in session.execute(query):
            known[study, uid] = max(instances, known.get((study, uid), (0, False))[0]), complete
    return known
