"""Where the stages meet: the Celery app and its tasks.

A task carries the id of a row in the ledger and is only a bell: it claims the row by a lease, does one stage's work,
and writes the outcome in one transaction. A bell that is lost is rung again by the sweep.
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
from node.ledger.store import Analysis
from node.methods.outcome import plain
from node.operations.supervisor import settle
from node.results import makers
from node.telemetry import logs

log = structlog.get_logger(__name__)

#: Seconds after which an analysis is taken to hang, and its process is killed. On the slowest CPU that we know it takes
#: a minute or two.
ANALYSIS_LIMIT_S = 3600

#: Seconds between two looks at what the ledger still owes.
SWEEP_S = 2.0

#: Sweeps between two looks at how full the disk is, and between two clearings of what is old.
PRESSURE_SWEEPS = 300
RETENTION_SWEEPS = 1800

#: Analyses after which the process that does them is replaced, so that what a library leaks is bounded. Loading the
#: networks anew takes a few seconds.
ANALYSES_A_PROCESS = 100

#: Bells in a queue above which the sweep adds none: they would only pile up.
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

#: What a bell is rung for: an analysis by its row, a delivery by the peer to whom something is owed.
Bell = Literal["analyse", "deliver"]


def _task(name: Bell, **options: Any) -> Callable[[Callable[[Any], None]], Any]:
    """A Celery task that never raises: Celery would log the exception's text, which may hold patient data.

    What went wrong stands in the ledger by then, which owes the work again.
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
    """Analyse a series, or one that is more urgent, make its objects, and owe them to the peers of its route."""
    here = node()
    row = here.ledger.next_analysis(row)
    with here.ledger.lease("analyse", row) as lease:
        if lease is None or recording.gave_way(here, lease):
            return
        work = recording.begin(here, row)
        made = _make(here, work)
        bells = recording.record(here, lease, work, made)
        log.info("analysed", series=work.series_uid, outcome=made.reason)
    ring("deliver", bells)


@_task("deliver")
def deliver(peer: str) -> None:
    """Send what is owed to a peer."""
    here = node()
    me = here.settings.listener.ae_title
    Outbox(here.ledger, here.results, peer, here.settings.peers.get(peer), me, _stopping).work_off()


def ring(bell: Bell, what: Iterable[int | str]) -> None:
    """Tell the workers of work; without a broker it is left to the sweep."""
    try:
        for one in what:
            app.send_task(bell, (one,))
    except OperationalError:
        log.warning("the broker does not answer; the sweep will ring again")


def sweep(here: Node) -> None:
    """Ring again for what the ledger owes and nobody works on; harmless in any number of processes."""
    try:
        with app.connection_for_write(connect_timeout=2) as connection:
            analyses, deliveries = (_length(connection, queue) for queue in ("analyse", "deliver"))
    except (OperationalError, RedisError):
        log.warning("the broker does not answer; nothing is lost, work goes on when it is back")
        return
    if analyses < FULL_QUEUE:
        ring("analyse", here.ledger.analyses_owed())
    if deliveries < FULL_QUEUE:
        ring("deliver", here.ledger.peers_owed())


class Sweeper(threading.Thread):
    """Sweeps every few seconds until stopped."""

    def __init__(self, here: Node) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._here = here
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Sweep; an error is told and the next sweep goes on."""
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
    if work.gave_up is not None:
        failed = _not_analysed(work, "the analysis failed; the administrator of lungnode can see why")
        return recording.Made("failed", f"failed: {work.gave_up}", failed.objects)
    if work.not_analysed is not None:
        return _not_analysed(work, work.not_analysed)
    told, what = _told(here, work), run.Work(work.method, work.paths, work.note)
    try:
        volume, outcome = run.analyse(what, here.settings, told, lambda why: told(f"goes on on the CPU: {why}", 0.0))
    except VolumeError as refusal:
        return _not_analysed(work, str(refusal))
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
    return recording.Made("done", outcome.brief, made, plain(outcome))


def _told(here: Node, work: recording.Work) -> Callable[[str, float], None]:
    """A progress callback that writes an event line whenever a new stage begins."""
    told: set[str] = set()

    def progress(stage: str, _done: float) -> None:
        if stage not in told:
            told.add(stage)
            with here.ledger() as session:
                here.ledger.tell_of(session, session.get_one(Analysis, work.row), stage)

    return progress


def _not_analysed(work: recording.Work, reason: str) -> recording.Made:
    if not work.tell:
        return recording.Made("refused", f"not analysed: {reason}", [])
    made = makers.not_analysed(
        all_headers(work.paths),
        reason,
        work.folder,
        recording.with_fallback(work.profiles),
        content_datetime=work.content_at,
        part=work.part,
        subject=run.subject_of(work.method),
    )
    return recording.Made("refused", f"not analysed: {reason}", made)


def _length(connection: Any, queue: str) -> int:
    """Bells waiting in a queue; 0 for a queue that does not exist yet."""
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
