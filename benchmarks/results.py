"""How long, and in how much memory, the result objects of a series are made, beside plain highdicom calls.

    python benchmarks/makers.py [--slices 300] [--runs 3] [--json]

The chest is of ellipsoids, 512 x 512. Runs take turns: lungnode's objects, then the same two segmentations by calls of
highdicom as its documentation has them (one with a 4D stack of segments, one with the label map that lungnode uses),
each in a process of its own. Memory is the peak above what the volume and the masks take before.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "results"))

import highdicom as hd
import numpy as np
import pydicom
from synthetic_chest import KINDS, MOMENT, Chest, Shape, make_chest

from node.results import makers
from node.results.forms import Profile

LESIONS = [((-75.0, 45.0, 55.0), 30.0), ((70.0, 20.0, -50.0), 35.0), ((-70.0, 10.0, -30.0), 12.0)]

#: What is measured, each from the chest and a folder.
Task = Callable[[Chest, Path], Any]


def lungnode(chest: Chest, folder: Path) -> None:
    made = makers.build(chest.volume, chest.outcome, None, folder, [Profile(KINDS)], content_datetime=MOMENT)
    assert [one.problems for one in made] == [()] * len(KINDS)


def lungnode_seg(chest: Chest, folder: Path) -> None:
    profile = Profile(("infection-seg", "lung-seg"))
    makers.build(chest.volume, chest.outcome, None, folder, [profile], content_datetime=MOMENT)


def highdicom_stack(chest: Chest, folder: Path) -> None:
    """Segments as a stack of masks, as most code that uses highdicom gives them."""
    for kind, values in _labels(chest).items():
        _plain(chest, np.stack([values == 1, values == 2], axis=-1).astype(np.uint8), folder / f"{kind}.dcm")


def highdicom_labelmap(chest: Chest, folder: Path) -> None:
    for kind, values in _labels(chest).items():
        _plain(chest, values, folder / f"{kind}.dcm")


TASKS: dict[str, Task] = {
    "lungnode, all objects": lungnode,
    "lungnode, both SEG": lungnode_seg,
    "highdicom, both SEG from a stack": highdicom_stack,
    "highdicom, both SEG from a label map": highdicom_labelmap,
}


def _labels(chest: Chest) -> dict[str, Any]:
    infected = chest.findings.lesions > 0
    return {"infection": chest.findings.lungs * infected, "lungs": chest.findings.lungs * ~infected}


def _plain(chest: Chest, pixels: Any, path: Path) -> None:
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"Segment {number}",
            segmented_property_category=pydicom.sr.codedict.codes.SCT.AnatomicalStructure,
            segmented_property_type=pydicom.sr.codedict.codes.SCT.Lung,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in (1, 2)
    ]
    hd.seg.Segmentation(
        source_images=chest.headers,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=hd.UID(),
        series_number=1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="M",
        manufacturer_model_name="M",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)


def child(chest_file: Path, name: str) -> None:
    """Run one task in this process and print seconds and MB."""
    with chest_file.open("rb") as file:
        chest = pickle.load(file)
    # As a series is read: slices one after the other in memory.
    findings = chest.findings
    lungs, lesions = np.ascontiguousarray(findings.lungs), np.ascontiguousarray(findings.lesions)
    volume = replace(chest.volume, hu=np.ascontiguousarray(chest.volume.hu))
    chest = replace(chest, volume=volume, findings=replace(findings, lungs=lungs, lesions=lesions))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here (proc(5))
    before = _peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        TASKS[name](chest, Path(folder))
        seconds = time.perf_counter() - begin
    print(json.dumps({"s": seconds, "mb": _peak_mb() - before}))


def _peak_mb() -> float:
    """Most memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), given.child[1])
        return
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(slices=given.slices, rows=512, columns=512)
        chest = make_chest(Path(folder) / "ct", shape, LESIONS)
        chest_file = Path(folder) / "chest"
        with chest_file.open("wb") as file:
            pickle.dump(chest, file, protocol=5)
        del chest
        for _ in range(given.runs):
            for name, runs in measured.items():
                command = [sys.executable, __file__, "--child", str(chest_file), name]
                runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    told = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in ("s", "mb")}
        for name, runs in measured.items()
    }
    if given.json:
        print(json.dumps(told, indent=2))
        return
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{given.slices} slices of 512 x 512, medians of {given.runs}, load of the machine {load}")
    base = told["highdicom, both SEG from a label map"]["s"]
    for name, one in told.items():
        print(f"{name:38} {one['s']:7.2f} s {one['mb']:7.0f} MB   x {one['s'] / base:.2f}")


if __name__ == "__main__":
    main()
