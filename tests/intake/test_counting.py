"""The count of a real archive, and of one that does not answer."""

from __future__ import annotations

import os
import queue
import subprocess
from pathlib import Path

import pytest
from conftest import Orthanc, free_port, tool
from made_instances import SERIES, STUDY, dataset, save

from node.config import Peer
from node.intake.counting import Counter, count_instances

#: A connection that is refused leaves pynetdicom a socket that nobody closes; Python closes it, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")


@pytest.mark.peer
def test_orthanc_counts_what_it_has(orthanc: Orthanc, tmp_path: Path) -> None:
    peer = Peer(ae_title=orthanc.ae_title, host="127.0.0.1", port=orthanc.port)
    assert count_instances(peer, "LUNGNODE", STUDY, SERIES) is None
    files = [save(dataset(n), tmp_path / f"{n}.dcm") for n in range(7)]
    command = [tool("storescu"), "-aec", orthanc.ae_title, "127.0.0.1", str(orthanc.port), *files]
    subprocess.run(command, check=True, env={**os.environ, "TCP_NODELAY": "1"})
    assert count_instances(peer, "LUNGNODE", STUDY, SERIES) == 7


def test_who_does_not_answer_tells_none_and_who_may_not_be_asked_is_not() -> None:
    told: queue.Queue[int | None] = queue.Queue()
    counter = Counter({"PACS": Peer(ae_title="PACS", host="127.0.0.1", port=free_port())}, "LUNGNODE")
    assert not counter.ask("CT1", STUDY, SERIES, told.put)
    assert counter.ask("PACS", STUDY, SERIES, told.put)
    assert told.get(timeout=20) is None
