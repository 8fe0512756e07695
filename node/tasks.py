"""Where the stages meet: the Celery app and its tasks.

A task only notifies a worker of a row in the ledger: the worker claims the row by a lease, does one stage's work, and
records the outcome in one transaction. A notification that is lost is sent again by the sweep.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import structlog
from celery import Celery, signals
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from node import recording
from node.analysis import priors, run
from node.config import load
from node.delivery.outbox import Outbox
from node.files import retention
from node.images.headers import all_headers
from node.images.volume import VolumeError
from node.installation import Node
from node.ledger.events import EventKind
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob
from node.ledger.transitions import State
from node.methods.outcome import plain
from node.operations.supervisor import settle
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds after which an analysis is taken to hang, and its process is killed. On the slowest CPU that we know it takes
#: a minute or two.
ANALYSIS_LIMIT_S = 3600

#: Seconds between two looks at what is due by the ledger.
SWEEP_S = 2.0

#: Sweeps between two looks at how full the disk is, and between two clearings of what is old.
PRESSURE_SWEEPS = 300
RETENTION_SWEEPS = 1800

#: Analyses after which the process that does them is replaced, so that what a library leaks is bounded. Loading the
#: networks anew takes a few seconds.
ANALYSES_A_PROCESS = 100

#: Tasks in a queue above which the sweep adds none: they would only pile up.
FULL_QUEUE = 100

app = Celery("lungnode")
app.conf.update(
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    task_publish_retry=False,
    task_create_missing_queues=True,
    task_routes={"analyse": "analyse", "deliver": "deliver"},
    worker_prefetch_multiplier=1,
    worker_max_tasks_per_child=ANALYSES_A_PROCESS,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # a broker that is gone for a day must not end the workers
    broker_transport_options={"socket_connect_timeout": 2, "socket_timeout": 15},
)


@functools.cache
def node() -> Node:
    """This process's node, by the settings that `LUNGNODE_CONFIG` names."""
    return Node.open(load())


#: Set when this process is to end.
_stopping = threading.Event()

#: Names of the tasks: `analyse` carries the row of an analysis, `deliver` the peer for whom something is due.
Task = Literal["analyse", "deliver"]


def _task(name: Task, **options: Any) -> Callable[[Callable[[Any], None]], Any]:
    """A Celery task that never raises: Celery would log the exception's text, which may hold patient data.

    The ledger has recorded the error by then, and that the work is due again.
    """

    def register(function: Callable[[Any], None]) -> Any:
        @functools.wraps(function)
        def quiet(what: Any) -> None:
            try:
                function(what)
            except Exception as error:
                log.error(f"{name} failed", what=what, error=logs.plainly(error))

        return app.task(name=name, **options)(quiet)

    return register


@_task("analyse", time_limit=ANALYSIS_LIMIT_S)
def analyse(row: int) -> None:
    """Analyse a series, or one that is more urgent, make its objects, and record which peers get them."""
    here = node()
    row = here.ledger.next_analysis(row)
    with here.ledger.lease(AnalysisJob, row) as lease:
        if lease is None or recording.gave_way(here, lease):
            return
        work = recording.begin(here, row)
        made = _make(here, work)
        peers = recording.record(here, lease, work, made)
        log.info("analysed", series=work.series_uid, outcome=made.reason)
    dispatch("deliver", peers)


@_task("deliver")
def deliver(peer: str) -> None:
    """Send what is due for a peer."""
    here = node()
    me = here.settings.listener.ae_title
    Outbox(here.ledger, here.results, peer, here.settings.peers.get(peer), me, _stopping).work_off()


def dispatch(task: Task, what: Iterable[int | str]) -> None:
    """Notify the workers of work; without a broker it is left to the sweep."""
    try:
        for one in what:
            app.send_task(task, (one,))
    except OperationalError:
        log.warning("the broker does not answer; the sweep will dispatch again")


def sweep(here: Node) -> None:
    """Dispatch again what is due and nobody works on; harmless in any number of processes."""
    try:
        with app.connection_for_write(connect_timeout=2) as connection:
            analyses, deliveries = (_length(connection, queue) for queue in ("analyse", "deliver"))
    except (OperationalError, RedisError):
        log.warning("the broker does not answer; nothing is lost, work goes on when it is back")
        return
    if analyses < FULL_QUEUE:
        dispatch("analyse", here.ledger.analyses_due())
    if deliveries < FULL_QUEUE:
        dispatch("deliver", here.ledger.peers_due())


class Sweeper(threading.Thread):
    """Sweeps every few seconds until stopped."""

    def __init__(self, here: Node) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._here = here
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Sweep; an error is logged and the next sweep goes on."""
        for n in itertools.count():
            if self._stop_asked.wait(SWEEP_S):
                return
            try:
                if n % PRESSURE_SWEEPS == 0 and (warning := retention.pressure(self._here.settings)):
                    log.warning("the disk fills up", what=warning)
                if n % RETENTION_SWEEPS == RETENTION_SWEEPS - 1:
                    retention.drop_old(self._here.settings, self._here.ledger)
                sweep(self._here)
            except Exception as error:
                log.error("sweep failed", error=logs.plainly(error))

    def stop(self) -> None:
        """Stop after the sweep that is under way."""
        self._stop_asked.set()
        self.join()


def _make(here: Node, work: recording.Work) -> recording.Made:
    """Analyse and build; a series that cannot be analysed gets the objects that say so."""
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.failure is not None:
        failed = _not_analysed(work, "the analysis failed; the administrator of lungnode can see why")
        return recording.Made(State.FAILED, f"failed: {work.failure}", failed.objects)
    if work.not_analysed is not None:
        return _not_analysed(work, work.not_analysed)
    told, what = _told(here, work), run.Work(work.method, work.paths, work.note)
    try:
        volume, outcome = run.analyse(what, here.settings, told, lambda why: _on_cpu(here, work, why))
    except VolumeError as refusal:
        return _not_analysed(work, str(refusal))
    from node.results import makers  # highdicom and reportlab: only the analyse worker needs them

    made = makers.build(
        volume,
        outcome,
        None,
        work.folder,
        recording.with_fallback(work.profiles),
        content_datetime=work.content_at,
        earlier=priors.results_of(here.ledger, here.spool, work.row, outcome.models),
        part=work.part,
    )
    return recording.Made(State.DONE, outcome.brief, made, plain(outcome))


def _told(here: Node, work: recording.Work) -> Callable[[str, float], None]:
    """A progress callback that records an event whenever a new stage begins."""
    told: set[str] = set()

    def progress(stage: str, _done: float) -> None:
        if stage not in told:
            told.add(stage)
            with here.ledger() as session:
                analysis = session.get_one(AnalysisJob, work.row)
                record_event(session, analysis, EventKind.ANALYSIS_STAGE, stage=stage)

    return progress


def _on_cpu(here: Node, work: recording.Work, why: str) -> None:
    with here.ledger() as session:
        analysis = session.get_one(AnalysisJob, work.row)
        record_event(session, analysis, EventKind.CONTINUED_ON_CPU, reason=why)


def _not_analysed(work: recording.Work, reason: str) -> recording.Made:
    if not work.report:
        return recording.Made(State.REFUSED, f"not analysed: {reason}", [])
    from node.results import makers

    made = makers.not_analysed(
        all_headers(work.paths),
        reason,
        work.folder,
        recording.with_fallback(work.profiles),
        content_datetime=work.content_at,
        part=work.part,
        subject=run.subject_of(work.method),
    )
    return recording.Made(State.REFUSED, f"not analysed: {reason}", made)


def _length(connection: Any, queue: str) -> int:
    """Tasks waiting in a queue; 0 for a queue that does not exist yet."""
    return int(connection.default_channel.client.llen(queue))


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _log_our_way(**_: Any) -> None:
    logs.configure()


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _child_opens_its_own(**_: Any) -> None:
    node.cache_clear()
    faulthandler.enable()  # one that crashes in a library leaves its stack in the log; that holds no data
    # Torch's threads spin between operations unless told otherwise, and take the other worker's core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _has_loaded(**_: Any) -> None:
    settle()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _finish_what_is_under_way(**_: Any) -> None:
    _stopping.set()
