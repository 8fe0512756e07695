"""Redis flushed, restarted without what it held, and unreachable: nothing is forgotten, work goes on after."""

from __future__ import annotations

import gc
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from conftest import Orthanc, fault_rounds, free_port, tool, wait_for
from steps import SOCKET_S
from whole_node import whole_node

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(7200),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]


class Redis:
    """A redis-server that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self.start()

    def start(self) -> None:
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self.process = subprocess.Popen([tool("redis-server"), *settings], stdout=subprocess.DEVNULL)
        wait_for(self._answers, 20, "redis-server")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def flush(self) -> None:
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def _answers(self) -> bool:
        with suppress(redis.RedisError), redis.Redis(port=self.port) as client:
            return bool(client.ping())
        return False


@contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    server = Redis(folder)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.kill()


def test_redis_flushed_restarted_and_unreachable_forgets_nothing(tmp_path: Path, orthanc: Orthanc) -> None:
    with (
        running_redis(tmp_path) as server,
        whole_node(tmp_path / "node", orthanc, broker=f"redis://127.0.0.1:{server.port}/0") as node,
    ):
        node.send(1)
        for _ in range(20):  # again and again, so that no bell survives
            server.flush()
            time.sleep(0.1)
        node.send(2)
        server.kill()
        time.sleep(2)
        server.start()
        server.process.send_signal(signal.SIGSTOP)  # unreachable: connections hang instead of being refused
        node.send(3)
        # Minutes in the long run; longer than every timeout towards Redis in the short one.
        time.sleep(SOCKET_S + 2 + min(162, 2 * fault_rounds(0)))
        server.process.send_signal(signal.SIGCONT)
        node.wait_until_finished(3, 240)
        node.prove()
        gc.collect()
