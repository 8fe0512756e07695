"""How long a series takes from the sender's last C-STORE response to the first and the last result in a real Orthanc.

    python benchmarks/journey.py [--runs N] [--ct DIR] [--json]

Stages are differences between the events of the ledger; medians over the runs. The first run also loads the networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import Orthanc, RunningNode, running_node, running_orthanc
from pydicom import dcmread
from pydicom.uid import generate_uid
from rich.console import Console
from rich.table import Table

from models.phantom.draw import phantom
from node.config import Peer
from node.delivery.peer import Outgoing
from node.delivery.push import push_all
from node.images.phantom_series import write_series

KINDS = ["infection-seg", "lung-seg", "sr", "capture"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--runs", type=int, default=3, help="series sent, one after the other")
    arguments.add_argument("--ct", type=Path, help="folder of a CT series; a phantom when left out")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), given.ct, given.runs)
    stages = list(runs[0])
    result = {
        "cores": _cores(),
        "first_run_s": runs[0],
        "median_s": {s: statistics.median(run[s] for run in runs[1:] or runs) for s in stages},
    }
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, given.runs)


def measure(folder: Path, ct: Path | None, runs: int) -> list[dict[str, float]]:
    if ct is None:
        ct = folder / "phantom"
        write_series(phantom(7, severity=2), ct, 7)
    with running_orthanc(folder / "orthanc") as orthanc:
        pacs = {"ae_title": orthanc.ae_title, "host": "127.0.0.1", "port": orthanc.port}
        settings = {"peers": {"pacs": pacs}, "routes": [{"name": "chest", "to": {"pacs": KINDS}}]}
        settings["listener"] = {"accept": "any"}
        with running_node(folder / "node", settings) as node:
            return [one_run(folder / f"run{n}", ct, node, orthanc) for n in range(runs)]


def one_run(folder: Path, ct: Path, node: RunningNode, orthanc: Orthanc) -> dict[str, float]:
    """Send a copy of the series under UIDs of its own, and time what follows."""
    items = [Outgoing.read(path) for path in copy(ct, folder)]
    before = orthanc.get("/statistics").json()["CountInstances"]
    arrived: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while len(arrived) < len(KINDS) and not done.wait(0.05):
            count = orthanc.get("/statistics").json()["CountInstances"] - before
            arrived.extend([time.time()] * (count - len(arrived)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.time()
    refused: list[Any] = []
    push_all(
        items,
        Peer(ae_title=node.ae_title, host="127.0.0.1", port=node.port),
        "BENCH",
        lambda _item, error: refused.append(error) if error else None,
    )
    sent = time.time()
    watcher.join(600)
    done.set()
    if refused or len(arrived) < len(KINDS):
        raise SystemExit(f"{len(refused)} refused, {len(arrived)} arrived\n{node.log.read_text()[-2000:]}")
    return stages(node, dcmread(items[0].path, stop_before_pixels=True).SeriesInstanceUID, begin, sent, arrived)


def stages(node: RunningNode, uid: str, begin: float, sent: float, arrived: list[float]) -> dict[str, float]:
    (series,) = [one for one in node.status() if one["series_instance_uid"] == uid]
    events = json.loads(node.command("status", uid, "--json").stdout)["events"]
    at = [("sent", sent), *((f"{e['stage']}: {e['text'].split(' ')[0]}", e["at"]) for e in events)]
    analysis = series["analyses"][0]["summary"]["timings_s"]
    started = next(time_ for name, time_ in at if name == "analysis: started")
    analysed = [e["at"] for e in events if e["stage"] == "analysis"][-1]
    parts = {
        "sending": sent - begin,
        "closing (last response to closed)": series["closed_at"] - sent,
        "waiting for the worker": started - series["closed_at"],
        **{f"  {name}": seconds for name, seconds in analysis.items()},
        "analysis and objects": analysed - started,
        "delivery (first object)": arrived[0] - analysed,
        "last response to first object in Orthanc": arrived[0] - sent,
        "last response to last object in Orthanc": arrived[-1] - sent,
    }
    return {name: round(seconds, 3) for name, seconds in parts.items()}


def copy(ct: Path, folder: Path) -> list[Path]:
    """The series under new UIDs, so that each run is a series of its own."""
    folder.mkdir()
    uids: dict[str, str] = {}
    paths = []
    for n, path in enumerate(sorted(path for path in ct.rglob("*") if path.is_file())):
        ds = dcmread(path)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(ds, keyword, uids.setdefault(ds[keyword].value, str(generate_uid())))
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(folder / f"{n:04d}.dcm")
        paths.append(folder / f"{n:04d}.dcm")
    return paths


def show(result: dict[str, Any], runs: int) -> None:
    table = Table(title=f"journey of a series, seconds, {result['cores']}", box=None)
    for name in ("stage", "first run", f"median of the other {max(runs - 1, 1)}"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in result["median_s"]:
        table.add_row(stage, f"{result['first_run_s'][stage]:.2f}", f"{result['median_s'][stage]:.2f}")
    Console().print(table)


def _cores() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    name = next((line.split(": ")[1] for line in flags.splitlines() if line.startswith("model name")), "CPU")
    return f"{subprocess.run(['nproc'], capture_output=True, text=True).stdout.strip()} cores of {name}"


if __name__ == "__main__":
    main()
