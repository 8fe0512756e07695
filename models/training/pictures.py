"""Pictures for those who judge a model: worst, median and best case, training curves, reliability of probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.training.evaluate import Case

if TYPE_CHECKING:
    from models.training.calibration import Reliability

#: Lung window, HU.
_WINDOW = (-1350.0, 150.0)
_DRAWN, _FOUND, _TEXT = (60, 220, 90), (255, 70, 200), (235, 235, 235)
_PANEL, _LINE = 300, 18


def draw_cases(cases: Sequence[Case], measure: str, file: Path) -> None:
    """Write a PNG of the worst, the median and the best case by a measure: the slice on which they disagree most."""
    ranked = sorted((case for case in cases if measure in case.values), key=lambda case: case.values[measure])
    if not ranked:
        raise ValueError(f"no case has a {measure}")
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    sheet = Image.new("RGB", (2 * _PANEL, len(chosen) * (_PANEL + _LINE) + _LINE))
    pen = ImageDraw.Draw(sheet)
    for row, (name, case) in enumerate(chosen.items()):
        top = row * (_PANEL + _LINE)
        pen.text((4, top + 3), f"{name}: {case.patient.id}, {measure} {case.values[measure]:.3f}", _TEXT)
        plain, marked = _panels(case)
        sheet.paste(plain, (0, top + _LINE))
        sheet.paste(marked, (_PANEL, top + _LINE))
    pen.text((4, sheet.height - _LINE + 3), "drawn by readers", _DRAWN)
    pen.text((_PANEL, sheet.height - _LINE + 3), "found by the network", _FOUND)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A palette of greys and the colours used makes the file a third as large; nobody measures in it.
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(level for grey in range(0, 256, 3) for level in (grey,) * 3), *_DRAWN, *_FOUND])
    sheet.quantize(palette=palette, dither=Image.Dither.NONE).save(file, optimize=True)


def draw_curve(log: Path, file: Path) -> None:
    """Write a PNG of a training run from its `curve.jsonl`: loss, learning rate, validation Dice.

    Parameters
    ----------
    log
        One JSON object a line with `step` and any of `loss`, `rate`, `dice`.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = [name for name in ("loss", "dice", "rate") if any(name in line for line in lines)]
    if not known:
        raise ValueError(f"{log} holds no loss, rate or dice")
    picture = Figure(figsize=(8, 2.4 * len(known)), layout="constrained")
    for axes, name in zip(np.ravel(picture.subplots(len(known), 1, sharex=True)), known, strict=True):
        steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
        axes.plot(steps, values, marker="." if len(steps) < 60 else "", linewidth=1)
        axes.set_ylabel({"dice": "validation Dice", "rate": "learning rate"}.get(name, name))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    picture.savefig(file, dpi=110)


def draw_reliability(before: Reliability, after: Reliability, file: Path) -> None:
    """Write a PNG of how often lesions of a stated probability were true, before and after calibration."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(5, 5), layout="constrained")
    axes = picture.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, one in (("mean over voxels", before), ("calibrated", after)):
        axes.plot(one.stated, one.true, marker="o", label=f"{name}: Brier {one.brier:.3f}, ECE {one.ece:.3f}")
    axes.set_xlabel("probability stated")
    axes.set_ylabel("share of lesions that were true")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=90)


def _panels(case: Case) -> tuple[Image.Image, Image.Image]:
    """The slice of most disagreement, plain and with both contours, cut to the patient."""
    truth = case.patient.lungs if case.found.max(initial=0) > 1 or case.patient.infection is None else None
    drawn = case.patient.infection if truth is None else truth
    assert drawn is not None
    masks = drawn.astype(np.uint8), case.found
    differing = (masks[0] != masks[1]).sum((1, 2))
    k = int(differing.argmax() if differing.any() else masks[0].any(2).sum(1).argmax())
    hu = case.patient.hu[k]
    rows, columns = (np.flatnonzero((hu > -500).any(axis)) for axis in (1, 0))
    box = (
        (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if len(rows) else (slice(None), slice(None))
    )
    low, high = _WINDOW
    grey = (np.clip((hu[box].astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    plain = np.stack([grey] * 3, -1)
    scale = _PANEL / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    marked = np.asarray(Image.fromarray(plain).resize(size, Image.Resampling.BICUBIC)).copy()
    for mask, colour in ((masks[0], _DRAWN), (masks[1], _FOUND)):
        large = np.asarray(Image.fromarray(mask[k][box]).resize(size, Image.Resampling.NEAREST))
        marked[_contour(large)] = colour
    panels = []
    for image in (Image.fromarray(plain).resize(size, Image.Resampling.BICUBIC), Image.fromarray(marked)):
        panel = Image.new("RGB", (_PANEL, _PANEL))
        panel.paste(image, ((_PANEL - size[0]) // 2, (_PANEL - size[1]) // 2))
        panels.append(panel)
    return panels[0], panels[1]


def _contour(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of a label that border on another."""
    padded = np.pad(label, 1)
    same = np.ones(label.shape, bool)
    for rows, columns in (
        (slice(2, None), slice(1, -1)),
        (slice(None, -2), slice(1, -1)),
        (slice(1, -1), slice(2, None)),
        (slice(1, -1), slice(None, -2)),
    ):
        same &= padded[rows, columns] == label
    edge: NDArray[np.bool_] = (label > 0) & ~same
    return edge
