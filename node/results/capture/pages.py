"""The pages of the colour capture: a summary, slices, and the page that says why nothing was analysed.

Square pages of one size, without patient attributes: those are in the object's header, where an archive can correct
them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from models.registry import ModelIdentity
from node import __version__
from node.identity import MODEL_NAME
from node.methods.outcome import Earlier, Outcome, Statement, Subject, Table, cell
from node.results.capture.drawing import PatientView, axial, projection
from node.results.capture.typesetting import (
    DIM,
    MEDIUM,
    PAGE,
    RULE,
    TEXT,
    WARNING,
    leading,
    paragraph,
    table_row,
    write,
)
from node.results.forms import CAPTURE_FORMS
from node.results.provenance import NOT_FOR_DIAGNOSIS
from node.results.trend import rows

#: Side of a page in pixels. A whole page fits a monitor of 1024 lines, and a frame of it is 1.8 MB of RGB.
SIDE = 768

#: Key slices after the summary: about one every 15 mm of an adult's lungs, and with the summary 37 MB.
KEY_SLICES = 20

#: Most slices in a capture, whatever a peer asks for; a longer series is thinned evenly. With the summary 400 frames,
#: at which Weasis 4.6 stops, and 0.7 GB.
MOST_SLICES = 399

_EDGE = 28
_WIDTH = SIDE - 2 * _EDGE


def planes_of(view: PatientView, form: str) -> list[int]:
    """Axial planes of a capture in this form (`CAPTURE_FORMS`), from the head down."""
    match = CAPTURE_FORMS.fullmatch(form)
    if form == "key-images" or match is None:
        return key_planes(view, KEY_SLICES)
    every = max(1, round(float(match[1]) / view.spacing[0])) if match[1] else 1
    planes = range(len(view.heights) - 1, -1, -every)
    return list(planes[:: -(-len(planes) // MOST_SLICES)])


def key_planes(view: PatientView, count: int) -> list[int]:
    """Up to `count` axial planes from the head down: even through what is outlined, with the most tinted among them."""
    planes = view.planes
    # Bin centres: the outermost slices show slivers and nothing to read.
    even = (np.arange(min(count, planes.size)) + 0.5) * planes.size / min(count, planes.size)
    chosen = [int(planes[int(step)]) for step in even]
    if view.tinted.any():
        most = int(view.tinted_area.argmax())
        nearest = min(range(len(chosen)), key=lambda n: abs(chosen[n] - most))
        chosen[nearest] = most
    return sorted(set(chosen), reverse=True)


def summary_page(view: PatientView, outcome: Outcome, earlier: Sequence[Earlier] = ()) -> Image.Image:
    """What was found, in words and numbers, and as seen from the front and from below."""
    page, draw = _page(outcome.title)
    y = paragraph(draw, (_EDGE, 92), outcome.headline, 17, _WIDTH, TEXT, 2, MEDIUM) + 10
    y = _table(draw, y, outcome.table, view)
    y = _statements(draw, y + 14, rows(outcome, earlier))
    if outcome.notes:
        y = paragraph(draw, (_EDGE, y + 2), "Note: " + " ".join(outcome.notes), 13, _WIDTH, WARNING, 2)
    _pictures(page, draw, view, y + 12)
    _footer(draw, outcome.models)
    return page


def slice_page(view: PatientView, outcome: Outcome, plane: int) -> Image.Image:
    """One axial slice with what was found on it, its place, and the sums."""
    page = Image.new("RGB", (SIDE, SIDE), PAGE)
    draw = ImageDraw.Draw(page)
    number = len(view.heights) - plane
    write(draw, (_EDGE, 12), f"z {view.heights[plane]:.1f} mm", 22, weight=MEDIUM)
    write(draw, (_EDGE, 42), f"Axial slice {number} of {len(view.heights)} from the head", 14, DIM)
    pictures, pixels = outcome.pictures, np.count_nonzero(view.outlined[plane])
    area = view.tinted_area[plane] * view.spacing[1] * view.spacing[2] / 100
    here = pictures.here.format(area=area, share=100 * view.tinted_area[plane] / max(pixels, 1))
    write(draw, (SIDE - _EDGE, 14), here if area else pictures.nothing_here, 17, anchor="ra", width=_WIDTH * 0.7)
    centre, width = pictures.window
    write(draw, (SIDE - _EDGE, 42), f"{pictures.window_name}, C {centre:.0f} W {width:.0f} HU", 14, DIM, "ra")
    page.paste(axial(view, plane, SIDE, SIDE - 144), (0, 68))
    _legend(draw, SIDE - 66, view)
    _footer(draw, outcome.models)
    return page


def tile(view: PatientView, plane: int, width: int, height: int) -> Image.Image:
    """One axial slice with no more than its place, for a montage."""
    picture = axial(view, plane, width, height)
    write(ImageDraw.Draw(picture), (8, 6), f"z {view.heights[plane]:.1f} mm", 14, edge=2)
    return picture


def not_analysed_page(reason: str, subject: Subject) -> Image.Image:
    """Says plainly that there is no result, and why."""
    page, draw = _page(f"{subject.title}: not analysed")
    y = paragraph(draw, (_EDGE, 112), f"Not analysed: {reason}", 24, _WIDTH, WARNING, 12, MEDIUM)
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
    write(draw, (_EDGE, 18), title, 26, TEXT, width=_WIDTH, weight=MEDIUM)
    write(draw, (_EDGE, 54), NOT_FOR_DIAGNOSIS, 15, WARNING)
    draw.line((_EDGE, 80, SIDE - _EDGE, 80), RULE, 1)
    return page, draw


def _table(draw: ImageDraw.ImageDraw, y: float, table: Table, view: PatientView) -> float:
    """Table of numbers, the first columns on the page, with each row's share as a bar."""
    shown = [(n, column) for n, column in enumerate(table.columns) if column.on_page][:4]
    edges = (*(0.30, 0.45, 0.58)[: len(shown) - 1], 1.0)
    columns = [(float(_EDGE), "l", 0.16 * _WIDTH), *((_EDGE + edge * _WIDTH, "r", 0.13 * _WIDTH) for edge in edges)]
    left, right = _EDGE + 0.63 * _WIDTH, _EDGE + 0.85 * _WIDTH
    table_row(draw, y, ("", *(column.heading for _, column in shown)), columns, 13, DIM)
    write(draw, (left, y), "0", 13, DIM)
    write(draw, (right, y), "100 %", 13, DIM, "ra")
    y += leading(13) + 4
    for row in table.rows:
        table_row(draw, y, (row.name, *(cell(column, row.values[n]) for n, column in shown)), columns, 17)
        bar = round(left), round(y) + 5, round(right), round(y) + 16
        draw.rectangle(bar, outline=DIM)
        if row.share > 0:
            # Never so short that it is not seen.
            length = max(2, round((bar[2] - bar[0] - 2) * min(row.share, 1)))
            colour = view.pictures.tinted.colour
            draw.rectangle((bar[0] + 1, bar[1] + 1, bar[0] + length, bar[3] - 1), colour)
        y += leading(17)
    draw.line((_EDGE, y + 5, SIDE - _EDGE, y + 5), RULE, 1)
    return y + 5


def _statements(draw: ImageDraw.ImageDraw, y: float, shown: Sequence[Statement]) -> float:
    """Table of statements: outcome at the right, inputs and limits small below the name."""
    for one in shown:
        write(draw, (_EDGE, y), one.name, 16, width=0.5 * _WIDTH)
        write(draw, (SIDE - _EDGE, y), one.verdict, 16, TEXT, "ra", 0.48 * _WIDTH, MEDIUM)
        write(draw, (_EDGE, y + 21), re.sub("; $", "", f"{one.inputs}; {one.limits}"), 13, DIM, width=_WIDTH)
        y += 42
    return y


def _pictures(page: Image.Image, draw: ImageDraw.ImageDraw, view: PatientView, y: float) -> None:
    """What is tinted from the front at the left, from below at the right, as high as the page has room."""
    outlined, tinted = view.pictures.outlined, view.pictures.tinted
    top, gap = round(y) + 22, 12
    width, height = (_WIDTH - gap) // 2, SIDE - 52 - round(y) - 22
    right = _EDGE + width + gap
    write(draw, (_EDGE, y), "From the front, all slices together", 13, DIM, width=width)
    write(draw, (right, y), "From below, all slices together", 13, DIM, width=width * 0.55)
    found = bool(view.tinted.any())
    key = f"{tinted.name}, {outlined.name}" if found else outlined.name
    x = SIDE - _EDGE - write(draw, (SIDE - _EDGE, y), key, 13, DIM, "ra", width * 0.4) - 20
    if found:
        draw.rectangle((x, y + 3, x + 6, y + 12), tinted.colour)
    draw.line((x + 9, y + 8, x + 15, y + 8), outlined.colour, 3)
    page.paste(projection(view, "front", width, height), (_EDGE, top))
    page.paste(projection(view, "below", width, height), (right, top))


def _legend(draw: ImageDraw.ImageDraw, y: float, view: PatientView) -> None:
    outlined, tinted = view.pictures.outlined, view.pictures.tinted
    draw.rectangle((_EDGE, y + 3, _EDGE + 13, y + 16), tinted.colour)
    write(draw, (_EDGE + 22, y), tinted.legend, 15, width=0.62 * _WIDTH)
    # Set from the right edge, so that any sum ends there.
    x = SIDE - _EDGE - write(draw, (SIDE - _EDGE, y), outlined.legend, 15, TEXT, "ra", 0.28 * _WIDTH)
    draw.line((x - 22, y + 10, x - 8, y + 10), outlined.colour, 3)


def _footer(draw: ImageDraw.ImageDraw, models: tuple[ModelIdentity, ...]) -> None:
    made = ", ".join([f"{MODEL_NAME} {__version__}", *(f"{model.name} {model.version}" for model in models)])
    draw.line((_EDGE, SIDE - 38, SIDE - _EDGE, SIDE - 38), RULE, 1)
    write(draw, (_EDGE, SIDE - 30), made, 13, DIM, width=0.6 * _WIDTH)
    write(draw, (SIDE - _EDGE, SIDE - 30), NOT_FOR_DIAGNOSIS, 13, WARNING, "ra", 0.38 * _WIDTH)
