"""kill -9 of listener, workers, pool child, broker, and everything at once, while series come in and go out."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Orthanc, Story, fault_rounds, fault_seed
from steps import STEPS
from whole_node import PIECES, whole_node

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(14400),
    # pynetdicom drops the sockets of connections that failed without closing them; Python closes them, and warns.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

VICTIMS = [*PIECES, "pool child", "everything"]


def test_kill_of_any_piece_at_any_time_loses_and_doubles_nothing(
    tmp_path: Path, orthanc: Orthanc, story: Story
) -> None:
    """A series a round, and two deaths: one at any time, one of any piece while another stands at a named step."""
    rounds, chance = fault_rounds(2), random.Random(fault_seed())
    at_random = _in_any_order(chance, VICTIMS, rounds)
    at_a_step = _in_any_order(chance, list(itertools.product(STEPS, VICTIMS)), rounds)
    killed, steps = Counter[str](), Counter[str]()
    with whole_node(tmp_path / "node", orthanc) as node:
        for seed in range(1, rounds + 1):
            step, victim = at_a_step.pop()
            node.hold_at(step)
            sender = threading.Thread(target=node.send, args=(seed,))
            sender.start()
            time.sleep(chance.uniform(0, 3))
            killed[at_random[-1]] += node.kill(at_random.pop())
            if node.holds(90) and node.kill(victim):
                killed[victim] += 1
                steps[step] += 1
            node.go_on()
            sender.join()
            if seed % 2 == 0 or seed == rounds:
                node.wait_until_finished(seed, 300)
            story.progress(f"round {seed} of {rounds}, {killed.total()} killed; now '{victim}' at '{step}'")
            if seed % 10 == 0 or seed == rounds:
                numbers = node.prove()
                story.progress(numbers)
        story.result(f"{rounds} rounds, {killed.total()} killed: {_list(killed)}")
        story.result(f"{steps.total()} of them while a process stood at a step: {_list(steps)}")
        story.result(numbers)
        gc.collect()


def _in_any_order(chance: random.Random, what: list[Any], count: int) -> list[Any]:
    """So many of these, each as often as any other, in an order of chance."""
    return [one for _ in range(-(-count // len(what))) for one in chance.sample(what, len(what))][:count]


def _list(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counted.most_common())
