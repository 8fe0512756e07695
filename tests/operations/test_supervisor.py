"""The supervisor, with processes that end as the listener and the workers do: soon, late, or not at all."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import wait_for

from node.operations import supervisor
from node.operations.supervisor import StopSignal, Supervisor

#: `python -m node NAME SECONDS` of the tests: notes each signal that it gets, and ends so many seconds after SIGTERM.
#: As the listener does, it leaves SIGQUIT to the system, unless it is the analyse worker.
STAND_IN = """
import os, signal, sys, threading, time
name, seconds = sys.argv[1], float(sys.argv[2])
asked = threading.Event()

def note(what):
    with open("told", "a") as told:
        told.write(f"{time.monotonic()} {name} {what}\\n")

def term(*_):
    if not asked.is_set():
        note("asked")
    asked.set()

signal.signal(signal.SIGTERM, term)
if name == "analyse":
    signal.signal(signal.SIGQUIT, lambda *_: (note("quit"), os._exit(1)))
note("started")
asked.wait()
time.sleep(seconds)
note("ended")
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of what the stand-ins noted."""
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "__init__.py").touch()
    (tmp_path / "node" / "__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)  # where they note
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervisor, "RESTART_S", (0.1, 60.0))
    return tmp_path / "told"


def notes(told: Path) -> list[tuple[float, str, str]]:
    lines = told.read_text().splitlines() if told.exists() else []
    return [(float(at), name, what) for at, name, what in (line.split() for line in lines)]


def count(told: Path, what: str) -> int:
    return sum(one == what for _, _, one in notes(told))


@contextmanager
def running(**seconds: float) -> Iterator[tuple[Supervisor, StopSignal]]:
    """A supervisor of stand-ins that take so many seconds to end; stopped at the end of the block."""
    supervisor = Supervisor({name: [name, str(length)] for name, length in seconds.items()}, {})
    stop = StopSignal()
    thread = threading.Thread(target=supervisor.run, args=(stop,))
    thread.start()
    try:
        yield supervisor, stop
    finally:
        stop(signal.SIGTERM, None)
        thread.join()


def test_all_are_asked_at_once_and_each_has_the_whole_time(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 2.0)
    with running(listen=0.2, analyse=60, deliver=1.0):
        wait_for(lambda: count(told, "started") == 3, 10, "all to run")
        begun = time.monotonic()
    took = time.monotonic() - begun
    what = {(name, did): at - begun for at, name, did in notes(told)}
    assert all(what[name, "asked"] < 1.0 for name in ("listen", "analyse", "deliver"))
    assert {name for name, did in what if did == "ended"} == {"listen", "deliver"}  # though the analysis took too long
    assert 2.0 <= what["analyse", "quit"] <= took < 2.0 + supervisor.HARD_STOP_S


def test_listener_that_was_started_again_is_still_asked_first(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    with running(listen=0.0, deliver=0.0) as (supervisor, _):
        wait_for(lambda: count(told, "started") == 2, 10, "both to run")
        supervisor._running["listen"].kill()
        wait_for(lambda: count(told, "started") == 3, 10, "the listener to run again")
        for name, child in supervisor._running.items():
            send = child.send_signal
            monkeypatch.setattr(child, "send_signal", lambda number, n=name, send=send: (asked.append(n), send(number)))
    assert asked[:2] == ["listen", "deliver"]


def test_second_signal_stops_at_once(told: Path) -> None:
    with running(analyse=60) as (_, stop):
        wait_for(lambda: count(told, "started") == 1, 10, "it to run")
        stop(signal.SIGINT, None)
        wait_for(lambda: count(told, "asked") == 1, 10, "it to be asked")
        begun = time.monotonic()
    assert time.monotonic() - begun < 1.5
    assert count(told, "quit") == 1
