"""How fast a series comes in: lungnode beside DCMTK's storescp and Orthanc, in turn, on this machine.

    python benchmarks/intake.py [--runs N] [--slices N] [--large MB] [--json]

DCMTK's storescu sends slices of 525 KB over 1, 4 and 8 associations at once. Each run gives every receiver the same
series under UIDs that it has not seen; figures are medians over the runs. TCP_NODELAY=1 is set for all: without it
DCMTK, and Orthanc with it, wait 45 ms an object on Nagle's algorithm. Of the receivers only lungnode syncs files to
disk before it answers; 'no fsync' is lungnode with that taken out, to compare like with like.

What was received is removed at the very end: ext4 without a journal looks for a new file's inode among all that were
freed in the last minutes, and makes the next receiver pay for it. Before each sending everything is written back, and
memory is touched and let go: to a virtual machine whose hypervisor takes back what is free, a fresh page costs several
times its copying. Where both remain, they are in the kernel's share of the CPU time and not in the receiver's own.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "intake"))

import psutil
from conftest import free_port, running_orthanc, tool, wait_for
from made_instances import SERIES, STUDY, dataset, save
from pynetdicom import AE
from rich.console import Console
from rich.table import Table

from node.intake.admission import ListenerOptions
from node.intake.assembly import Assembly
from node.intake.listener import Listener
from node.intake.series import Host
from node.intake.spool import Spool
from node.intake.transport import DIRECT, STOCK
from node.network.settings import configure
from node.operations.supervisor import settle
from node.telemetry import logs

ASSOCIATIONS = (1, 4, 8)
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


@dataclass(frozen=True)
class Receiver:
    name: str
    ae_title: str
    port: int
    process: psutil.Process
    folder: Path

    def cpu_s(self) -> tuple[float, float]:
        """Seconds in the receiver's own code, and in the kernel for it."""
        times = self.process.cpu_times()
        return float(times.user), float(times.system)

    def memory_mb(self) -> float:
        """Largest resident set so far (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--slices", type=int, default=300)
    arguments.add_argument("--large", type=int, default=300, help="MB of one large object")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    arguments.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.serve:
        serve(int(given.serve[0]), Path(given.serve[1]), given.serve[2], given.serve[3] == "fsync")
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.runs, given.slices, given.large)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def serve(port: int, folder: Path, transport: Any, fsync: bool) -> None:
    """lungnode's listener, spool and assembly in this process, without ledger and workers."""
    if not fsync:
        os.fsync = lambda _descriptor: None
    logs.configure()
    configure()
    listener = Listener(
        ListenerOptions(ae_title="LUNGNODE", port=port, host="127.0.0.1", transport=transport),
        Spool(folder),
        Assembly(Host(), 30),
    )
    listener.start()
    settle()
    threading.Event().wait()


def measure(folder: Path, runs: int, slices: int, large_mb: int) -> dict[str, Any]:
    source = folder / "source"
    source.mkdir()
    room = (runs + 2) * len(ASSOCIATIONS) * 6 * slices * 525_000
    if shutil.disk_usage(folder).free < room:
        raise SystemExit(f"{room >> 30} GB are needed in {tempfile.gettempdir()}: set TMPDIR, or ask for fewer --runs")
    paths = [save(dataset(n, size=512), source / f"{n:04d}.dcm") for n in range(slices)]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    figures: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        receivers = [stack.enter_context(receiver) for receiver in all_receivers(folder)]
        for run in range(runs + 1):
            for associations in ASSOCIATIONS:
                series = renamed(paths, folder / f"run{run}{associations}", f"{run}{associations}")
                for receiver in receivers[run % len(receivers) :] + receivers[: run % len(receivers)]:
                    settle_machine(2 * megabytes)
                    took = send(receiver, series, associations)
                    if run:  # the first is to warm up
                        figures.setdefault(receiver.name, {}).setdefault(associations, []).append(took)
        memory = {receiver.name: receiver.memory_mb() for receiver in receivers}
        idle = {receiver.name: idle_share(receiver) for receiver in receivers if receiver.name.startswith("lung")}
        large = large_object(receivers, folder, large_mb)
    medians = {
        name: {
            n: {
                "mb_per_s": round(megabytes / statistics.median(wall for wall, *_ in took), 1),
                "cpu_ms_per_mb": round(statistics.median(sum(cpu) for _, *cpu in took) * 1000 / megabytes, 2),
                "of_which_own_code": round(statistics.median(user for _, user, _ in took) * 1000 / megabytes, 2),
            }
            for n, took in by_associations.items()
        }
        for name, by_associations in ((receiver.name, figures[receiver.name]) for receiver in receivers)
    }
    for by_associations in medians.values():
        for n, figure in by_associations.items():
            for other in ("storescp", "Orthanc"):
                figure[f"x_{other}"] = round(figure["mb_per_s"] / medians[other][n]["mb_per_s"], 2)
    return {
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "slices": slices,
        "megabytes": round(megabytes, 1),
        "runs": runs,
        "receivers": medians,
        "peak_memory_mb": {name: round(value) for name, value in memory.items()},
        "cpu_share_of_8_idle_associations": idle,
        f"memory_mb_before_and_after_{large_mb}_mb_object": large,
    }


def settle_machine(megabytes: float) -> None:
    """Burden nobody with the writing back of what came before, nor with memory that a hypervisor has yet to give."""
    os.sync()
    mmap.mmap(-1, int(megabytes) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def all_receivers(folder: Path) -> Iterator[Any]:
    yield storescp(folder / "storescp")
    yield orthanc(folder / "orthanc")
    yield lungnode(folder, "lungnode", DIRECT, "fsync")
    yield lungnode(folder, "lungnode, no fsync", DIRECT, "none")
    yield lungnode(folder, "lungnode, stock transport", STOCK, "fsync")


@contextmanager
def storescp(folder: Path) -> Iterator[Receiver]:
    folder.mkdir()
    port = free_port()
    # Bit-preserving, as the others keep it.
    command = [tool("storescp"), "+B", "--fork", "-aet", "STORESCP", "-od", str(folder), str(port)]
    with _started(command, port) as process:
        yield Forked("storescp", "STORESCP", port, process, folder)


class Forked(Receiver):
    """A receiver that serves each association from a process of its own: what its ended children used counts too."""

    def cpu_s(self) -> tuple[float, float]:
        times = self.process.cpu_times()
        return float(times.user + times.children_user), float(times.system + times.children_system)


@contextmanager
def orthanc(folder: Path) -> Iterator[Receiver]:
    with running_orthanc(folder) as archive:
        (process,) = (one for one in psutil.Process().children() if one.name() == "Orthanc")
        yield Receiver("Orthanc", archive.ae_title, archive.port, process, folder)


@contextmanager
def lungnode(folder: Path, name: str, transport: str, fsync: str) -> Iterator[Receiver]:
    spool, port = folder / name.replace(" ", "-"), free_port()
    spool.mkdir()
    command = [sys.executable, __file__, "--serve", str(port), str(spool), transport, fsync]
    with _started(command, port) as process:
        yield Receiver(name, "LUNGNODE", port, process, spool)


@contextmanager
def _started(command: list[str], port: int) -> Iterator[psutil.Process]:
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _echo(port), 120, command[0])
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def _echo(port: int) -> bool:
    for called in ("STORESCP", "LUNGNODE"):
        command = [tool("echoscu"), "-aec", called, "127.0.0.1", str(port)]
        if subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return True
    return False


def renamed(paths: list[Path], folder: Path, tag: str) -> list[Path]:
    """Copies under UIDs that no receiver has seen, of the same length."""
    folder.mkdir()
    fresh = f"{STUDY[: -len(tag) - 1]}1{tag}".encode()
    assert len(fresh) == len(STUDY)
    copies = []
    for path in paths:
        copies.append(folder / path.name)
        copies[-1].write_bytes(path.read_bytes().replace(STUDY.encode(), fresh))
    return copies


def send(receiver: Receiver, paths: list[Path], associations: int) -> tuple[float, float, float]:
    """Seconds, and of the receiver CPU seconds of its own and of the kernel."""
    shares = [paths[n::associations] for n in range(associations)]
    cpu, begin = receiver.cpu_s(), time.perf_counter()
    command = [tool("storescu"), "-aec", receiver.ae_title, "127.0.0.1", str(receiver.port)]
    senders = [
        subprocess.Popen([*command, *map(str, share)], env=ENVIRONMENT, stderr=subprocess.DEVNULL) for share in shares
    ]
    codes = [sender.wait() for sender in senders]
    took = time.perf_counter() - begin
    if any(codes):
        raise SystemExit(f"{receiver.name} did not take what was sent")
    time.sleep(0.3)  # forked children are counted when they have ended
    user, system = receiver.cpu_s()
    return took, user - cpu[0], system - cpu[1]


def idle_share(receiver: Receiver, seconds: float = 5.0) -> float:
    """Share of a core that 8 associations cost over which nothing comes."""
    ae = AE("BENCH")
    ae.add_requested_context("1.2.840.10008.1.1")
    open_now = [ae.associate("127.0.0.1", receiver.port, ae_title=receiver.ae_title) for _ in range(8)]
    assert all(one.is_established for one in open_now)
    cpu = receiver.cpu_s()
    time.sleep(seconds)
    share = sum(after - before for after, before in zip(receiver.cpu_s(), cpu, strict=True)) / seconds
    for one in open_now:
        one.release()
    return round(share, 4)


def large_object(receivers: list[Receiver], folder: Path, megabytes: int) -> dict[str, list[int]]:
    ds = dataset(0, size=512, series=f"{SERIES}.9")
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    ds.NumberOfFrames = megabytes * 1_000_000 // len(ds.PixelData)
    ds.PixelData = bytes(ds.NumberOfFrames * len(ds.PixelData))
    path = save(ds, folder / "large.dcm")
    figures = {}
    for receiver in receivers:
        before = receiver.memory_mb()
        send(receiver, [path], 1)
        figures[receiver.name] = [round(before), round(receiver.memory_mb())]
    return figures


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['slices']} slices, {result['megabytes']} MB, {result['cores']} cores, load {result['load_before']}"
    )
    table = Table(title=title, box=None)
    for name in ("receiver", "associations", "MB/s", "x storescp", "x Orthanc", "CPU ms/MB", "own code", "peak MB"):
        table.add_column(name, justify="left" if name == "receiver" else "right")
    for name, by_associations in result["receivers"].items():
        for n, one in by_associations.items():
            columns = ("mb_per_s", "x_storescp", "x_Orthanc", "cpu_ms_per_mb", "of_which_own_code")
            table.add_row(name, str(n), *(str(one[key]) for key in columns), str(result["peak_memory_mb"][name]))
    Console(width=120).print(table)
    for key, value in list(result.items())[-2:]:
        print(key.replace("_", " "), value)


if __name__ == "__main__":
    main()
