"""Death at each named step of the work, a full disk, a ledger that cannot be written: in the end all is done, once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, series_closed
from made_instances import host
from pacs import BadPacs, bad_pacs
from pydicom.uid import (
    BasicTextSRStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)
from structlog.testing import capture_logs
from typer.testing import CliRunner
from whole_node import chest

from node import recording, tasks
from node.cli.folder import closed_folder
from node.cli.main import app
from node.config import Settings
from node.delivery.peer import ByAssociation
from node.images.phantom_series import write_series
from node.installation import LEDGER, Node
from node.intake import assembly as assembly_module
from node.intake.assembly import Assembly, AssociationId
from node.intake.spool import Spool
from node.ledger.leases import MAX_ANALYSIS_ATTEMPTS, Lease
from node.ledger.views import all_series
from node.results import makers

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

CLASSES = (BasicTextSRStorage, MultiFrameTrueColorSecondaryCaptureImageStorage, SecondaryCaptureImageStorage)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return make_node(tmp_path / "var", monkeypatch)


def make_node(data: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node whose series has a gap, so that it is told about and needs no network."""
    peers = {"pacs": {"ae_title": "BAD", "host": "127.0.0.1", "port": 104}}
    route = {"name": "chest", "to": {"pacs": ["sr", "capture"]}}
    here = Node.open(Settings.model_validate({"data": data, "peers": peers, "routes": [route]}), timeouts=SHORT)
    monkeypatch.setattr(tasks, "node", lambda: here)
    monkeypatch.setattr(tasks, "dispatch", lambda *_: None)
    return here


def receive(here: Node) -> None:
    folder = here.spool / "1.2" / "1.3"
    paths = write_series(chest(), folder, 3)
    paths[20].unlink()
    (closed,) = closed_folder(folder)
    series_closed(here, closed)


def work_on(here: Node, pacs: BadPacs, seconds: float = 30, until: str = "not analysed") -> None:
    """Do what a sweep would dispatch, until nothing is due."""
    settings = here.settings.model_copy(update={"peers": {"pacs": pacs.peer()}})
    object.__setattr__(here, "settings", settings)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(Exception):
            for row in here.ledger.analyses_due():
                tasks.analyse(row)
            for peer in here.ledger.peers_due():
                tasks.deliver(peer)
            (series,) = all_series(here.ledger)
            if series.state == until and not {one.state for one in series.deliveries} & {"waiting", "running"}:
                return
        time.sleep(0.05)
    pytest.fail(f"still due after {seconds} s: {[one.state for one in all_series(here.ledger)]}")


def prove(here: Node, pacs: BadPacs) -> None:
    (series,) = all_series(here.ledger)
    made = [one.sop_instance_uid for analysis in series.analyses for one in analysis.objects]
    assert sorted(set(pacs.stored)) == sorted(made)
    assert len(made) == 2
    assert {one.state for one in series.deliveries} == {"done"}
    assert list(here.results.rglob(".*")) == []
    assert sorted(path.name for path in here.results.rglob("*.dcm")) == ["capture.dcm", "sr.dcm"]


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def then_die(function: Callable[..., Any]) -> Callable[..., Any]:
    def after(*arguments: Any, **named: Any) -> Any:
        function(*arguments, **named)
        die()

    return after


@contextmanager
def finish_then_die(lease: Lease, *arguments: Any) -> Iterator[Any]:
    with FINISH(lease, *arguments) as session:
        yield session
    die()


FINISH = Lease.finish

#: Step → what dies there, and how.
ANALYSIS_STEPS = {
    "taken": (recording, "begin", die),
    "begun": (recording, "begin", then_die(recording.begin)),
    "one object written": (makers, "_write", then_die(makers._write)),
    "all objects written": (Lease, "finish", die),
    "in the midst of the record": (recording, "rejection_notes", die),
    "recorded, not dispatched": (Lease, "finish", finish_then_die),
}
DELIVERY_STEPS = {
    "taken": (ByAssociation, "send", die),
    "sent, not recorded": (ByAssociation, "send", then_die(ByAssociation.send)),
    "in the midst of the record": (Lease, "finish", die),
    "recorded": (Lease, "finish", finish_then_die),
}


def run_and_die(step: tuple[Any, str, Any], work: Callable[[], None]) -> None:
    """Do the work in a process that kills itself at a step."""
    child = os.fork()
    if child == 0:
        owner, name, replacement = step
        setattr(owner, name, replacement)
        with suppress(BaseException):
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", ANALYSIS_STEPS)
def test_analysis_that_dies_at_a_step_is_done_once(here: Node, step: str) -> None:
    receive(here)
    run_and_die(ANALYSIS_STEPS[step], lambda: tasks.analyse(1))
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)


def test_series_that_kills_its_worker_each_time_is_set_aside_and_retry_brings_it_back(here: Node) -> None:
    receive(here)
    for _ in range(MAX_ANALYSIS_ATTEMPTS):
        run_and_die((tasks, "_make", die), lambda: tasks.analyse(1))
        time.sleep(0.7)  # until the lease has run out
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs, until="failed")
        prove(here, pacs)
        (series,) = all_series(here.ledger)
        told = [event.text for event in series.events]
        assert "attempt 1 ended without a word: its process died or hung" in told
        how = "the log has how it ended (signal 9 is mostly too little memory)"
        assert f"set aside: its process died or hung at each of 6 attempts; {how}" in told
        assert series.to_do[0] == "correct what the reason says, then `lungnode retry 1` analyses it again"
        assert here.ledger.retry(1) == 1
        work_on(here, pacs)


@pytest.mark.parametrize("step", DELIVERY_STEPS)
def test_delivery_that_dies_at_a_step_leaves_one_object_each(here: Node, step: str) -> None:
    receive(here)
    tasks.analyse(1)
    serving = subprocess_pacs(here)
    with serving as pacs:
        run_and_die(DELIVERY_STEPS[step], lambda: tasks.deliver("pacs"))
        work_on(here, pacs)
        prove(here, pacs)


@contextmanager
def subprocess_pacs(here: Node) -> Iterator[BadPacs]:
    """A peer, entered in the settings before anything forks."""
    with bad_pacs(classes=CLASSES) as pacs:
        object.__setattr__(here, "settings", here.settings.model_copy(update={"peers": {"pacs": pacs.peer()}}))
        yield pacs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "lungnode", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here; run as root, with CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all space but `leave` bytes."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(bytes(max(0, free - leave)))
    return ballast


@pytest.mark.parametrize(("leave", "made"), [(0, []), (50_000, ["sr"]), (100_000, ["sr"]), (400_000, ["sr"])])
def test_full_disk_keeps_the_work_and_leaves_no_halves(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, leave: int, made: list[str]
) -> None:
    """With ever more room it fails at the ledger's first row, at that of a retry, or at the larger object."""
    here = make_node(small_disk / "var", monkeypatch)
    receive(here)
    ballast = fill(small_disk, leave)
    with capture_logs() as told:
        for _ in range(2):
            tasks.analyse(1)
            time.sleep(0.7)
    assert [line["event"] for line in told if line["log_level"] == "error"] == ["analyse failed"] * 2
    assert [path.stem for path in here.results.rglob("*.dcm")] == made
    works = [one for series in all_series(here.ledger) for one in series.analyses] if leave > 50_000 else []
    assert all("OSError ENOSPC (no space left on device)" in one.reason for one in works)
    ballast.unlink()
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)


def test_disk_that_is_full_when_results_are_recorded_keeps_the_work(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(small_disk / "var", monkeypatch)
    receive(here)
    ballast: list[Path] = []

    def full(*_: Any) -> list[Any]:
        ballast.append(fill(small_disk, 0))
        return []

    with monkeypatch.context() as patch, capture_logs() as told:
        patch.setattr(recording, "rejection_notes", full)  # the last before the commit
        tasks.analyse(1)
    assert [line["error"].split()[0] for line in told if line["event"] == "analyse failed"] == ["OperationalError"]
    (series,) = all_series(here.ledger)
    assert (series.state, series.analyses[0].objects) == ("running", ())
    ballast[0].unlink()
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)


def test_disk_that_is_full_when_a_delivery_is_recorded_leaves_one_object_each(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(small_disk / "var", monkeypatch)
    receive(here)
    tasks.analyse(1)
    ballast: list[Path] = []
    send = ByAssociation.send

    def full(*arguments: Any) -> str:
        warning = send(*arguments)
        ballast.append(fill(small_disk, 0))
        return warning

    with subprocess_pacs(here) as pacs:
        with monkeypatch.context() as patch, capture_logs() as told:
            patch.setattr(ByAssociation, "send", full)
            tasks.deliver("pacs")
        assert [line["error"].split()[0] for line in told if line["event"] == "deliver failed"] == ["OperationalError"]
        assert (len(pacs.stored), len(ballast)) == (1, 1)
        ballast[0].unlink()
        work_on(here, pacs)
        prove(here, pacs)
        assert len(pacs.stored) == 3  # the first again, under its UID


def test_disk_that_is_full_when_a_series_closes_leaves_it_open_until_it_can_be_recorded(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(small_disk / "var", monkeypatch)
    folder = here.spool / "1.2" / "1.3"
    paths = write_series(chest(), folder, 3)
    paths[20].unlink()
    assembly = Assembly(host(closed=lambda closed: series_closed(here, closed)), 0.0)
    assembly.restore(
        AssociationId(1, "CT", "LUNGNODE"), ((one.header, one.path) for one in Spool(here.spool).series("1.2", "1.3"))
    )
    ballast = fill(small_disk, 0)
    monkeypatch.setattr(assembly_module, "RETRY_S", 0.1)
    for _ in range(3):
        assembly.tick()
        time.sleep(0.15)
    ballast.unlink()
    assert (assembly.open_series, all_series(here.ledger)) == (1, [])
    assembly.tick()
    assert assembly.open_series == 0
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)


def test_status_on_a_full_disk_says_so(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(make_node(small_disk / "var", monkeypatch))
    fill(small_disk, 0)
    settings = small_disk.parent / "node.yaml"
    settings.write_text(f"data: {small_disk / 'var'}\n")
    told = CliRunner().invoke(app, ["status", "-c", str(settings)])
    assert told.exit_code == 1
    assert "what it holds is kept: 0 MB of disk are free" in told.output


def test_ledger_on_a_file_system_that_turned_read_only_goes_on_when_it_is_back(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(small_disk / "var", monkeypatch)
    receive(here)
    here.ledger.engine.dispose()
    remount = ["mount", "-o", "remount,{}", small_disk]
    done = subprocess.run([str(word).format("ro") for word in remount], capture_output=True)
    if done.returncode:
        pytest.skip("the file system cannot be made read-only here")
    with suppress(Exception):
        tasks.analyse(1)
    subprocess.run([str(word).format("rw") for word in remount], check=True)
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)


def test_ledger_locked_by_another_program_is_waited_for(here: Node) -> None:
    receive(here)
    other = sqlite3.connect(here.settings.data / LEDGER, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with suppress(Exception):
        tasks.analyse(1)
    timer = threading.Timer(1.5, other.execute, ("ROLLBACK",))
    timer.start()
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)
    timer.join()
    other.close()


def test_ledger_locked_in_the_midst_of_an_analysis_doubles_nothing(here: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(here)
    other = sqlite3.connect(here.settings.data / LEDGER, check_same_thread=False, isolation_level=None)
    made: list[str] = []
    write = makers._write

    def lock(*arguments: Any) -> Any:
        if not made:
            other.execute("BEGIN EXCLUSIVE")
        made.append(arguments[0])
        return write(*arguments)

    monkeypatch.setattr(makers, "_write", lock)
    with suppress(Exception):
        tasks.analyse(1)
    other.execute("ROLLBACK")
    with bad_pacs(classes=CLASSES) as pacs:
        work_on(here, pacs)
        prove(here, pacs)
    assert made[:2] == ["sr", "capture"]
    other.close()
