"""What several folders of tests share: the public data beside the checkout, free ports, real peers."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from node.delivery import outbox as outbox_module
from node.installation import LEDGER, Node
from node.intake import closing
from node.intake.assembly import ClosedSeries
from node.intake.verdict import Verdict
from node.ledger import views
from node.ledger.leases import Backoff, Timeouts
from node.ledger.ledger import Ledger
from node.ledger.transitions import Kind
from node.methods import registry
from node.network import associations
from node.network.settings import configure

configure()

# A machine that is busy with other work is no reason to fail.
hypothesis.settings.register_profile("lungnode", deadline=None)
hypothesis.settings.load_profile("lungnode")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the public data sets, or skip."""
    folder = Path(os.environ.get("LUNGNODE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "ct-series").is_dir():
        pytest.skip(f"public data not found at {folder}; set LUNGNODE_DATA to a folder that holds ct-series/")
    return folder


def fault_rounds(few: int) -> int:
    """How many rounds a test of chance runs: `few`, or as many as LUNGNODE_FAULT_ROUNDS says (`make faults`)."""
    return int(os.environ.get("LUNGNODE_FAULT_ROUNDS", few))


def fault_seed() -> int:
    """What chance begins with: LUNGNODE_FAULT_SEED, so that a failure can be run again; shown where a test fails."""
    seed = int(os.environ.get("LUNGNODE_FAULT_SEED", 1))
    print(f"LUNGNODE_FAULT_SEED={seed}")
    return seed


class Story:
    """What a test of chance says: how far it is, in the long run only, and what came of it, in pytest's summary."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._name = request.node.name
        self._capture = request.config.pluginmanager.getplugin("capturemanager")
        self._properties = request.node.user_properties
        self._start = time.monotonic()

    def progress(self, text: str) -> None:
        """Print at once, past pytest's capturing."""
        if "LUNGNODE_FAULT_ROUNDS" in os.environ:
            with self._capture.global_and_fixture_disabled():
                print(f"{time.monotonic() - self._start:7.0f} s  {self._name}: {text}", flush=True)

    def result(self, text: str) -> None:
        """Keep for the summary at the end; a property of the test, as these come from xdist's workers too."""
        self._properties.append((STORY, f"{self._name}: {text}"))


STORY = "story"


@pytest.fixture
def story(request: pytest.FixtureRequest) -> Story:
    """Where a test of chance says what it does."""
    return Story(request)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests of chance came to."""
    reports = [one for outcome in ("passed", "failed") for one in terminalreporter.stats.get(outcome, [])]
    if stories := [
        text for one in reports if one.when == "call" for name, text in one.user_properties if name == STORY
    ]:
        terminalreporter.section("what the tests of chance came to")
        for line in stories:
            terminalreporter.write_line(line)


#: Files of which each takes minutes, the longest first: begun last, one would run alone at the end, its worker's fellow
#: idle.
LONGEST = ("test_ohif", "test_node_killed", "test_journey", "test_node_steps", "test_node_broker", "test_node_soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    place = {f"{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


class Clock:
    """Stands in for the wall clock of a ledger."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


#: Timeouts of a ledger that a test has time for: a backoff of a fraction of a second, a fifth of one for a lock.
SHORT = Timeouts(lease_s=0.6, busy_s=0.2, backoff=dict.fromkeys(Kind, Backoff(0.05, 1.3, 0.3)))


@pytest.fixture
def clock() -> Clock:
    """The clock of this test's `ledger`."""
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """An empty ledger on disk, by the test's `clock` and with `short_waits` where it asks for them."""
    wall = request.getfixturevalue("clock") if "clock" in request.fixturenames else time.time
    waits = Timeouts(backoff=SHORT.backoff) if "short_waits" in request.fixturenames else Timeouts()
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", wall, waits)
    made.migrate()
    yield made
    made.engine.dispose()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty folder of results."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits of the delivery that a test has time for; those of the `ledger` are short, too."""
    monkeypatch.setattr(outbox_module, "LINGER_S", 0.0)
    monkeypatch.setattr(associations, "TIMEOUT_S", 2.0)
    yield
    gc.collect()  # sockets that pynetdicom dropped, while the test's filter of warnings is in force


#: Ports below those that Linux gives to outgoing connections, so that none takes one between its choice and its use;
#: each of xdist's workers has a thousand of its own.
_PORTS = range(20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), 32_000)[:1000]
_port = itertools.count(random.randrange(len(_PORTS)))


def accepts(method: str, closed: ClosedSeries) -> list[Verdict]:
    """What the installed method of this name says of a series: what the node gives its listener."""
    return registry.find(method).accepts(closed)


def series_closed(here: Node, closed: ClosedSeries) -> None:
    """What the listener does with a closed series; no task is dispatched."""
    closing.series_closed(here, closed, accepts, lambda _: None)


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago, and that is not given again soon."""
    while True:
        port = _PORTS[next(_port) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def tool(name: str) -> str:
    """Path of a peer's program, or skip with the package that brings it."""
    packages = {
        "Orthanc": "orthanc and orthanc-dicomweb",
        "dciodvfy": "dicom3tools",
        "redis-server": "redis-server",
        "segimage2itkimage": "dcmqi (pip)",
    }
    # Last, the environment: pynetdicom brings a storescu of its own, with other options than that of DCMTK.
    own = str(Path(sys.executable).parent)
    system = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own]
    found = shutil.which(name, path=os.pathsep.join([*system, "/usr/sbin", own]))
    if found is None:
        pytest.skip(f"{name} is not installed; it comes with {packages.get(name, 'dcmtk')}")
    return found


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `condition` holds; fail naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what}")


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc with DICOMweb, empty at the start."""

    ae_title: str
    port: int
    http: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def get(self, path: str, **parameters: str) -> httpx.Response:
        """GET from the REST API or, below /dicom-web, from DICOMweb."""
        return httpx.get(f"{self.http}{path}", params=parameters, timeout=60)

    def find(self, level: str, **query: str) -> list[str]:
        """Orthanc's own names of what matches."""
        found = httpx.post(f"{self.http}/tools/find", json={"Level": level, "Query": query}, timeout=60)
        return list(found.json())

    def delete(self, path: str) -> None:
        """DELETE of the REST API."""
        httpx.delete(f"{self.http}{path}", timeout=60).raise_for_status()


@pytest.fixture(scope="session")
def _orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@pytest.fixture
def orthanc(_orthanc: Orthanc) -> Orthanc:
    """A real Orthanc on loopback, empty; one for all tests, as it takes longer to start than most of them."""
    for patient in _orthanc.get("/patients").json():
        _orthanc.delete(f"/patients/{patient}")
    assert _orthanc.get("/statistics").json()["CountInstances"] == 0
    return _orthanc


@contextmanager
def running_orthanc(folder: Path, **more: Any) -> Iterator[Orthanc]:
    """Orthanc with its database in `folder`, which is made; `more` are settings of its own."""
    program = tool("Orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if not plugin.exists():
        pytest.skip("orthanc-dicomweb is not installed")
    port, http = free_port(), free_port()
    folder.mkdir(exist_ok=True)
    settings = {
        "Name": "TEST",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [str(plugin)],
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": port,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowEcho": True,
        "DicomAlwaysAllowFind": True,
        "UnknownSopClassAccepted": True,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        **more,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    # Without TCP_NODELAY DCMTK, and Orthanc with it, waits 45 ms an object on Nagle's algorithm.
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, folder / "orthanc.json"],
            stdout=log,
            stderr=log,
            env={**os.environ, "TCP_NODELAY": "1"},
        )
    archive = Orthanc("ORTHANC", port, f"http://127.0.0.1:{http}", process)

    def answers() -> bool:
        try:
            return archive.get("/system").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(answers, 30, "Orthanc's REST API")
        yield archive
    finally:
        process.kill()  # to end it well takes more than three seconds, and nobody looks at what it leaves
        process.wait(20)


@dataclass(frozen=True)
class RunningNode:
    """A `lungnode up` with a settings file of its own."""

    settings_file: Path
    ae_title: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `lungnode` command with this node's settings."""
        return subprocess.run(
            [sys.executable, "-m", "node", *arguments],
            env={**os.environ, "LUNGNODE_CONFIG": str(self.settings_file), "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def states(self) -> dict[str, str]:
        """Where each series stands, by its UID: for those who wait, as the command takes seconds of a core."""
        ledger = Ledger(f"sqlite:///{self.settings_file.parent / 'var' / LEDGER}")
        return {series.series_instance_uid: series.state for series in views.all_series(ledger)}

    def status(self) -> list[dict[str, Any]]:
        """What `lungnode status --json` prints."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("[") else []


@contextmanager
def running_node(folder: Path, settings: dict[str, Any]) -> Iterator[RunningNode]:
    """`lungnode up` below `folder`; stopped as by Ctrl-C at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    listener = {"ae_title": "LUNGNODE", "host": "127.0.0.1", "port": free_port(), "quiet_period_s": 3}
    listener |= settings.pop("listener", {})
    file, log = folder / "node.yaml", folder / "node.log"
    file.write_text(json.dumps({"data": str(folder / "var"), "listener": listener, **settings}))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "node", "up", "--config", file], stdout=output, stderr=output, start_new_session=True
        )
    node = RunningNode(file, listener["ae_title"], listener["port"], log, process)

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", node.port)) == 0

    try:
        wait_for(listens, 60, "the node to listen")
        yield node
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
