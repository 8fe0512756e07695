"""kill -9 of listener, workers, pool child, broker, and everything at once, while series come in and go out."""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path

import pytest
from conftest import Orthanc, fault_rounds, fault_seed
from whole_node import PIECES, whole_node

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(7200),
    # pynetdicom drops the sockets of connections that failed without closing them; Python closes them, and warns.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

VICTIMS = [*PIECES, "pool child", "everything"]


def test_kill_of_any_piece_at_any_time_loses_and_doubles_nothing(tmp_path: Path, orthanc: Orthanc) -> None:
    rounds, chance = fault_rounds(2), random.Random(fault_seed())
    with whole_node(tmp_path / "node", orthanc) as node:
        victims = [name for _ in range(rounds) for name in chance.sample(VICTIMS, len(VICTIMS))]
        for seed in range(1, rounds + 1):
            sender = threading.Thread(target=node.send, args=(seed,))
            sender.start()
            # As many deaths a round as keep the number of all of them in proportion to the rounds.
            for _ in range(2):
                time.sleep(chance.uniform(0, 4))
                node.kill(victims.pop())
            sender.join()
        node.wait_until_finished(rounds, 240 + 10 * rounds)
        node.prove()
        gc.collect()
