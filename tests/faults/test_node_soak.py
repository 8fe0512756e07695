"""Many small series through the whole path: memory stays flat, nothing is left behind."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis
from conftest import Orthanc, Story, fault_rounds
from whole_node import WholeNode, whole_node

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(14400),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

#: Series a round: 500 in the long run of a hundred rounds.
SERIES = 5
FEW = 3

#: kB a series that a process may grow by, over a run that is long enough to tell.
GROWTH_KB = 50.0
LONG = 100


@dataclass(frozen=True)
class Measured:
    """One piece of the node at one time."""

    series: int
    pids: tuple[int, ...]
    memory_kb: float
    threads: int
    files: int


def measure(node: WholeNode, series: int) -> dict[str, Measured]:
    """What each piece holds now."""
    return {
        name: Measured(
            series,
            tuple(one.pid for one in processes),
            sum(one.memory_info().rss for one in processes) / 1024,
            sum(one.num_threads() for one in processes),
            sum(one.num_fds() for one in processes),
        )
        for name, processes in node.pieces().items()
    }


def late(points: list[Measured]) -> list[Measured]:
    """The later half of the longest time for which a piece was the same process: caches are full by then."""
    lives = [list(life) for _, life in itertools.groupby(points, lambda point: point.pids)]
    longest = max(lives, key=len)
    return longest[len(longest) // 2 :]


def test_memory_is_flat_and_nothing_is_left_behind(tmp_path: Path, orthanc: Orthanc, story: Story) -> None:
    count = SERIES * fault_rounds(0) or FEW
    measured: dict[str, list[Measured]] = {}
    with whole_node(tmp_path / "node", orthanc) as node:
        for seed in range(1, count + 1):
            node.send(seed)
            if seed % SERIES == 0 or seed == count:
                node.wait_until_finished(seed, 120)
                for name, point in measure(node, seed).items():
                    measured.setdefault(name, []).append(point)
                sizes = ", ".join(f"{name} {points[-1].memory_kb / 1024:.1f} MB" for name, points in measured.items())
                story.progress(f"series {seed} of {count}: {sizes}")
        story.result(f"{count} series: {node.prove()}")
        with redis.Redis.from_url((node.data / "broker" / "url").read_text()) as broker:
            assert [broker.llen(queue) for queue in ("analyse", "deliver")] == [0, 0]
        processes = [one for found in node.pieces().values() for one in found]
        node.stop()
        assert [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
        assert list(node.data.rglob("*.part")) == []
        story.result("queues empty; after the stop no process and no temporary file is left")
        gc.collect()
    for name, points in measured.items():
        end = late(points)
        series = [point.series for point in end]
        slope = float(np.polyfit(series, [point.memory_kb for point in end], 1)[0]) if len(end) > 1 else 0.0
        story.result(
            f"{name}: {points[-1].memory_kb / 1024:.0f} MB, {slope:+.1f} kB a series over series {series[0]} to "
            f"{series[-1]}; threads {end[0].threads} to {end[-1].threads}, files {end[0].files} to {end[-1].files}"
        )
        if count >= LONG:
            assert slope < GROWTH_KB, f"{name} grows by {slope:.1f} kB a series"
            assert end[-1].threads <= end[0].threads + 2, f"{name} gathers threads"
            assert end[-1].files <= end[0].files + 5, f"{name} gathers open files"
