"""How long OHIF takes to open our segmentation of a long series, beside one of the same voxels by plain highdicom.

    python benchmarks/viewer.py [--slices 300] [--runs 5] [--json]

A chest of ellipsoids, 512 x 512, and its lungs segmentations lie in an Orthanc on this machine. Runs take turns in one
Chromium, each in a page of its own: from the double click until the viewer holds the voxels. Needs what tests/viewer
needs (tests/peers.sh).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "results"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "viewer"))

import pydicom
from conftest import running_orthanc
from ohif import opened, running_browser, served, viewer_files
from results import LESIONS, highdicom_labelmap
from synthetic_chest import MOMENT, Shape, make_chest

from node.config import Peer
from node.delivery.peer import Outgoing
from node.delivery.push import push_all
from node.results import makers
from node.results.forms import Profile


def segmentations(folder: Path, slices: int) -> tuple[dict[str, Path], list[Path], str]:
    """The two segmentations of the lungs, all files to send, and the study."""
    chest = make_chest(folder / "ct", Shape(slices=slices, rows=512, columns=512), LESIONS)
    (ours,) = makers.build(chest.volume, chest.outcome, None, folder, [Profile(("lung-seg",))], content_datetime=MOMENT)
    plain = folder / "plain"
    plain.mkdir()
    highdicom_labelmap(chest, plain)
    made = {"lungnode": ours.path, "highdicom": plain / "lungs.dcm"}
    return made, [*(source.path for source in chest.volume.sources), *made.values()], chest.volume.study_instance_uid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    dist, program = viewer_files()
    seconds: dict[str, list[float]] = {"lungnode": [], "highdicom": []}
    with tempfile.TemporaryDirectory() as name, running_orthanc(Path(name) / "orthanc") as archive:
        folder = Path(name)
        made, files, study = segmentations(folder, given.slices)
        peer = Peer(ae_title=archive.ae_title, host="127.0.0.1", port=archive.port)
        push_all([Outgoing.read(path) for path in files], peer, "LUNGNODE", _complain)
        headers = {which: pydicom.dcmread(path, stop_before_pixels=True) for which, path in made.items()}
        with served(archive, dist) as base, running_browser(program) as browser:
            for run in range(given.runs):
                for which in sorted(seconds, reverse=bool(run % 2)):
                    with opened(browser, base, study, folder) as viewer:
                        uid = headers[which].SeriesInstanceUID
                        viewer.until(lambda viewer=viewer, uid=uid: viewer.series(uid), "the series")
                        begin = time.perf_counter()
                        viewer.open_segmentation(uid)
                        seconds[which].append(time.perf_counter() - begin)
        told = {
            which: {
                "s": round(statistics.median(runs), 2),
                "runs": [round(one, 2) for one in runs],
                "frames": int(headers[which].NumberOfFrames),
                "mb": round(made[which].stat().st_size / 1e6, 1),
            }
            for which, runs in seconds.items()
        }
    if given.json:
        print(json.dumps(told, indent=2))
        return
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{given.slices} slices of 512 x 512, medians of {given.runs}, load of the machine {load}")
    for which, one in told.items():
        print(f"{which:10} {one['s']:6.2f} s  {one['frames']} frames, {one['mb']} MB")
    print(f"lungnode / highdicom: {told['lungnode']['s'] / told['highdicom']['s']:.2f}")


def _complain(item: Outgoing, error: object) -> None:
    if error:
        raise SystemExit(f"{item.path}: {error}")


if __name__ == "__main__":
    main()
