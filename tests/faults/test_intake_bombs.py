"""Objects that are small on the wire and large when read, and a series at which the listener dies: a real listener."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY, Story, free_port, wait_for
from made_instances import SERIES, STUDY, dataset, encoded
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import Verification
from raw_peer import RELEASE, RawPeer, pdu, pdv, store_command
from sqlalchemy.exc import OperationalError
from test_spool import store

from node.intake.spool import Spool
from node.ledger import views
from node.ledger.ledger import Ledger
from node.ledger.tables import Series

MB = 1 << 20

#: MB that the listener may take in all of these tests; it takes about 120 when idle.
MOST_MEMORY = 300


@dataclass
class Running:
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def peak_mb(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) >> 10

    def series(self) -> dict[str, Series]:
        return ledger_of(self.folder)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, instance: str, *pieces: bytes, syntax: str = ExplicitVRLittleEndian) -> int | None:
        """C-STORE of an instance, in pieces that need not be in memory together; gives the status."""
        with RawPeer(self.port, timeout=60) as peer:
            assert peer.associate(transfer_syntax=syntax) == 2
            peer.send(pdu(4, pdv(3, store_command(instance))))
            for piece in pieces:
                for at in range(0, len(piece), 60_000):
                    peer.send(pdu(4, pdv(0, piece[at : at + 60_000])))
            peer.send(pdu(4, pdv(2, b"")))
            answer = peer.status()
            peer.send(RELEASE)
            peer.answer()
        return answer

    def answers_echo(self) -> bool:
        ae = AE("CT1")
        ae.add_requested_context(Verification)
        association = ae.associate("127.0.0.1", self.port, ae_title="LUNGNODE")
        answered = association.is_established and association.send_c_echo().Status == 0
        association.release()
        return bool(answered)


def ledger_of(folder: Path) -> dict[str, Series]:
    ledger = Ledger(f"sqlite:///{folder / 'var' / 'ledger.sqlite'}")
    try:
        return {one.series_instance_uid: one for one in views.all_series(ledger)}
    except OperationalError:
        return {}  # it has no tables yet
    finally:
        ledger.engine.dispose()


@contextmanager
def listening(folder: Path, **environment: str) -> Iterator[Running]:
    """`lungnode listen`, not waited for."""
    port = free_port()
    listener = {"host": "127.0.0.1", "port": port, "accept": "any", "quiet_period_s": 1, "disk_floor_mb": 0}
    settings = {"data": str(folder / "var"), "listener": listener, "broker": "redis://127.0.0.1:1/0"}
    (folder / "node.yaml").write_text(json.dumps(settings))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "node", "listen", "--config", folder / "node.yaml"],
            env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", **environment},
            stdout=log,
            stderr=log,
        )
    try:
        yield Running(folder, port, process)
    finally:
        process.kill()
        process.wait()


def element(tag: int, vr: bytes, value: bytes = b"", length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, length) + value


def item(value: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(value)) + value


class Deflated:
    """A raw deflate stream of parts, some of them many times over, without the whole in memory."""

    def __init__(self, *parts: tuple[bytes, int]) -> None:
        stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        pieces = []
        for part, times in parts:
            at_once = max(1, min(times, MB // len(part)))
            block = part * at_once
            pieces += [stream.compress(block) for _ in range(times // at_once)]
            pieces.append(stream.compress(part * (times % at_once)))
        self.bytes = b"".join([*pieces, stream.flush()])


def head(series: str, **changes: object) -> bytes:
    """The data set of an instance up to its pixels."""
    ds = dataset(0, series=series)
    del ds.PixelData
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return encoded(ds)


PLACE = item(element(0x00209113, b"SQ", item(struct.pack("<HH2sH", 0x20, 0x32, b"DS", 6) + b"0\\0\\0 ")))
NESTED = element(0x52011010, b"SQ", length=0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
TINY = struct.pack("<HH2sH", 0x5201, 0x1010, b"LO", 0)


def bombs() -> dict[str, bytes]:
    """Series → a deflated instance, by what it bursts with."""
    frames = 60 * MB // len(PLACE)
    groups = element(0x52009230, b"SQ", length=frames * len(PLACE))
    empty = element(0x52009230, b"SQ", length=30 * MB)
    pixels = element(0x7FE00010, b"OW", length=1024 * MB)
    parts: dict[str, list[tuple[bytes, int]]] = {
        "zeros": [(pixels, 1), (bytes(MB), 1024)],
        "places": [(groups, 1), (PLACE, frames)],
        "items": [(empty, 1), (item(b""), 30 * MB // 8)],
        "nested": [(NESTED, 3_000_000)],
        "tiny": [(TINY, 7_000_000)],
        "private": [(element(0x7FDF1010, b"OB", length=200 * MB), 1), (bytes(MB), 200)],
    }
    counts = {"places": frames, "items": 30 * MB // 8}
    series = {name: f"{SERIES}.{n}" for n, name in enumerate(parts, 1)}
    return {
        uid: Deflated((head(uid, NumberOfFrames=counts.get(name, 1)), 1), *parts[name]).bytes
        for name, uid in series.items()
    }


def test_bombs_from_several_peers_at_once_cost_the_listener_little_and_hold_up_no_other_series(
    tmp_path: Path, story: Story
) -> None:
    with listening(tmp_path) as node:
        sent = bombs()
        assert max(map(len, sent.values())) < 5 * MB
        wait_for(node.listens, 30, "the listener")
        answers: dict[str, int | None] = {}

        def send(uid: str, raw: bytes) -> None:
            answers[uid] = node.send(f"{uid}.1", raw, syntax=DeflatedExplicitVRLittleEndian)

        # A large private element between header and pixels, as it comes, twice.
        large = [f"{SERIES}.98", f"{SERIES}.99"]
        threads = [threading.Thread(target=send, args=one) for one in sent.items()]
        for thread in threads:
            thread.start()
        for uid in large:
            private, pixels = element(0x52011010, b"OB", length=200 * MB), element(0x7FE00010, b"OW", bytes(64))
            assert node.send(f"{uid}.1", head(uid), private, *[bytes(MB)] * 200, pixels) == 0
        for thread in threads:
            thread.join()
        assert node.send(f"{SERIES}.1", encoded(dataset(0))) == 0
        assert node.answers_echo()
        assert set(answers.values()) <= {0, 0xC000}
        stored = {uid for uid, answer in answers.items() if answer == 0}
        assert len(stored) >= 3
        wait_for(lambda: {SERIES, *large, *stored} <= node.series().keys(), 30, "the series to be closed")
        story.result(f"the listener took {node.peak_mb()} MB at most")
        assert node.peak_mb() < MOST_MEMORY
        assert node.process.poll() is None


DIES = """
import os
from node.intake import closing
judge = closing._judge
def dies(here, closed, accepts):
    if closed.series_instance_uid == os.environ["DIES"]:
        os.kill(os.getpid(), 9)
    return judge(here, closed, accepts)
closing._judge = dies
"""


def test_a_series_at_whose_closing_the_listener_dies_is_set_aside_and_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES)
    (tmp_path / "var" / "spool").mkdir(parents=True)
    deadly, good = f"{SERIES}.0.6", f"{SERIES}.7"
    spool = Spool(tmp_path / "var" / "spool")
    for uid in (deadly, good):
        raw = encoded(dataset(0, series=uid))
        kept = store(spool, raw=raw, series_uid=uid, sop_uid=f"{uid}.1").path
        spool.end(STUDY, uid, 1)
    deaths = 0
    while deaths < 10:
        with listening(tmp_path, DIES=deadly) as node:
            wait_for(lambda: node.process.poll() is not None or len(node.series()) == 2, 30, "a death or both series")
            if node.process.returncode is None:
                assert node.answers_echo()
                break
            assert node.process.returncode == -signal.SIGKILL
            deaths += 1
    assert deaths == 3
    row = ledger_of(tmp_path)[deadly]
    assert row.verdict.startswith("not analysed: set aside, as the listener failed or ended 3 times")
    assert f"spool/{STUDY}/{deadly}" in row.verdict
    assert (kept.parents[1] / deadly / f"{deadly}.1.dcm").exists()
    assert row.state == "failed"
    said = subprocess.run(
        [sys.executable, "-m", "node", "status", "--config", tmp_path / "node.yaml"],
        env={**os.environ, "COLUMNS": "400", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    ).stdout
    assert "set aside" in said
    assert "send the series again" in said
