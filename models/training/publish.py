"""Write a bundle: weights, configuration, metadata with the digest, and a model card with the held-out figures.

`python -m models.training.publish lungs|infection --data DIR --weights FILE --version X.Y.Z --limits FILE`, where
FILE says, one line each, what the model is known to get wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from models.registry import BUNDLES, WEIGHTS
from models.runtime import export
from models.training import datasets
from models.training.evaluate import evaluate
from models.training.sampling import HU_RANGE, Task
from models.training.train import PLANS, build

#: Lesions below this are not reported, mm³: as long as a slab is thick, the area that makes a slice positive.
MINIMUM_LESION_MM3 = 60.0

_SETS = {
    "covid-seg-20": "COVID-19-CT-Seg-20, ten patients of coronacases.org (Ma et al. 2020), CC BY-NC-SA 4.0",
    "medseg-9": "MedSeg / Radiopaedia, three patients, CC BY-NC-SA 3.0",
    "semiseg": "COVID-SemiSeg, the published split (Fan et al. 2020), images of SIRM, licence not stated",
    "finding-lungs": "Kaggle 'Finding lungs in CT data', one slice a scan, licence not stated",
    "phantom": "procedural phantoms of models/training/phantom.py, own",
}

_TASKS: dict[Task, dict[str, Any]] = {
    "lungs": {
        "title": "Lungs on chest CT, right and left",
        "channels": {"0": "background", "1": "right lung", "2": "left lung"},
        "output": "logits of three classes; softmax",
    },
    "infection": {
        "title": "Pneumonia infection on chest CT: ground glass and consolidation",
        "channels": {"0": "infection"},
        "output": "logit of infection; sigmoid",
    },
}


def publish(task: Task, weights: Path, data: Path, seed: int, version: str, limits: list[str]) -> Path:
    """Evaluate the weights and write the bundle; returns its folder."""
    found = evaluate(task, weights, data, seed)
    folder = BUNDLES / task
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)
    metadata = _metadata(task, found, version, hashlib.sha256(weights.read_bytes()).hexdigest())
    _write_json(folder / "configs" / "metadata.json", metadata)
    _write_json(folder / "configs" / "inference.json", {"network_def": PLANS[task].network})
    (folder / "docs" / "README.md").write_text(_card(task, metadata, found, limits), encoding="utf-8")
    export(folder)
    return folder


def _metadata(task: Task, found: dict[str, Any], version: str, digest: str) -> dict[str, Any]:
    about, stride = _TASKS[task], build(PLANS[task].network).stride
    metadata: dict[str, Any] = {
        "name": task,
        "version": version,
        "sha256": digest,
        "monai_version": installed("monai"),
        "pytorch_version": installed("torch").split("+")[0],
        "numpy_version": installed("numpy"),
        "task": about["title"],
        "intended_use": "Research use, not for diagnosis.",
        "license": "CC BY-NC-SA 4.0, after the data that it was trained on",
        "data_source": [_SETS[source] for source in PLANS[task].shares],
        "hu_range": list(HU_RANGE),
        "pixel_mm": datasets.PIXEL_MM,
        "stride": stride,
        "context": PLANS[task].context,
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": 1,
                    "spatial_shape": [f"{stride}*n", f"{stride}*n"],
                    "dtype": "float32",
                    "value_range": [-1, 1],
                    "is_patch_data": False,
                }
            },
            "outputs": {
                "pred": {
                    "type": "segmentation",
                    "format": about["output"],
                    "num_channels": len(about["channels"]),
                    "dtype": "float32",
                    "channel_def": about["channels"],
                }
            },
        },
        "held_out": [{key: value for key, value in f.items() if key != "values"} for f in found["figures"]],
    }
    if task == "infection":
        metadata |= {"threshold": found["threshold"], "minimum_lesion_mm3": MINIMUM_LESION_MM3}
    return metadata


def _card(task: Task, metadata: dict[str, Any], found: dict[str, Any], limits: list[str]) -> str:
    lines = [
        f"# {metadata['task']} ({task} {metadata['version']})",
        "",
        "**Research use, not for diagnosis.** Licence of the weights: CC BY-NC-SA 4.0, as the data demand.",
        "",
        "A 2D U-Net with a lean Xception encoder (Lokwani et al. 2020) on axial slices of "
        f"{metadata['pixel_mm']} mm pixels, HU {HU_RANGE[0]:.0f} to {HU_RANGE[1]:.0f} scaled to -1 to 1.",
        "",
        "## Trained on",
        "",
        *(f"- {text}" for text in metadata["data_source"]),
        "",
        "Split by patient (`models.training.datasets.split`); a fifth of each source was held out for the figures "
        "below, a seventh to choose thresholds.",
        "",
        "## Held-out figures",
        "",
        "| source | measure | mean | 95 % interval | patients |",
        "|---|---|---|---|---|",
        *(
            f"| {f['source']} | {f['measure']} | {f['mean']:.3f} | {_interval(f)} | {f['patients']} |"
            for f in found["figures"]
        ),
        "",
        "The interval is a bootstrap over patients: of two it shows only their values, of one there is none. Sets of "
        "single slices count each slice as a patient.",
        "",
    ]
    if task == "infection":
        lines += [
            "Two groups of annotators agree on the infection of covid-seg-20 at a mean Dice of 0.78.",
            "",
            "## Threshold",
            "",
            f"{found['threshold']}: the best mean Dice over validation patients less the share of healthy validation "
            "slices called positive. Most of those are slices of healthy phantoms, whose vessels cross more than real "
            "ones do.",
            "",
            "| threshold | mean Dice | healthy slices called positive |",
            "|---|---|---|",
            *(
                f"| {threshold} | {row['dice']:.3f} | {row['false_positive_slices']:.3f} |"
                for threshold, row in found["validation"].items()
            ),
            "",
        ]
    return "\n".join([*lines, "## Known limits", "", *(f"- {limit}" for limit in limits), ""])


def _interval(figure: dict[str, Any]) -> str:
    return f"{figure['low']:.3f} to {figure['high']:.3f}" if figure["patients"] > 1 else "one patient only"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(PLANS))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slices/")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--limits", type=Path, required=True, help="what it gets wrong, a line each")
    parser.add_argument("--seed", type=int, default=0, help="the seed that training was run with")
    given = parser.parse_args()
    limits = [line for line in given.limits.read_text(encoding="utf-8").splitlines() if line.strip()]
    print(publish(given.task, given.weights, given.data, given.seed, given.version, limits))


if __name__ == "__main__":
    main()
