"""kill -9 of the listener while instances come in: what was acknowledged is there, and nothing is there by halves."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, fault_rounds, fault_seed
from made_instances import SERIES, STUDY, dataset, dataset_bytes, encoded
from raw_peer import RawPeer, store

from node.intake.spool import Spool
from node.intake.transport import DIRECT, STOCK

SENDERS = 3
FIRST = 10_000_000

LISTENER = """
import sys, threading
from pathlib import Path
from node.intake.assembly import Assembly
from node.intake.admission import ListenerOptions
from node.intake.listener import Listener
from node.intake.series import Host
from node.intake.spool import Spool
from node.network.settings import configure
configure()
options = ListenerOptions(ae_title="LUNGNODE", port=0, host="127.0.0.1", transport=sys.argv[2])
listener = Listener(options, Spool(Path(sys.argv[1])), Assembly(Host(), 60))
listener.start()
print("port", listener.port, flush=True)
threading.Event().wait()
"""


class Sending:
    """Senders that go on until the listener is gone, and what was acknowledged to them."""

    def __init__(self, port: int, first: int) -> None:
        self.acknowledged: list[int] = []
        self._port = port
        self._numbers = iter(range(first, first + 10_000_000))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send) for _ in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        try:
            with RawPeer(self._port) as peer:
                if peer.associate() != 2:
                    return
                while True:
                    with self._lock:
                        n = next(self._numbers)
                    peer.send(store(name(n), instance(n)))
                    if peer.status() != 0:
                        return
                    self.acknowledged.append(n)
        except OSError:
            return

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)


def name(n: int) -> str:
    """SOP instance UID of instance `n`; all are of one length."""
    return f"{SERIES}.{FIRST + n}"


def instance(n: int) -> bytes:
    """The data set of instance `n`: up to 130 KB."""
    return _template(32 + n % 7 * 32).replace(name(0).encode(), name(n).encode())


@functools.cache
def _template(size: int) -> bytes:
    return encoded(dataset(FIRST - 1, size=size))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("transport", [DIRECT, STOCK])
def test_what_was_acknowledged_survives_a_killed_listener(tmp_path: Path, transport: str) -> None:
    chance, first, acknowledged = random.Random(fault_seed()), 0, set[int]()
    for _ in range(fault_rounds(3)):
        command = [sys.executable, "-c", LISTENER, str(tmp_path / "spool"), transport]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            port = next(int(line.split()[1]) for line in process.stdout if line.startswith("port"))
            sending = Sending(port, first)
            deadline = time.monotonic() + 10
            while not sending.acknowledged and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
            process.stdout.close()
        sending.join()
        assert sending.acknowledged
        acknowledged.update(sending.acknowledged)
        first = max(acknowledged) + SENDERS + 1
        visible = {path.stem: path.read_bytes() for path in (tmp_path / "spool" / STUDY / SERIES).glob("*.dcm")}
        for uid, file in visible.items():
            assert dataset_bytes(file) == instance(int(uid.rsplit(".", 1)[1]) - FIRST), uid
        assert {name(n) for n in acknowledged} <= visible.keys()
        # The next listener clears away what was on its way, and finds every instance again.
        spool = Spool(tmp_path / "spool")
        assert list(spool.root.glob("incoming/*")) == []
        assert len(spool.series(STUDY, SERIES)) == len(visible)
