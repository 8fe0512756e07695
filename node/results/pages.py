"""The pages of the colour capture: a summary, key slices, and the page that says why nothing was analysed.

Square pages of one size, without patient attributes: those are in the object's header, where an archive can correct
them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from models.registry import ModelIdentity
from node import __version__
from node.analysis.findings import Findings, Region
from node.results.drawing import INFECTION, LUNG, PatientView, axial, coronal_projection
from node.results.identity import MODEL_NAME, NOT_FOR_DIAGNOSIS
from node.results.statement import counted, rules, summary
from node.results.typesetting import DIM, PAGE, RULE, TEXT, WARNING, leading, paragraph, table_row, write

#: Side of a page in pixels. A whole page fits a monitor of 1024 lines, and a frame of it is 1.8 MB of RGB.
SIDE = 768

_EDGE = 28
_WIDTH = SIDE - 2 * _EDGE


def key_planes(view: PatientView, count: int) -> list[int]:
    """Up to `count` axial planes from the head down: even through the lungs, with the most infected among them."""
    planes = view.lung_planes
    # Bin centres: the outermost slices show slivers of lung and nothing to read.
    even = (np.arange(min(count, planes.size)) + 0.5) * planes.size / min(count, planes.size)
    chosen = [int(planes[int(step)]) for step in even]
    if view.infection.any():
        most = int(view.infected_area.argmax())
        nearest = min(range(len(chosen)), key=lambda n: abs(chosen[n] - most))
        chosen[nearest] = most
    return sorted(set(chosen), reverse=True)


def summary_page(view: PatientView, findings: Findings) -> Image.Image:
    """What was found, in words and numbers, with the chest from the front and the most infected slice."""
    page, draw = _page("Chest CT: lungs and pneumonia infection")
    y = paragraph(draw, (_EDGE, 88), summary(findings), 17, _WIDTH, TEXT, 2) + 8
    y = _regions(draw, y, findings)
    y = _rules(draw, y + 12, findings)
    if findings.notes:
        y = paragraph(draw, (_EDGE, y + 4), "Note: " + " ".join(findings.notes), 13, _WIDTH, WARNING, 2)
    _pictures(page, draw, view, y + 12)
    _footer(draw, findings.models)
    return page


def key_page(view: PatientView, findings: Findings, plane: int) -> Image.Image:
    """One axial slice with what was found on it, its place, and the sums."""
    page = Image.new("RGB", (SIDE, SIDE), PAGE)
    draw = ImageDraw.Draw(page)
    number = len(view.heights) - plane
    write(draw, (_EDGE, 14), f"z {view.heights[plane]:.1f} mm", 22)
    write(draw, (_EDGE, 42), f"axial slice {number} of {len(view.heights)} from the head", 14, DIM)
    pixels = np.count_nonzero(view.lungs[plane])
    area = view.infected_area[plane] * view.spacing[1] * view.spacing[2] / 100
    here = f"infected here: {area:.1f} cm2, {100 * view.infected_area[plane] / max(pixels, 1):.1f} % of lung area"
    write(draw, (SIDE - _EDGE, 14), here if area else "no infection marked here", 17, anchor="ra", width=_WIDTH * 0.7)
    write(draw, (SIDE - _EDGE, 42), "lung window, C -600 W 1500 HU", 14, DIM, "ra")
    page.paste(axial(view, plane, SIDE, SIDE - 144), (0, 68))
    _legend(draw, SIDE - 66, findings)
    _footer(draw, findings.models)
    return page


def tile(view: PatientView, plane: int, width: int, height: int) -> Image.Image:
    """One axial slice with no more than its place, for a montage."""
    picture = axial(view, plane, width, height)
    write(ImageDraw.Draw(picture), (8, 6), f"z {view.heights[plane]:.1f} mm", 13)
    return picture


def not_analysed_page(reason: str) -> Image.Image:
    """Says plainly that there is no result, and why."""
    page, draw = _page("Chest CT: not analysed")
    y = paragraph(draw, (_EDGE, 110), f"Not analysed: {reason}", 24, _WIDTH, WARNING, 12)
    paragraph(
        draw,
        (_EDGE, y + 24),
        "No statement is made about this series. The absence of marked findings does not mean that there are none.",
        18,
        _WIDTH,
        TEXT,
    )
    _footer(draw, ())
    return page


def _page(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (SIDE, SIDE), PAGE)
    draw = ImageDraw.Draw(page)
    write(draw, (_EDGE, 20), title, 26, TEXT, width=_WIDTH)
    write(draw, (_EDGE, 56), NOT_FOR_DIAGNOSIS, 15, WARNING)
    draw.line((_EDGE, 80, SIDE - _EDGE, 80), RULE, 1)
    return page, draw


def _regions(draw: ImageDraw.ImageDraw, y: float, findings: Findings) -> float:
    """Table of the lungs: volumes, infected part, attenuation."""
    edges = (0.40, 0.55, 0.68, 0.84, 1.0)
    columns = [(float(_EDGE), "l", 0.24 * _WIDTH), *((_EDGE + edge * _WIDTH, "r", 0.15 * _WIDTH) for edge in edges)]
    table_row(draw, y, ("", "Lung, ml", "Infected, ml", "Infected, %", "Lung, HU", "Infected, HU"), columns, 14, DIM)
    y += leading(14) + 2
    rows = (("Right lung", findings.right), ("Left lung", findings.left), ("Both lungs", findings.both))
    for name, region in rows:
        table_row(draw, y, (name, *_numbers(region)), columns, 17)
        y += leading(17)
    draw.line((_EDGE, y + 4, SIDE - _EDGE, y + 4), RULE, 1)
    return y + 4


def _numbers(region: Region) -> tuple[str, ...]:
    return (
        f"{region.volume_ml:.0f}",
        f"{region.infected_ml:.1f}",
        f"{100 * region.infected_share:.1f}",
        _hu(region.mean_hu),
        _hu(region.infected_mean_hu),
    )


def _hu(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "-"


def _rules(draw: ImageDraw.ImageDraw, y: float, findings: Findings) -> float:
    """Table of the scan-level rules: outcome at the right, inputs and limit small below the name."""
    for rule in rules(findings):
        write(draw, (_EDGE, y), rule.name, 16, width=0.6 * _WIDTH)
        write(draw, (SIDE - _EDGE, y), rule.outcome, 16, TEXT, "ra", 0.38 * _WIDTH)
        write(draw, (_EDGE, y + 21), f"{rule.inputs}; {rule.limit}", 13, DIM, width=_WIDTH)
        y += 43
    return y


def _pictures(page: Image.Image, draw: ImageDraw.ImageDraw, view: PatientView, y: float) -> None:
    """Chest from the front at the left, an axial slice at the right, as high as the page has room."""
    top, gap = round(y) + 20, 12
    width, height = (_WIDTH - gap) // 2, SIDE - 62 - round(y) - 20
    plane = (
        int(view.infected_area.argmax()) if view.infection.any() else int(view.lung_planes[view.lung_planes.size // 2])
    )
    which = "most infected slice" if view.infection.any() else "middle of the lungs"
    right = _EDGE + width + gap
    write(draw, (_EDGE, y), "From the front, all slices together", 13, DIM, width=width)
    write(draw, (right, y), f"Axial, {which}, z {view.heights[plane]:.1f} mm", 13, DIM, width=width)
    page.paste(coronal_projection(view, width, height), (_EDGE, top))
    page.paste(axial(view, plane, width, height), (right, top))


def _legend(draw: ImageDraw.ImageDraw, y: float, findings: Findings) -> None:
    both = findings.both
    draw.rectangle((_EDGE, y + 3, _EDGE + 14, y + 15), INFECTION)
    lesions = counted(len(findings.lesion_list), "lesion")
    told = f"Infection {both.infected_ml:.1f} ml, {100 * both.infected_share:.1f} % of both lungs, {lesions}"
    write(draw, (_EDGE + 22, y), told if findings.lesion_list else "No infection found", 15, width=0.62 * _WIDTH)
    x = _EDGE + 0.72 * _WIDTH
    draw.line((x, y + 9, x + 14, y + 9), LUNG, 3)
    write(draw, (x + 22, y), f"Lungs {both.volume_ml:.0f} ml", 15, width=0.25 * _WIDTH)


def _footer(draw: ImageDraw.ImageDraw, models: tuple[ModelIdentity, ...]) -> None:
    made = ", ".join([f"{MODEL_NAME} {__version__}", *(f"{model.name} {model.version}" for model in models)])
    draw.line((_EDGE, SIDE - 38, SIDE - _EDGE, SIDE - 38), RULE, 1)
    write(draw, (_EDGE, SIDE - 29), made, 13, DIM, width=0.6 * _WIDTH)
    write(draw, (SIDE - _EDGE, SIDE - 29), NOT_FOR_DIAGNOSIS, 13, WARNING, "ra", 0.38 * _WIDTH)
