"""The processes of a node on one machine: started together, started again when one dies, stopped together."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import structlog

log = structlog.get_logger(__name__)

#: Seconds for which a process may finish what it is doing (an analysis on a slow machine) before it is stopped hard.
STOP_S = 60.0

#: Seconds after which one that has not ended is asked again.
ASK_AGAIN_S = 2.0

#: Seconds for which a process may be stopped hard before it is killed.
HARD_STOP_S = 5.0

#: Seconds to wait before a process that died is started again; doubles up to the second while it keeps dying.
RESTART_S = (1.0, 60.0)

#: How a process of ours starts another `lungnode`. `-P`: `-m` would put the working folder first among the places of
#: modules, and a `node/` or `models/` that lies there would run in place of ours.
LUNGNODE = (sys.executable, "-P", "-m", "node")

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


def settle() -> None:
    """Have the garbage collector leave alone what has been loaded so far.

    It goes through everything when a quarter has been added to what was there. Beside all that imports leave that takes
    hundreds of series, and their associations, which pynetdicom ties in cycles, would hold their buffers meanwhile.
    """
    gc.collect()
    gc.freeze()


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
        Name → arguments of `lungnode`, in the order in which they are asked to stop.
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
        """Start all, restart what dies, until `stop`; then stop them."""
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
                    [*LUNGNODE, *command],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches us alone; we stop the others
                    preexec_fn=dies_with_parent,
                )

    def _stop(self, stop: StopSignal) -> None:
        """Ask all at once, the listener first as it must take nothing more; stop hard who has not ended in time."""
        asked, deadline = stop.count, time.monotonic() + STOP_S
        children = [self._running[name] for name in self._commands if name in self._running]
        while time.monotonic() < deadline and stop.count == asked:
            # Again and again: a Celery worker that is still starting forgets the first.
            for child in children:
                child.send_signal(signal.SIGTERM)  # none is sent to one that has ended
            if _ended(children, min(deadline, time.monotonic() + ASK_AGAIN_S), lambda: stop.count != asked):
                return
        for child in children:
            # SIGQUIT is Celery's cold shutdown: its pool goes too. The ledger still owes the work.
            child.send_signal(signal.SIGQUIT)
        _ended(children, time.monotonic() + HARD_STOP_S)
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _ended(
    children: Sequence[subprocess.Popen[bytes]], deadline: float, hurry: Callable[[], bool] = lambda: False
) -> bool:
    """Wait for all together, until the deadline or a hurry."""
    while any(child.poll() is None for child in children):
        if time.monotonic() >= deadline or hurry():
            return False
        time.sleep(0.05)
    return True
