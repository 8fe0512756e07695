"""How long an analysis takes from files on disk to findings, beside lungmask's lungs alone.

    python benchmarks/analysis.py [--runs N] [--ct DIR] [--json]

Both do the same series by turns, each time in a process of its own; medians over the runs. lungmask (pip install
lungmask) runs its whole pipeline: reading, the R231 network, its clean-up, back to the source grid. Weights do not
change the time, so lungmask's are random here rather than downloaded, and its clean-up is given our mask.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

#: Slices, rows, columns of the phantom.
SHAPE = (300, 512, 512)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--runs", type=int, default=3, help="analyses by each")
    arguments.add_argument("--ct", type=Path, help="folder of a CT series; a phantom of 300 slices when left out")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    arguments.add_argument("--only", choices=["lungnode", "lungmask"], help=argparse.SUPPRESS)
    arguments.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.only:
        work = lungnode if given.only == "lungnode" else lungmask
        print(json.dumps(work(given.ct, given.mask)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given.ct or written_phantom(Path(folder) / "ct"), Path(folder) / "mask.npy", given.runs)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def measure(ct: Path, mask: Path, runs: int) -> dict[str, Any]:
    done: dict[str, list[dict[str, float]]] = {"lungnode": [], "lungmask": []}
    for _ in range(runs):
        for name, results in done.items():
            command = [sys.executable, __file__, "--only", name, "--ct", ct, "--mask", mask]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(child.stdout.splitlines()[-1]))
    medians = {
        name: {key: round(statistics.median(one[key] for one in results), 3) for key in results[0]}
        for name, results in done.items()
    }
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*done.values(), strict=True)]
    return {"runs": runs, **medians, "times_faster": round(statistics.median(ratios), 1)}


def lungnode(ct: Path, mask: Path) -> dict[str, float]:
    """The third analysis of a process, as a worker does it all day; the first counts from the start of the process."""
    start = time.perf_counter()
    from models.registry import load_bundle
    from models.runtime import keep_memory
    from models.segmenter.inference import Segmenter
    from node.methods.pneumonia import pipeline

    paths = files(ct)
    keep_memory()
    segmenter = Segmenter(load_bundle("lungs"), load_bundle("infection"))
    _, findings = pipeline.analyse(paths, segmenter, minimum_lesion_mm3=100.0)
    first = time.perf_counter() - start
    pipeline.analyse(paths, segmenter, minimum_lesion_mm3=100.0)
    start, busy = time.perf_counter(), time.process_time()
    _, findings = pipeline.analyse(paths, segmenter, minimum_lesion_mm3=100.0)
    result = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy, "first": first}
    np.save(mask, findings.lungs)
    return result | {"peak_mb": peak_mb()} | findings.timings


def lungmask(ct: Path, mask: Path) -> dict[str, float]:
    """lungmask's lungs, from the same files."""
    import SimpleITK
    import torch
    from lungmask import LMInferer, utils
    from lungmask.resunet import UNet

    ours, clean = np.load(mask), utils.postprocessing

    def clean_ours(found: np.ndarray, **options: Any) -> np.ndarray:
        rows, columns = (np.arange(n) * m // n for n, m in zip(found.shape[1:], ours.shape[1:], strict=True))
        result: np.ndarray = clean(np.ascontiguousarray(ours[:, rows[:, None], columns]), **options)
        return result

    utils.postprocessing = clean_ours
    torch.manual_seed(0)
    network = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
        torch.save(network.state_dict(), weights.name)
        inferer = LMInferer(modelpath=weights.name, force_cpu=True, tqdm_disable=True)
    start, busy = time.perf_counter(), time.process_time()
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(ct)))
    inferer.apply(reader.Execute())
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": busy, "peak_mb": peak_mb()}


def files(ct: Path) -> list[Path]:
    return sorted(path for path in ct.rglob("*") if path.is_file())


def peak_mb() -> float:
    # In KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def written_phantom(folder: Path) -> Path:
    from models.phantom.draw import phantom
    from node.images.phantom_series import write_series

    write_series(phantom(7, shape=SHAPE, severity=2), folder, 7)
    return folder


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"medians of {result['runs']} runs", box=None)
    for name in ("", "lungnode", "lungmask, lungs alone"):
        table.add_column(name, justify="right" if name else "left")
    for key, value in result["lungnode"].items():
        other = result["lungmask"].get(key)
        table.add_row(key, f"{value:.2f}", "" if other is None else f"{other:.2f}")
    Console().print(table)
    print(f"lungnode is {result['times_faster']} times faster")


if __name__ == "__main__":
    main()
