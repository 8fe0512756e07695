"""A whole node that can be killed piece by piece, a sender that repeats what was not acknowledged, and the proof."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from conftest import REPOSITORY, Orthanc, free_port, wait_for
from pydicom import dcmread

from models.phantom.draw import Phantom, phantom
from node.config import Peer
from node.delivery.peer import Outgoing, contexts_for, store
from node.images.phantom_series import write_series
from node.ledger.ledger import Ledger
from node.ledger.views import SeriesView, all_series
from node.network.associations import PeerError, association

KINDS = ["infection-seg", "lung-seg", "sr", "capture"]

#: Pieces of a node, by words of their command line; 'everything' is the supervisor, with which all the others die.
PIECES = {
    "listener": ("listen",),
    "analyse worker": ("work", "analyse"),
    "deliver worker": ("work", "deliver"),
    "broker": ("redis-server",),
}


@functools.cache
def chest() -> Phantom:
    """A small chest, the same for all series."""
    return phantom(3, severity=2, shape=(40, 48, 48), spacing=(5.0, 7.5, 7.5))


@dataclass
class WholeNode:
    """`lungnode up`, quick, with Orthanc as its PACS."""

    folder: Path
    orthanc: Orthanc
    settings: dict[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    #: SOP instance UID → file, of all that was acknowledged.
    acknowledged: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        pacs = {"ae_title": self.orthanc.ae_title, "host": "127.0.0.1", "port": self.orthanc.port, "may": ["receive"]}
        settings = {
            "data": str(self.data),
            "listener": {
                "ae_title": "LUNGNODE",
                "host": "127.0.0.1",
                "port": self.port,
                "accept": "any",
                "quiet_period_s": 3,
                "disk_floor_mb": 0,
            },
            "peers": {"pacs": pacs},
            "routes": [{"name": "chest", "to": {"pacs": KINDS}}],
            **self.settings,
        }
        (self.folder / "node.yaml").write_text(json.dumps(settings))

    @property
    def data(self) -> Path:
        return self.folder / "var"

    @property
    def log(self) -> str:
        return (self.folder / "node.log").read_text()[-6000:]

    def start(self) -> None:
        here = REPOSITORY / "tests" / "faults"
        path = f"{here / 'quick'}:{here}:{REPOSITORY}"
        hold = {"LUNGNODE_FAULT_HOLD": str(self._hold)}
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **hold}
        with (self.folder / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "node", "up", "--config", self.folder / "node.yaml"],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                left = list(self.pieces())
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"asked to stop, but after 120 s there still are: {left}\n{self.log}") from None

    def wait_until_it_listens(self) -> None:
        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        with suppress_fail(lambda: self.log):
            wait_for(listens, 240, "the listener")

    def pieces(self) -> dict[str, list[psutil.Process]]:
        """The running processes of each piece; a worker's pool child is a piece of its own."""
        assert self.process is not None
        found: dict[str, list[psutil.Process]] = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    words = " ".join(child.cmdline())
                    for name, wanted in PIECES.items():
                        if all(word in words for word in wanted):
                            found.setdefault(name, []).append(child)
                            if name == "analyse worker":
                                found.setdefault("pool child", []).extend(child.children())
        return found

    def kill(self, name: str) -> bool:
        """kill -9 of one piece, or of everything, which is then started again; false when it is not running now."""
        assert self.process is not None
        if name == "everything":
            self.process.kill()
            self.process.wait()
            self.start()
            return True
        victims = self.pieces().get(name, [])
        for victim in victims:
            with suppress(psutil.Error):
                victim.kill()
        return bool(victims)

    @property
    def _hold(self) -> Path:
        return self.folder / "hold"

    def hold_at(self, step: str) -> None:
        """Ask the first process that comes to a step (`quick/sitecustomize.py`) to stand still there."""
        self._hold.with_suffix(".held").unlink(missing_ok=True)
        part = self._hold.with_suffix(".asked")
        part.write_text(step)
        part.rename(self._hold)

    def holds(self, seconds: float) -> bool:
        """Wait until a process stands at that step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._hold.with_suffix(".held").exists():
                return True
            time.sleep(0.05)
        return False

    def go_on(self) -> None:
        """Let it go on, or nobody stand still any more."""
        for left in (self._hold, self._hold.with_suffix(".held")):
            left.unlink(missing_ok=True)

    def send(self, seed: int, seconds: float = 180) -> None:
        """Send a series, and again what was not acknowledged, or all of it where no release was, as a modality does."""
        paths = write_series(chest(), self.folder / "ct" / str(seed), seed)
        items = [Outgoing.read(path) for path in paths]
        peer = Peer(ae_title="LUNGNODE", host="127.0.0.1", port=self.port)
        deadline = time.monotonic() + seconds
        left, released = list(items), False
        while not released:
            assert time.monotonic() < deadline, f"not acknowledged in {seconds} s; the log:\n{self.log}"
            with suppress(PeerError), association(peer, "SCANNER", contexts_for(items)) as made:
                while left:
                    store(made, left[0])
                    item = left.pop(0)
                    self.acknowledged[item.sop_instance_uid] = item.path
                made.release()
                released = made.is_released
            if not released:
                left = left or list(items)
                time.sleep(0.3)

    def series(self) -> list[SeriesView]:
        """What the ledger says."""
        ledger = Ledger(f"sqlite:///{self.data / 'ledger.sqlite'}")
        try:
            return all_series(ledger)
        finally:
            ledger.engine.dispose()

    def wait_until_finished(self, series: int, seconds: float) -> None:
        """Wait until the newest generation of so many series is analysed and delivered and nothing is owed."""

        def finished() -> bool:
            newest: dict[str, SeriesView] = {}
            everything = self.series()
            for one in everything:
                newest.setdefault(one.series_instance_uid, one)
            return (
                len(newest) == series
                and all(one.state == "delivered" for one in newest.values())
                and not {one.state for one in everything} & {"waiting", "running", "delivering"}
            )

        with suppress_fail(lambda: f"{[one.state for one in self.series()]}\n{self.log}"):
            wait_for(finished, seconds, f"{series} series to be delivered")

    def prove(self) -> str:
        """Every acknowledged instance is there, byte for byte; every object that was made is in Orthanc, once.

        Nothing is left on its way. Gives the numbers.
        """
        spool = {path.stem: path for path in (self.data / "spool").glob("*/*/*.dcm")}
        assert spool.keys() == self.acknowledged.keys()
        for uid, sent in self.acknowledged.items():
            assert dataset_bytes(spool[uid]) == dataset_bytes(sent)
        delivered: list[str] = []
        for one in self.series():
            complete = one.state == "delivered"
            kinds = [made.kind for analysis in one.analyses for made in analysis.objects]
            assert len(kinds) == len(set(kinds))
            if complete:
                assert {"lung-seg", "sr", "capture"} <= set(kinds)
            delivered += [
                made.sop_instance_uid
                for analysis in one.analyses
                for made in analysis.objects
                for delivery in made.deliveries
                if delivery.state == "done"
            ]
        there = self.orthanc.get("/instances", expand="").json()
        assert sorted(one["MainDicomTags"]["SOPInstanceUID"] for one in there) == sorted(delivered)
        assert list((self.data / "spool" / "incoming").glob("*")) == []
        assert list(self.data.rglob("*.part")) == []
        return (
            f"{len(spool)} instances acknowledged, all on disk byte for byte and no other; "
            f"{len(there)} objects made, each once in Orthanc and no other; 0 temporary files"
        )


@contextmanager
def whole_node(folder: Path, orthanc: Orthanc, **settings: Any) -> Iterator[WholeNode]:
    """One that runs, and is stopped at the end."""
    node = WholeNode(folder, orthanc, settings)
    node.start()
    try:
        node.wait_until_it_listens()
        yield node
    finally:
        node.stop()


def dataset_bytes(path: Path) -> bytes:
    """A file without its meta information, which is the receiver's own."""
    head = dcmread(path, specific_tags=[], stop_before_pixels=True).file_meta
    return path.read_bytes()[128 + 4 + 12 + int(head.FileMetaInformationGroupLength) :]


def chance(seed: int) -> random.Random:
    return random.Random(seed)


@contextmanager
def suppress_fail(more: Any) -> Iterator[None]:
    """Let a failure say more than it knew."""
    import pytest

    try:
        yield
    except pytest.fail.Exception as error:
        pytest.fail(f"{error}\n{more()}")
