"""Bytes that nobody meant: malformed files, mutated data sets and arbitrary PDUs, over the wire and through the reader.

Each gets an answer and leaves nothing behind: no crash, no thread, no file that was not acknowledged.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, fault_rounds, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_instances import SERIES, STUDY, dataset, dataset_bytes, encoded
from raw_peer import RELEASE, RawPeer, pdu, pdv, request, store, store_command
from test_listener import Node

from node.images.elements import HeaderError
from node.intake.header import read_header
from node.intake.transport import DIRECT, STOCK

pytestmark = pytest.mark.timeout(300)

EXPLICIT = "1.2.840.10008.1.2.1"
STATUSES = {0x0000, 0xA900, 0xB000, 0xC000}

#: Seconds for one data set; MB more than before that the listener may hold after all of them.
LIMIT_S, LIMIT_MB = 5.0, 100


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A listener that is still well in the end."""
    threads = threading.active_count()
    transport = getattr(request, "param", DIRECT)
    one = Node(tmp_path_factory.mktemp("fuzz"), transport=transport, max_associations=200)
    yield one
    with RawPeer(one.listener.port) as friend:
        assert friend.associate() == 2
        friend.send(store(f"{SERIES}.99", encoded(dataset(98))))
        assert friend.status() == 0
        friend.send(RELEASE)
    wait_for(lambda: one.listener.associations == 0, 20, "associations to end")
    assert list(one.spool.root.glob("incoming/*")) == []
    one.listener.stop()
    wait_for(lambda: threading.active_count() <= threads, 20, "threads to end")


@pytest.fixture(scope="module")
def malformed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The 599 malformed files, and the zoo."""
    folder = tmp_path_factory.mktemp("malformed")
    with tarfile.open(data_dir / "fuzz" / "fuzz_corpus_v3.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    files = [path for root in (folder, data_dir / "dicom-zoo") for path in sorted(root.rglob("*")) if path.is_file()]
    assert len(files) > 850
    return files


@pytest.mark.parametrize("node", [DIRECT, STOCK], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.data
def test_every_malformed_file_gets_a_status(node: Node, malformed: list[Path]) -> None:
    answers, slowest, ended = Counter[int](), 0.0, 0
    stock = node.listener.options.transport == STOCK
    before = psutil.Process().memory_info().rss
    peer = _associated(node)
    for path in malformed:
        raw, uid = _split(path.read_bytes())
        begin = time.monotonic()
        peer.send(store(uid, raw, size=100_000))
        status = peer.status()
        slowest = max(slowest, time.monotonic() - begin)
        if stock and status is None:  # pynetdicom may end the association where it cannot read the request
            ended += 1
            peer.socket.close()
            peer = _associated(node)
            continue
        assert status in STATUSES, path
        answers[status] += 1
        if status == 0:
            (kept,) = node.spool.root.glob(f"*/*/{uid}.dcm")
            assert dataset_bytes(kept.read_bytes()) == raw, path
    peer.send(RELEASE)
    peer.socket.close()
    assert slowest < LIMIT_S
    assert (psutil.Process().memory_info().rss - before) >> 20 < LIMIT_MB
    assert sum(answers.values()) == len(malformed) - ended
    assert ended < 5
    assert set(answers) == STATUSES


def _associated(node: Node) -> RawPeer:
    peer = RawPeer(node.listener.port, timeout=LIMIT_S)
    assert peer.associate() == 2
    return peer


def _split(file: bytes) -> tuple[bytes, str]:
    """The data set of a file, or all of what is none, and the SOP instance UID that our reader finds in it."""
    raw = file
    with suppress(Exception):
        if file[128:132] == b"DICM":
            raw = dataset_bytes(file)
    try:
        return raw, read_header(raw, EXPLICIT).sop_instance_uid
    except HeaderError:
        return raw, "1.2.3"


READER = """
import resource, signal, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
from node.images.volume import VolumeError, read_volume
from node.network.settings import configure
configure()
def too_long(*_):
    raise SystemExit("too long")
signal.signal(signal.SIGALRM, too_long)
for path in sys.stdin.read().splitlines():
    signal.alarm(20)
    try:
        read_volume([Path(path)])
    except (VolumeError, OSError):
        pass
    except BaseException as error:
        print(type(error).__name__, str(error)[:80], path, flush=True)
print("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.data
def test_the_reader_refuses_what_it_cannot_read_in_bounded_time_and_memory(malformed: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER],
        input="\n".join(map(str, malformed)),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    *faults, end = done.stdout.splitlines() or [f"it crashed: {done.returncode} {done.stderr[-300:]}"]
    assert faults == []
    assert end.startswith("done"), end


RAW = encoded(dataset(0))
COMMAND = store_command(f"{SERIES}.1")
#: Bytes of PDUs as they should be, or bent a little, or not at all.
WELL_MEANT = (
    pdu(4, pdv(3, COMMAND)),
    pdu(4, pdv(2, RAW)),
    pdu(4, pdv(0, RAW[:99])),
    RELEASE,
    pdu(7, bytes(4)),
    request(),
)


@st.composite
def bent(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with some overwritten, cut out or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.binary(max_size=8))
        data[at : at + draw(st.integers(0, 8))] = what
    return bytes(data)


PDUS = st.lists(
    st.sampled_from(WELL_MEANT).flatmap(bent)
    | st.sampled_from(WELL_MEANT)
    | st.builds(pdu, st.integers(0, 8), st.binary(max_size=60))
    | st.binary(max_size=60),
    max_size=6,
)
HARNESS = settings(
    max_examples=max(60, fault_rounds(0) * 50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("node", [DIRECT, STOCK], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@HARNESS
@given(associate=st.booleans(), parts=PDUS)
def test_any_bytes_end_in_an_answer_or_an_end(node: Node, associate: bool, parts: list[bytes]) -> None:
    with RawPeer(node.listener.port, timeout=LIMIT_S) as peer:
        if associate:
            assert peer.associate() == 2
        with suppress(ConnectionError):
            peer.send(*parts)
            peer.socket.shutdown(1)
        with suppress(ConnectionError):
            while peer.socket.recv(65536):  # a TimeoutError here is a peer that is left hanging
                pass


@pytest.mark.parametrize("node", [DIRECT, STOCK], indirect=True)
@HARNESS
@given(raw=bent(RAW[:900]).flatmap(lambda head: st.just(head + RAW[900:]) | bent(head)))
def test_any_data_set_has_a_status_and_is_kept_as_it_is_or_not_at_all(node: Node, raw: bytes) -> None:
    uid = _split(raw)[1]
    with RawPeer(node.listener.port, timeout=LIMIT_S) as peer:
        assert peer.associate() == 2
        peer.send(store(uid, raw))
        status = peer.status()
        assert status in STATUSES
        if status == 0:
            (kept,) = node.spool.root.glob(f"*/*/{uid}.dcm")
            assert dataset_bytes(kept.read_bytes()) == raw
        assert not (node.spool.root / STUDY).exists() or list(node.spool.root.glob("incoming/*")) == []
        peer.send(RELEASE)
        assert peer.answer()[0] == 6
