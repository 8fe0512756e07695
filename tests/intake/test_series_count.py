"""The count of a real archive, and of one that does not answer."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Orthanc, free_port, tool, wait_for
from made_instances import SERIES, STUDY, dataset, save
from pydicom import Dataset
from pynetdicom import AE, evt

from node.config import Peer
from node.intake import series_count
from node.intake.series_count import Counter, count_instances

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


def test_an_archive_that_answers_without_end_is_left() -> None:
    def matches(event: evt.Event) -> Iterator[tuple[int, Dataset]]:
        while not event.is_cancelled and event.assoc.is_established:
            yield 0xFF00, event.identifier

    ae = AE("PACS")
    ae.add_supported_context(series_count.QUERY_MODEL)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, matches)])
    told: queue.Queue[int | None] = queue.Queue()
    peer = Peer(ae_title="PACS", host="127.0.0.1", port=server.server_address[1])
    threading.Thread(target=lambda: told.put(count_instances(peer, "LUNGNODE", STUDY, SERIES)), daemon=True).start()
    try:
        assert told.get(timeout=10) is None
    finally:
        server.shutdown()


@contextmanager
def deaf_archive() -> Iterator[tuple[Peer, list[socket.socket]]]:
    """One that takes connections and never says a word; the peer and the connections."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        try:
            yield Peer(ae_title="PACS", host="127.0.0.1", port=server.getsockname()[1]), taken
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in taken:
                one.close()


def test_series_that_arrives_in_many_associations_is_asked_for_once_and_a_stop_waits_for_no_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(series_count, "TIMEOUT_S", 1.0)
    told: list[str] = []
    with deaf_archive() as (peer, taken):
        counter = Counter({"PACS": peer}, "LUNGNODE")
        for n in range(series_count.AT_ONCE):
            assert counter.ask("PACS", STUDY, f"1.{n}", lambda _count: None)
        wait_for(lambda: len(taken) == series_count.AT_ONCE, 10, "all threads to ask")
        for n in range(500):
            assert counter.ask("PACS", STUDY, SERIES, lambda _count, n=n: told.append(f"again {n}"))
        wait_for(lambda: len(told) > 0, 10, "the one answer")
        assert (told, len(taken)) == (["again 499"], series_count.AT_ONCE + 1)
        for n in range(500):
            assert counter.ask("PACS", STUDY, f"2.{n}", lambda _count: told.append("late"))
        wait_for(lambda: len(taken) > series_count.AT_ONCE + 1, 10, "the next question")
        begun = time.monotonic()
        counter.stop()
        assert not counter.ask("PACS", STUDY, SERIES, lambda _count: None)
        counter._threads.shutdown()  # as the interpreter does at its end: it waits for what is under way
        assert time.monotonic() - begun < 8
        assert len(told) <= 1 + series_count.AT_ONCE
