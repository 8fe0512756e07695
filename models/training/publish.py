"""Write a bundle: weights, configuration, metadata with the digest, and a model card with the held-out figures.

`python -m models.training.publish lungs|infection --data DIR --weights FILE --version X.Y.Z --limits FILE`, where
FILE says, one line each, what the model is known to get wrong. The card's pictures show phantoms: those of patients
may not be given on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from inspect import getmodule
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.build import build, network_class
from models.configuration import data_format, inference_config, schema_metadata
from models.registry import BUNDLES, WEIGHTS, Bundle, load_bundle
from models.runtime import export
from models.training import datasets
from models.training.calibration import MINIMUM_EXTENT_MM, MINIMUM_LESION_MM3, Reliability, calibrate, found_lesions
from models.training.crossvalidate import read_out_of_fold
from models.training.datasets import Patient
from models.training.evaluate import (
    ALIKE,
    LESION_OVERLAP,
    SURFACE_MM,
    Case,
    Chance,
    Figure,
    bundle_predictor,
    choose_threshold,
    figures_of,
    held_out,
    infection_cases,
    infection_chances,
    judge_infection,
    lungs_cases,
)
from models.training.pictures import draw_cases, draw_reliability
from models.training.sampling import HU_RANGE, Task, normalise
from models.training.train import PLANS, TRAINING_PHANTOMS, Plan, patients_of

_SETS = {
    "covid-seg-20": "COVID-19-CT-Seg-20, ten patients of coronacases.org (Ma et al. 2020), CC BY-NC-SA 4.0",
    "medseg-9": "MedSeg / Radiopaedia, three patients, CC BY-NC-SA 3.0",
    "semiseg": "COVID-SemiSeg, the published split (Fan et al. 2020), images of SIRM, licence not stated",
    "finding-lungs": "Kaggle 'Finding lungs in CT data', one slice a scan, licence not stated",
    "radiopaedia": "Radiopaedia, two patients with much pneumonia, one of them the fourth of MedSeg, CC BY-NC-SA 3.0",
    "phantom": "procedural phantoms of models/phantom, own",
    "changed": "the same with lobes or lungs without air, fluid, gas, or one lung (models/phantom/thorax.py), own",
}

_TASKS: dict[Task, dict[str, Any]] = {
    "lungs": {
        "title": "Lungs on chest CT, right and left",
        "description": "Segments the right and the left lung on chest CT, slice by slice, diseased lung included.",
        "channels": {"0": "background", "1": "right lung", "2": "left lung"},
        "output": "logits of three classes; softmax",
    },
    "infection": {
        "title": "Pneumonia infection on chest CT: ground glass and consolidation",
        "description": "Segments ground glass and consolidation on chest CT, within the lungs that a lung model finds.",
        "channels": {"0": "infection"},
        "output": "logit of infection; sigmoid",
    },
}


@dataclass(frozen=True)
class Material:
    """Patients that a network is measured on.

    Attributes
    ----------
    validation, test
        `evaluate.held_out`: to choose threshold and calibration on, and to report.
    out_of_fold
        Patients that the network did learn from, with the probabilities of networks that did not: threshold and
        calibration are chosen on these too, and the figures of a cross-validation are theirs.
    """

    validation: Sequence[Patient]
    test: Sequence[Patient]
    out_of_fold: Sequence[tuple[Patient, Chance]] = ()


@dataclass
class _Results:
    """What was measured, for metadata and card."""

    cases: list[Case]
    thresholds: dict[str, Any] = field(default_factory=dict)
    cross_validation: list[Figure] = field(default_factory=list)
    reliability: tuple[Reliability, Reliability] | None = None

    @property
    def figures(self) -> list[Figure]:
        """On the test patients."""
        return figures_of(self.cases)


def publish(
    task: Task,
    weights: Path,
    version: str,
    material: Material,
    *,
    limits: Sequence[str],
    notes: str = "",
    plan: Plan | None = None,
    floor: float = 0.0,
    folder: Path | None = None,
) -> Path:
    """Measure the weights and write the bundle; returns its folder.

    Parameters
    ----------
    task, weights
        What was trained, and the file that training wrote.
    version
        Of the bundle.
    material
        Whom to measure on.
    limits
        What the model gets wrong, a line each.
    notes
        Markdown for the card: whole series that were tried, how the threshold came about.
    plan
        What was trained, by default the task's.
    floor
        Lesions less probable than this are not reported.
    folder
        Where the bundle goes, by default among those that come with the program.
    """
    plan = plan or PLANS[task]
    folder = folder or BUNDLES / task
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / task
        for part in ("configs", "models", "docs"):
            (made / part).mkdir(parents=True)
        shutil.copyfile(weights, made / WEIGHTS)
        metadata = _metadata(task, plan, version, hashlib.sha256(weights.read_bytes()).hexdigest())
        _write_json(made / "configs" / "metadata.json", metadata)
        _write_json(made / "configs" / "inference.json", inference_config(task, plan.network))
        results = _measure(task, load_bundle(made), material, metadata, floor)
        _write_json(made / "configs" / "metadata.json", metadata)
        _draw(task, results, made / "docs")
        card = _card(task, plan, metadata, results, limits, notes)
        (made / "docs" / "README.md").write_text(card, encoding="utf-8")
        export(made, _examples(plan) if plan.int8 else ())
        # What is left of the model before, OpenVINO's form of it for one, is not this one's.
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(made, folder, copy_function=shutil.copyfile)
    return folder


def _measure(task: Task, bundle: Bundle, material: Material, metadata: dict[str, Any], floor: float) -> _Results:
    """Measure the network, and complete its metadata with what follows from that."""
    predict = bundle_predictor(bundle)
    if task == "lungs":
        results = _Results(list(lungs_cases(predict, material.test)))
    else:
        unseen = [*material.out_of_fold, *infection_chances(predict, material.validation)]
        threshold, table = choose_threshold(unseen)
        metadata |= {
            "threshold": threshold,
            "minimum_lesion_mm3": MINIMUM_LESION_MM3,
            "minimum_extent_mm": MINIMUM_EXTENT_MM,
        }
        results = _Results(list(infection_cases(predict, material.test, threshold)), table)
        results.cross_validation = figures_of(judge_infection(material.out_of_fold, threshold))
        lesions = found_lesions(unseen, threshold)
        if len({lesion.true for lesion in lesions}) == 2:
            model, before, after = calibrate(lesions, floor)
            results.reliability = before, after
            # What does not help on patients it was not fitted on is not shipped.
            if after.brier < before.brier:
                metadata["lesion_calibration"] = {name: round(value, 5) for name, value in asdict(model).items()}
    metadata["held_out"] = [_brief(one) for one in results.figures]
    if results.cross_validation:
        metadata["cross_validation"] = [_brief(one) for one in results.cross_validation]
    return results


def _brief(figure: Figure) -> dict[str, Any]:
    return {name: value for name, value in asdict(figure).items() if name != "values"}


def _examples(plan: Plan) -> list[NDArray[np.float32]]:
    """Slices of phantoms as the network gets them, to show the ranges of its values."""
    stride = int(build(plan.network).stride)  # type: ignore[arg-type]
    examples = []
    for patient in datasets.phantoms(TRAINING_PHANTOMS, slices=20):
        for index in range(0, len(patient.hu), 5):
            image = normalise(datasets.stack(patient, index, plan.context))
            padding = ((0, 0), *((0, -size % stride) for size in image.shape[1:]))
            examples.append(np.pad(image, padding, constant_values=-1.0)[None])
    return examples


def _draw(task: Task, results: _Results, docs: Path) -> None:
    if own := _own(task, results):
        draw_cases(own, f"Dice {task}", docs / "cases.png")
    if results.reliability:
        draw_reliability(*results.reliability, docs / "reliability.png")


def _metadata(task: Task, plan: Plan, version: str, digest: str) -> dict[str, Any]:
    about, stride, context = _TASKS[task], build(plan.network).stride, plan.context
    return {
        "name": task,
        "version": version,
        "sha256": digest,
        **schema_metadata(about["description"]),
        "role": task,
        "dimensions": 2,
        "task": about["title"],
        "intended_use": "Research use, not for diagnosis.",
        "license": _licence(plan.shares),
        "data_source": "; ".join(_SETS[source] for source in plan.shares),
        "hu_range": list(HU_RANGE),
        "pixel_mm": datasets.PIXEL_MM,
        "stride": stride,
        "context": context,
        "bfloat16": plan.bfloat16,
        "network_data_format": data_format(
            2 * context + 1, [f"{stride}*n", f"{stride}*n"], about["output"], about["channels"]
        ),
    }


def _licence(sources: Iterable[str]) -> str:
    """The strictest licence of the data, which the weights follow."""
    texts = [_SETS[source] for source in sources]
    if any("CC BY-NC-SA" in text for text in texts):
        return "CC BY-NC-SA 4.0, after the data that it was trained on"
    if any("not stated" in text for text in texts):
        return "not stated: some of the data that it was trained on state none"
    return "Apache-2.0"


def _card(
    task: Task, plan: Plan, metadata: dict[str, Any], results: _Results, limits: Sequence[str], notes: str
) -> str:
    network = (getmodule(network_class(plan.network)).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    context = metadata["context"]
    seen = f"axial slices, each with {context} neighbours on either side," if context else "axial slices"
    low, high = metadata["hu_range"]
    trained = set(plan.shares)
    inside = [one for one in results.figures if one.source in trained]
    outside = [one for one in results.figures if one.source not in trained]
    lines = [
        f"# {metadata['task']} ({task} {metadata['version']})",
        "",
        f"**Research use, not for diagnosis.** Licence of the weights: {metadata['license']}.",
        "",
        f"{network} It sees {seen} of {metadata['pixel_mm']} mm pixels, HU {low:.0f} to {high:.0f} scaled to -1 to 1.",
        "",
        "## Trained on",
        "",
        *(f"- {_SETS[source]}" for source in plan.shares),
        "",
        "Split by patient (`models.training.datasets.split`): none of the figures below is of a patient that the "
        "network that gave it had learnt from or was chosen on.",
        "",
        "## Held-out figures",
        "",
        *_table(inside),
        "",
        "The interval of a mean is a bootstrap over patients: of two it shows only their values, of one there is none. "
        "That of slices and lesions is Wilson's, which takes them for independent and so is rather too narrow. Surface "
        f"Dice is at {SURFACE_MM:.0f} mm, slice by slice; volume error is its amount over the drawn volume; a lesion "
        f"is found, and a found one true, from {LESION_OVERLAP:.0%} overlap. Sets of single slices count each slice as "
        "a patient.",
        "",
    ]
    if outside:
        lines += ["## Outside test", "", "Sets that nothing was trained or chosen on.", "", *_table(outside), ""]
    if results.cross_validation:
        lines += [
            "## Cross-validation",
            "",
            "Every patient by a network that had not seen that patient; the shipped network is another one.",
            "",
            *_table(results.cross_validation),
            "",
        ]
    if task == "infection":
        lines += [
            "Two groups of annotators agree on the infection of covid-seg-20 at a mean Dice of 0.78.",
            "",
            "## Threshold",
            "",
            f"{metadata['threshold']}: the best mean Dice over validation patients less the share of healthy "
            f"validation slices called positive; of those as good within {ALIKE} the one with the best Dice.",
            "",
            "| threshold | mean Dice | healthy slices called positive |",
            "|---|---|---|",
            *(
                f"| {threshold} | {row['dice']:.3f} | {row['false_positive_slices']:.3f} |"
                for threshold, row in results.thresholds.items()
            ),
            "",
        ]
    if results.reliability:
        before, after = results.reliability
        shipped = metadata.get("lesion_calibration")
        lines += [
            "## Probability of a lesion",
            "",
            "A logistic model of mean, maximum and volume, fitted on lesions of patients that the network had not "
            "seen; measured with each patient left out in turn.",
            "",
            "| | Brier score | expected calibration error |",
            "|---|---|---|",
            f"| mean over voxels | {before.brier:.3f} | {before.ece:.3f} |",
            f"| calibrated | {after.brier:.3f} | {after.ece:.3f} |",
            "",
            *([] if shipped else ["It does not do better, so the mean is what a lesion's probability is.", ""]),
            *([f"Lesions below {shipped['floor']} are not reported.", ""] if shipped and shipped["floor"] else []),
            "![Stated probability against the share of true lesions](reliability.png)",
            "",
        ]
    if _own(task, results):
        lines += [
            "## Worst, median and best phantom",
            "",
            "Pictures of patients may not be given on; `lungnode evaluate` draws them from the data.",
            "",
            "![Drawn and found contours of three phantoms](cases.png)",
            "",
        ]
    if notes.strip():
        lines += [notes.strip(), ""]
    return "\n".join([*lines, "## Known limits", "", *(f"- {limit}" for limit in limits), ""])


def _table(figures: Sequence[Figure]) -> list[str]:
    return [
        "| source | measure | mean or share | 95 % interval | patients | slices or lesions |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f.source} | {f.measure} | {f.mean:.3f} | {_interval(f)} | {f.patients} | {f.trials or ''} |"
            for f in figures
        ),
    ]


def _interval(figure: Figure) -> str:
    alone = figure.patients == 1 and not figure.trials
    return "one patient only" if alone else f"{figure.low:.3f} to {figure.high:.3f}"


def _own(task: Task, results: _Results) -> list[Case]:
    """Cases of which pictures may be given on."""
    return [case for case in results.cases if case.patient.licence == "own" and f"Dice {task}" in case.values]


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
    parser.add_argument("--notes", type=Path, help="Markdown for the card, before the limits")
    parser.add_argument("--out-of-fold", type=Path, nargs="*", default=[], help="fold-K.npz of crossvalidate")
    parser.add_argument("--floor", type=float, default=0.0, help="lesions less probable are not reported")
    parser.add_argument("--seed", type=int, default=0, help="the seed that training was run with")
    given = parser.parse_args()
    limits = [line for line in given.limits.read_text(encoding="utf-8").splitlines() if line.strip()]
    notes = given.notes.read_text(encoding="utf-8") if given.notes else ""
    validation, test = held_out(given.task, given.data, given.seed)
    unseen = read_out_of_fold(given.out_of_fold, patients_of(given.task, given.data)) if given.out_of_fold else []
    material = Material(validation, test, unseen)
    print(publish(given.task, given.weights, given.version, material, limits=limits, notes=notes, floor=given.floor))


if __name__ == "__main__":
    main()
