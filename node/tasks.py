"""Where the stages meet: the Celery app and its tasks.

A task carries the id of a row in the ledger and is only a bell: it claims the row by a lease, does one stage's work,
and writes the outcome in one transaction. A bell that is lost is rung again by the sweep.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog
from celery import Celery, signals
from kombu.exceptions import OperationalError
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from redis.exceptions import RedisError
from sqlalchemy.orm import Session

from models.registry import load_bundle
from models.runtime import CardMemoryError
from node import permissions
from node.analysis import priors
from node.config import Settings, load
from node.delivery import superseding
from node.delivery.outbox import Outbox
from node.files import retention
from node.images.volume import Volume, VolumeError
from node.intake.header import HeaderError
from node.intake.received import read_received
from node.ledger.store import Analysis, Delivery, Lease, Ledger, Object, Series, State
from node.methods.pneumonia import pipeline
from node.methods.pneumonia.findings import Findings
from node.methods.pneumonia.serialise import summary
from node.operations.supervisor import settle
from node.paths import valid_uid, within
from node.results import makers
from node.results.forms import FALLBACK, Profile
from node.telemetry import logs

if TYPE_CHECKING:
    from models.segmenter.inference import Segmenter

log = structlog.get_logger(__name__)

#: The ledger's file in the data folder.
LEDGER = "ledger.sqlite"

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


@dataclass(frozen=True)
class Node:
    """The settings of this installation and the places where its things lie."""

    settings: Settings
    ledger: Ledger

    @classmethod
    def open(cls, settings: Settings) -> Node:
        """Make the folders and the ledger's tables where they are missing."""
        for folder in ("spool", "results"):
            (settings.data / folder).mkdir(parents=True, exist_ok=True)
        permissions.close(settings.data)
        ledger = Ledger(f"sqlite:///{settings.data / LEDGER}")
        ledger.migrate()
        return cls(settings, ledger)

    @property
    def spool(self) -> Path:
        """Folder of received instances."""
        return self.settings.data / "spool"

    @property
    def results(self) -> Path:
        """Folder of the objects that analyses made."""
        return self.settings.data / "results"


@functools.cache
def node() -> Node:
    """This process's node, by the settings that `LUNGNODE_CONFIG` names."""
    return Node.open(load())


@functools.cache
def segmenter(
    device: str, lungs: str = "lungs", infection: str = "infection", installed: Path | None = None
) -> Segmenter:
    """The networks of the pneumonia analysis, loaded once in a process; `installed` holds models of one's own."""
    from models.runtime import keep_memory
    from models.segmenter.inference import Segmenter  # torch takes seconds to import; only the analyse worker needs it

    chosen = None if device == "auto" else device
    keep_memory()
    return Segmenter(load_bundle(lungs, installed), load_bundle(infection, installed), chosen)


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
        if lease is None or _gave_way(here, lease):
            return
        work = _begin(here, row)
        made = _make(here, work)
        bells = _recorded(here, lease, work, made)
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


@dataclass(frozen=True)
class _Work:
    """What an analysis needs of its rows."""

    row: int
    series_uid: str
    paths: list[Path]
    part: makers.Part
    note: str
    folder: Path
    #: What each peer gets, and in which form, by the peer's name.
    profiles: dict[str, Profile]
    tell: bool
    not_analysed: str | None
    gave_up: str | None
    content_at: datetime


@dataclass(frozen=True)
class _Made:
    """What an analysis came to."""

    state: State
    reason: str
    objects: list[makers.ResultObject]
    summary: dict[str, Any] | None = None


def _gave_way(here: Node, lease: Lease) -> bool:
    """End an analysis in whose place a later generation's stands: one that was under way when that came, and failed."""
    with here.ledger.read() as session:
        reason = superseding.overtaken(session, session.get_one(Analysis, lease.row))
    if reason is None:
        return False
    with lease.finish("superseded", reason) as session:
        here.ledger.tell_of(session, session.get_one(Analysis, lease.row), reason)
    return True


def _begin(here: Node, row: int) -> _Work:
    with here.ledger() as session:
        analysis = session.get_one(Analysis, row)
        series: Series = analysis.series
        now = datetime.now(UTC).astimezone()
        if analysis.content_at is None:
            analysis.content_at = now.timestamp()
        again = f", attempt {analysis.attempts}" if analysis.attempts > 1 else ""
        what = "started" if analysis.gave_up is None else "making the objects that tell the study of it"
        here.ledger.tell_of(session, analysis, f"{what}{again}")
        return _Work(
            row,
            series.series_instance_uid,
            [within(here.spool, name) for name in analysis.instances or series.instances],
            makers.Part(analysis.acquisition, series.analyses.index(analysis)),
            analysis.note,
            within(here.results, valid_uid(series.series_instance_uid), f"{series.generation}-{analysis.id}"),
            {peer: here.settings.profile(peer, kinds) for peer, kinds in analysis.destinations.items()},
            analysis.tell,
            analysis.not_analysed,
            analysis.gave_up,
            datetime.fromtimestamp(analysis.content_at, now.tzinfo),
        )


def _recorded(here: Node, lease: Lease, work: _Work, made: _Made) -> set[str]:
    """Record what an analysis came to, in one transaction; gives the peers to whom something is owed."""
    notes: dict[_Outdated, makers.ResultObject] = {}
    while True:
        try:
            with lease.finish(made.state, made.reason) as session:
                analysis = session.get_one(Analysis, work.row)
                _add_objects(here, session, analysis, work, made)
                superseding.supersede(here.ledger, session, analysis)
                session.flush()
                analysis.objects += _rejection_notes(here, session, analysis, notes)
                return {delivery.peer for one in analysis.objects for delivery in one.deliveries}
        except _NoteLackingError as lacking:
            # Nothing is recorded yet. The file is written here, where nobody waits for the ledger meanwhile.
            notes[lacking.outdated] = _write_note(work, lacking.outdated)


def _add_objects(here: Node, session: Session, analysis: Analysis, work: _Work, made: _Made) -> None:
    analysis.summary = made.summary
    known = {one.sop_instance_uid for one in analysis.objects}  # from before a retry by hand
    new = [one for one in made.objects if one.sop_instance_uid not in known]
    analysis.objects += [_as_row(here, one, work.profiles) for one in new]
    here.ledger.tell_of(session, analysis, made.reason)
    for one in new:
        if one.problems:
            here.ledger.tell(session, analysis.series_id, "check", analysis.about(f"{one.kind} {_stopped(one)}"))
    session.flush()


def _make(here: Node, work: _Work) -> _Made:
    """Analyse and build; a series that cannot be analysed gets the objects that say so."""
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.gave_up is not None:
        told = _not_analysed(work, "the analysis failed; the administrator of lungnode can see why")
        return _Made("failed", f"failed: {work.gave_up}", told.objects)
    if work.not_analysed is not None:
        return _not_analysed(work, work.not_analysed)
    try:
        volume, findings = _segmented(here, work)
    except VolumeError as refusal:
        return _not_analysed(work, str(refusal))
    if work.note:
        findings = replace(findings, notes=(work.note, *findings.notes))
    before = priors.results_of(here.ledger, here.spool, work.row, findings.models)
    profiles = _with_fallback(work.profiles)
    made = makers.build(
        volume,
        findings,
        None,
        work.folder,
        profiles,
        content_datetime=work.content_at,
        earlier=before,
        part=work.part,
    )
    return _Made("done", outcome(findings), made, summary(findings, volume))


def _segmented(here: Node, work: _Work) -> tuple[Volume, Findings]:
    """The analysis, on the CPU when the card has too little memory for it."""
    told, wanted = _told(here, work), here.settings
    models = (wanted.models.lungs, wanted.models.infection, wanted.installed_models)
    try:
        return pipeline.analyse(work.paths, segmenter(wanted.worker.device, *models), told)
    except CardMemoryError as error:
        log.warning("analysed on the CPU", series=work.series_uid, because=str(error))
        with here.ledger() as session:
            here.ledger.tell_of(session, session.get_one(Analysis, work.row), f"goes on on the CPU: {error}")
        return pipeline.analyse(work.paths, segmenter("cpu", *models), told)


def _told(here: Node, work: _Work) -> Callable[[str, float], None]:
    """A progress callback that writes an event line whenever a new stage begins."""
    told: set[str] = set()

    def progress(stage: str, _done: float) -> None:
        if stage not in told:
            told.add(stage)
            with here.ledger() as session:
                here.ledger.tell_of(session, session.get_one(Analysis, work.row), stage)

    return progress


def _not_analysed(work: _Work, reason: str) -> _Made:
    if not work.tell:
        return _Made("refused", f"not analysed: {reason}", [])
    headers = _headers(work.paths)
    profiles = _with_fallback(work.profiles)
    made = makers.not_analysed(headers, reason, work.folder, profiles, content_datetime=work.content_at, part=work.part)
    return _Made("refused", f"not analysed: {reason}", made)


def first_header(paths: Sequence[Path]) -> Dataset:
    """The header of the first file that can be read: the analysis says, and tries again, where one of them cannot.

    Raises
    ------
    OSError
        None can be read. `FileNotFoundError` when they are all gone.
    """
    errors: list[OSError] = []
    for path in paths:
        try:
            return read_received(path)
        except OSError as error:
            errors.append(error)
    raise next((one for one in errors if not isinstance(one, FileNotFoundError)), errors[0])


def _headers(paths: list[Path]) -> list[Dataset]:
    """Headers of the files that can be read, as one that cannot may be why the analysis failed.

    Raises
    ------
    OSError, InvalidDicomError, HeaderError
        None can be read.
    """
    headers, errors = list[Dataset](), list[Exception]()
    for path in paths:
        try:
            headers.append(read_received(path))
        except (OSError, InvalidDicomError, HeaderError) as error:
            errors.append(error)
    if errors and not headers:
        raise errors[0]
    return headers


def outcome(findings: Findings) -> str:
    """The findings in one line."""
    share, scan = findings.both.infected_share, findings.scan
    if not findings.lesion_list:
        return f"lungs {findings.both.volume_ml:.0f} ml, no infection found"
    return (
        f"lungs {findings.both.volume_ml:.0f} ml, infected {findings.both.infected_ml:.0f} ml ({share:.1%}), "
        f"longest run {scan.consecutive.longest_run} slices, {scan.intensity.grade}"
    )


def _with_fallback(profiles: dict[str, Profile]) -> list[Profile]:
    """What the peers get, and the capture of each: it goes where a peer refuses the rest."""
    return [*profiles.values(), *(replace(one, kinds=(FALLBACK,)) for one in profiles.values())]


def _as_row(here: Node, made: makers.ResultObject, profiles: dict[str, Profile]) -> Object:
    """The object, and what is owed of it; one that did not pass its check is refused before it is sent."""
    peers = [peer for peer, profile in profiles.items() if profile in made.profiles]
    ended: dict[str, Any] = {}
    if made.problems:
        ended = {"state": "refused", "reason": _stopped(made), "finished_at": time.time()}
    return Object(
        kind=made.kind,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        path=str(made.path.relative_to(here.results)),
        deliveries=[Delivery(peer=peer, **ended) for peer in peers],
    )


def _stopped(made: makers.ResultObject) -> str:
    return f"stopped before sending, as its check failed: {'; '.join(made.problems)}"


#: The objects that a rejection note names, in their order.
_Outdated = tuple[tuple[str, str, str], ...]


class _NoteLackingError(Exception):
    """Peers have to be told of outdated objects, and no note that names just those is written yet."""

    def __init__(self, outdated: _Outdated) -> None:
        super().__init__(f"{len(outdated)} objects")
        self.outdated = outdated


def _rejection_notes(
    here: Node, session: Session, analysis: Analysis, notes: dict[_Outdated, makers.ResultObject]
) -> list[Object]:
    """Notes that name what the objects of this analysis outdate, for the peers that act on them.

    Raises
    ------
    _NoteLackingError
        One of them is not among `notes`: more may have been sent since those were written.
    """
    wanted: dict[_Outdated, list[str]] = {}  # what several peers have is named in one note, by its one UID
    for name, peer in sorted(here.settings.peers_that_may("receive").items()):
        objects = superseding.outdated_at(session, analysis, name) if peer.rejection_notes else []
        if objects:
            named = tuple((one.sop_class_uid, one.sop_instance_uid, one.series_instance_uid) for one in objects)
            wanted.setdefault(named, []).append(name)
    rows, there = [], {one.sop_instance_uid: one for one in analysis.objects}  # from before a retry by hand
    for outdated, peers in wanted.items():
        if outdated not in notes:
            raise _NoteLackingError(outdated)
        row = there.get(notes[outdated].sop_instance_uid)
        if row is None:
            row = _as_row(here, notes[outdated], {})
            rows.append(row)
        told = {delivery.peer for delivery in row.deliveries}
        row.deliveries += [Delivery(peer=name) for name in peers if name not in told]
    return rows


def _write_note(work: _Work, outdated: _Outdated) -> makers.ResultObject:
    header = first_header(work.paths)
    digest = hashlib.sha256(repr(outdated).encode()).hexdigest()[:8]
    return makers.rejection_note(header, outdated, work.folder, f"rejection-note-{digest}", work.content_at, work.part)


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
