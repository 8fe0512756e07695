"""Many small series through the whole path: memory stays flat, nothing is left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis
from conftest import Orthanc, fault_rounds
from whole_node import WholeNode, whole_node

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(14400),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

#: Series a round: 500 in the long run of a hundred rounds.
SERIES = 5

#: MB a series that a process may grow by, over the second half of a run that is long enough to tell.
GROWTH_MB = 0.05
LONG = 100


def memory(node: WholeNode) -> dict[str, float]:
    """Resident MB of each piece."""
    found = {}
    for name, processes in node.pieces().items():
        found[name] = sum(one.memory_info().rss for one in processes) / 2**20
    return found


def test_memory_is_flat_and_nothing_is_left_behind(tmp_path: Path, orthanc: Orthanc) -> None:
    count = SERIES * fault_rounds(1)
    measured: dict[str, list[tuple[int, float]]] = {}
    with whole_node(tmp_path / "node", orthanc) as node:
        for seed in range(1, count + 1):
            node.send(seed)
            if seed % SERIES == 0:
                node.wait_until_finished(seed, 120)
                for name, mb in memory(node).items():
                    measured.setdefault(name, []).append((seed, mb))
        node.wait_until_finished(count, 120)
        node.prove()
        with redis.Redis.from_url((node.data / "broker" / "url").read_text()) as broker:
            assert [broker.llen(queue) for queue in ("analyse", "deliver")] == [0, 0]
        node.nothing_left_behind()
        processes = [one for found in node.pieces().values() for one in found]
        node.stop()
        assert [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
        gc.collect()
    for name, points in measured.items():
        late = points[len(points) // 2 :]
        slope = float(np.polyfit(*zip(*late, strict=True), 1)[0]) if len(late) > 1 else 0.0
        print(f"{name}: {points[-1][1]:.0f} MB, {slope:+.3f} MB a series over the last {len(late) * SERIES}")
        if count >= LONG:
            assert slope < GROWTH_MB, f"{name} grows by {slope:.3f} MB a series"
