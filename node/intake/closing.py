"""Where intake meets the ledger: the listener of an installation, and the work that a closed series makes due."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from pydicom import Dataset
from pynetdicom.presentation import PresentationContext
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from node.config import Route
from node.files.series_folder import attempts, begin_attempt, end_attempt
from node.images.headers import first_header
from node.installation import Node
from node.intake.admission import ListenerOptions
from node.intake.assembly import Assembly
from node.intake.header import InstanceHeader
from node.intake.listener import Listener
from node.intake.recovery import MOST_ATTEMPTS, set_aside, take_up
from node.intake.series import Adoption, ClosedSeries, Conflict, Host
from node.intake.series_count import Counter
from node.intake.spool import Spool
from node.intake.verdict import Verdict
from node.ledger import superseding
from node.ledger.events import EventKind
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob, Event, Series
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds for which a series without a readable file is offered again before it is reported: long enough to restart a
#: machine or remount a file system.
UNREADABLE_S = 600.0

#: What the method of this name says of a closed series; it belongs to a later stage, which the listener is given.
Accepts = Callable[[str, ClosedSeries], list[Verdict]]

#: Dispatches a task for each analysis, by its row.
Dispatch = Callable[[Iterable[int]], None]

#: Descriptors that are kept open for as long as the process lives.
_LOCKS: list[int] = []


def intake(
    here: Node,
    accepts: Accepts,
    dispatch: Dispatch,
    *,
    contexts: Sequence[PresentationContext] = (),
    handlers: Sequence[tuple[Any, ...]] = (),
    reporters: Collection[str] = (),
) -> Listener:
    """The listener of this installation, ready to start, with what was open when the last one ended.

    Parameters
    ----------
    contexts, handlers
        Of further services that answer at the same address, as `Listener` takes them.
    reporters
        AE titles that may open an association for these services without being a sender.

    Raises
    ------
    OSError
        Another listener works on this installation.
    """
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
    assembly = Assembly(_Host(here, spool, counter, accepts, dispatch), me.quiet_period_s)
    take_up(here, spool, assembly)
    senders = {peer.ae_title for peer in here.settings.peers_that_may("send").values()}
    senders |= set(reporters)
    options = ListenerOptions(
        ae_title=me.ae_title,
        host=me.host,
        port=me.port,
        known_peers=None if me.accept == "any" else frozenset(senders),
        max_associations=me.max_associations,
        transport=me.transport,
        addresses=here.settings.peer_addresses(here.settings.data / "addresses.json"),
    )
    return Listener(options, spool, assembly, contexts=contexts, handlers=handlers, stopped=counter.stop)


@dataclass(frozen=True)
class _Host(Host):
    """This installation, for the assembly."""

    here: Node
    spool: Spool
    counter: Counter
    accepts: Accepts
    dispatch: Dispatch

    def closed(self, closed: ClosedSeries) -> None:
        series_closed(self.here, closed, self.accepts, self.dispatch)

    def conflict(self, conflict: Conflict) -> None:
        conflict_found(self.here, conflict)

    def recall(self, study_uid: str, series_uid: str) -> Iterable[tuple[InstanceHeader, Path]]:
        return ((one.header, one.path) for one in self.spool.series(study_uid, series_uid))

    def lacks(self, study_uid: str, series_uid: str) -> bool:
        return self.here.ledger.lacks(study_uid, series_uid)

    def count(self, calling_ae: str, study_uid: str, series_uid: str, answer: Callable[[int | None], None]) -> bool:
        return self.counter.ask(calling_ae, study_uid, series_uid, answer)

    def ended(self, study_uid: str, series_uid: str, instances: int | None) -> None:
        self.spool.end(study_uid, series_uid, instances)

    def adopt(self, study_uid: str, series_uid: str, sender: str, same: Collection[str]) -> Adoption:
        return self.spool.adopt(study_uid, series_uid, sender, same)


def series_closed(here: Node, closed: ClosedSeries, accepts: Accepts, dispatch: Dispatch) -> None:
    """Find the route of a series that intake closed, ask its method, and record the analyses that are due.

    Raises
    ------
    OSError
        Its files are there and none can be read now.
    """
    folder = closed.paths[0].parent
    if attempts(folder) >= MOST_ATTEMPTS:
        _record(here, _Judged(replace(closed, complete=False), [set_aside(here, folder)], None, False), dispatch)
        return
    before = begin_attempt(folder)
    try:
        _record(here, _judge(here, closed, accepts), dispatch)
    except (OSError, OperationalError):
        end_attempt(folder, before)  # no fault of the series: the disk or the ledger may be well again soon
        raise
    end_attempt(folder, 0)


@dataclass(frozen=True)
class _Judged:
    """What was decided about a closed series."""

    closed: ClosedSeries
    verdicts: list[Verdict]
    route: Route | None
    urgent: bool


def _judge(here: Node, closed: ClosedSeries, accepts: Accepts) -> _Judged:
    try:
        header = first_header(closed.paths)
        names = here.settings.peer_names(closed.calling_ae)
        route = next((route for route in here.settings.routes if route.takes(names, header)), None)
        urgent = _urgent(header) or (route is not None and route.urgent)
        return _Judged(closed, _verdicts(closed, route, accepts), route, urgent)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            if closed.offered_for_s < UNREADABLE_S:
                raise  # it may pass (EMFILE, EIO, ESTALE): the assembly offers the series again
            # Not complete, so that its sender, or the next start, may bring it again.
            because = f"incomplete: what was kept of it cannot be read; {closed.reason}"
            where = closed.paths[0].parent.relative_to(here.settings.data)
            hint = f"repair the disk, or remove {where}, then send the series again"
            why = f"not analysed: none of its files can be read ({logs.plainly(error)}); {hint}"
            return _Judged(replace(closed, complete=False, reason=because), [Verdict(False, why)], None, False)
        # Whatever is wrong with its header, the series must come to an end that can be seen.
        why = f"not analysed: its header cannot be read ({logs.plainly(error)})"
        return _Judged(closed, [Verdict(False, why)], None, False)


def _record(here: Node, judged: _Judged, dispatch: Dispatch) -> None:
    closed, verdicts, route = judged.closed, judged.verdicts, judged.route
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
            complete=closed.complete,
            closed_because=closed.reason,
            verdict=decision,
        )
        if series is None:
            log.info("received again, unchanged", series=closed.series_instance_uid)
            return
        record_event(session, series.id, EventKind.RECEIVED, instances=len(closed.paths), reason=closed.reason)
        record_event(session, series.id, EventKind.TRIAGED, decision=decision)
        for verdict in verdicts:
            if route is not None and (verdict.analyse or (verdict.tell and route.tell_not_analysed)):
                series.analyses.append(
                    AnalysisJob(
                        route=route.name,
                        method=route.analysis,
                        urgent=judged.urgent,
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
    _dispatch(dispatch, due)


def _verdicts(closed: ClosedSeries, route: Route | None, accepts: Accepts) -> list[Verdict]:
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


def conflict_found(here: Node, conflict: Conflict) -> None:
    """Record that another peer sent something else of a series than the peer that it belongs to."""
    with here.ledger() as session:
        mine = select(Series).where(
            Series.study_instance_uid == conflict.study_instance_uid,
            Series.series_instance_uid == conflict.series_instance_uid,
        )
        row = session.scalars(mine.order_by(Series.id.desc()).limit(1)).first()
        if row is not None and any(_is_known(event, conflict) for event in row.events):
            return
        if row is not None:
            record_event(
                session,
                row.id,
                EventKind.CONFLICT,
                belongs_to=conflict.belongs_to,
                sender=conflict.sender,
                address=conflict.address or "an unknown address",
                differing=conflict.differing,
                extra=conflict.extra,
                held=conflict.held,
            )
    hint = "find out why two peers send different content under the same UIDs; `lungnode status` has what to do"
    log.warning(
        "conflict between senders of a series",
        series=conflict.series_instance_uid,
        belongs_to=conflict.belongs_to,
        calling_ae=conflict.sender,
        address=conflict.address,
        differing=conflict.differing,
        extra=conflict.extra,
        hint=hint,
    )


def _is_known(event: Event, conflict: Conflict) -> bool:
    """Whether a conflict was recorded before, whatever the address that its sender called from.

    What is found on disk after a restart, without an address, was mostly recorded when it came, and in full.
    """
    if event.kind != EventKind.CONFLICT or event.data["sender"] != conflict.sender:
        return False
    counts = (conflict.differing, conflict.extra, conflict.held)
    return not conflict.address or tuple(event.data[name] for name in ("differing", "extra", "held")) == counts


def _urgent(header: Dataset) -> bool:
    """Whether the Requested Procedure Priority (0040,1003) says so, of the image or of its request (PS3.3 C.4.11)."""
    requests = header.get("RequestAttributesSequence") or ()
    return any(str(one.get("RequestedProcedurePriority") or "") in ("STAT", "HIGH") for one in (header, *requests))
