"""Where intake meets the ledger: the listener of an installation, and what is owed for a series that it closed."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable

import structlog
from pydicom import Dataset
from sqlalchemy import func, select

from node.config import Route
from node.delivery import commitment, superseding
from node.images.headers import first_header
from node.installation import Node
from node.intake.assembly import Assembly, AssociationId, ClosedSeries
from node.intake.listener import Listener, ListenerOptions
from node.intake.series_count import Counter
from node.intake.spool import Spool
from node.intake.verdict import Verdict
from node.ledger.store import Analysis, Series
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds beyond the quiet period after which a series was surely closed: a peer that stalled was dropped meanwhile.
SETTLED_S = 120.0

#: Seconds for which a series of which no file can be read is offered again before it is told of: long enough to start
#: a machine or mount a file system anew.
UNREADABLE_S = 600.0

#: Series of a lost ledger that are open at a time.
OPEN_AT_ONCE = 50

#: What the method of this name says of a closed series; it belongs to a later stage, which the listener is given.
Accepts = Callable[[str, ClosedSeries], list[Verdict]]

#: Dispatches a task for each analysis, by its row.
Dispatch = Callable[[Iterable[int]], None]

#: Descriptors that are kept open for as long as the process lives.
_LOCKS: list[int] = []


def intake(here: Node, accepts: Accepts, dispatch: Dispatch) -> Listener:
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
        lambda closed: series_closed(here, closed, accepts, dispatch),
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


def series_closed(here: Node, closed: ClosedSeries, accepts: Accepts, dispatch: Dispatch) -> None:
    """Find the route of a series that intake closed, ask its method, and record the analyses that are due.

    Raises
    ------
    OSError
        Its files are there and none can be read now.
    """
    closed_because, complete = closed.reason, closed.complete
    route: Route | None
    try:
        header = first_header(closed.paths)
        names = here.settings.peer_names(closed.calling_ae)
        route = next((route for route in here.settings.routes if route.takes(names, header)), None)
        urgent = _urgent(header) or (route is not None and route.urgent)
        verdicts = _judged(closed, route, accepts)
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
    if route is not None and any(one.analyse for one in verdicts):
        decision = f"route '{route.name}': {decision}"
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
        here.ledger.tell(session, series.id, "received", f"{len(closed.paths)} instances: {closed_because}")
        here.ledger.tell(session, series.id, "triage", decision)
        for verdict in verdicts:
            if route is not None and (verdict.analyse or (verdict.tell and route.tell_not_analysed)):
                series.analyses.append(
                    Analysis(
                        route=route.name,
                        method=route.analysis,
                        urgent=urgent,
                        destinations={peer: list(kinds) for peer, kinds in route.to.items()},
                        tell=route.tell_not_analysed,
                        not_analysed=None if verdict.analyse else verdict.reason.removeprefix("not analysed: "),
                        instances=[str(closed.paths[n].relative_to(here.spool)) for n in verdict.part] or None,
                        acquisition=verdict.acquisition,
                        note=verdict.note,
                    )
                )
        session.flush()
        superseding.drop_waiting(here.ledger, session, series)
        bells = [analysis.id for analysis in series.analyses]
    log.info("triaged", series=closed.series_instance_uid, decision=decision)
    _dispatch(dispatch, bells)


def _judged(closed: ClosedSeries, route: Route | None, accepts: Accepts) -> list[Verdict]:
    """What the route's method says; a method that fails must not keep the series from coming to a visible end."""
    if route is None:
        return [Verdict(False, "not analysed: no route takes it")]
    try:
        return accepts(route.analysis, closed)
    except Exception as error:
        why = f"not analysed: method '{route.analysis}' failed to judge it ({logs.plainly(error)})"
        return [Verdict(False, why)]


def _dispatch(dispatch: Dispatch, analyses: list[int]) -> None:
    """Without a broker, or where the process ends just now, it is left to the sweep."""
    dispatch(analyses)


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
