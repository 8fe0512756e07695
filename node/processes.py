"""The processes of a node on one machine: started together, started again when one dies, stopped in order."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import structlog

log = structlog.get_logger(__name__)

#: Seconds for which a process may finish what it is doing (an analysis on a slow machine) before it is stopped hard.
STOP_S = 60.0

#: Seconds to wait before a process that died is started again; doubles up to the second while it keeps dying.
RESTART_S = (1.0, 60.0)

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec a child must not import or allocate more than it has to.
_libc = ctypes.CDLL(None, use_errno=True)


def dies_with_parent() -> None:
    """For `preexec_fn`: the child is killed when its parent is gone, also after kill -9 of the parent (Linux).

    A parent that ends well stops its children first. One that does not leaves nothing behind that the ledger would not
    take up again; SIGTERM could be missed by a child that is just starting.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StopSignal:
    """SIGINT and SIGTERM as an event; the count tells a second, impatient one."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.count = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        self.count += 1
        self.event.set()


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM for the length of the block."""
    caught = StopSignal()
    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Runs `lungnode` commands as children and keeps them running.

    Parameters
    ----------
    commands
        Name → arguments of `lungnode`, in the order in which they are stopped.
    environment
        Variables for the children beside ours.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str]) -> None:
        self._commands = dict(commands)
        self._environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._died: dict[str, int] = dict.fromkeys(commands, 0)
        self._start_at: dict[str, float] = dict.fromkeys(commands, 0.0)

    def run(self, stop: StopSignal, started: Callable[[], None] = lambda: None) -> None:
        """Start all, restart what dies, until `stop`; then stop them in order."""
        self._tend()
        started()
        while not stop.event.wait(0.2):
            self._tend()
        self._stop(stop)

    def _tend(self) -> None:
        now = time.monotonic()
        for name, command in self._commands.items():
            child = self._running.get(name)
            if child is not None and child.poll() is not None:
                del self._running[name]
                # One that ran for a while starts afresh at once; one that keeps dying waits longer each time.
                lived = now - self._start_at[name] > RESTART_S[1]
                self._died[name] = 1 if lived else self._died[name] + 1
                wait = min(RESTART_S[0] * 2 ** (self._died[name] - 1), RESTART_S[1])
                self._start_at[name] = now + wait
                log.error("process died", process=name, exit_status=child.returncode, starts_again_in_s=wait)
            if name not in self._running and now >= self._start_at[name]:
                self._start_at[name] = now
                self._running[name] = subprocess.Popen(
                    [sys.executable, "-m", "node", *command],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches us alone; we stop the others in order
                    preexec_fn=dies_with_parent,
                )

    def _stop(self, stop: StopSignal) -> None:
        asked, deadline = stop.count, time.monotonic() + STOP_S
        for child in self._running.values():
            # Again and again: a Celery worker that is still starting forgets the first.
            while child.poll() is None and time.monotonic() < deadline and stop.count == asked:
                child.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(2)
        for child in self._running.values():
            if child.poll() is None:
                # SIGQUIT is Celery's cold shutdown: its pool goes too. The ledger still owes the work.
                child.send_signal(signal.SIGQUIT)
        for child in self._running.values():
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
