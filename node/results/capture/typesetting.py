"""Text on pictures: one typeface, colours that read on a grey monitor, and lines that never leave their column.

The typeface is Roboto, whose files lie in `fonts/` with their licence, so that a picture is the same on every machine;
its figures are all of one width, so that columns of numbers line up.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]
Weight = Literal["Roboto", "RobotoMedium"]

#: Weights in use: text, and what a reader looks for first.
REGULAR: Weight = "Roboto"
MEDIUM: Weight = "RobotoMedium"

_FONTS = Path(__file__).parent / "fonts"
_STYLE: dict[Weight, str] = {REGULAR: "Regular", MEDIUM: "Medium"}

#: Page, text, text that matters less, rules, and text that warns.
PAGE: Colour = (14, 16, 20)
TEXT: Colour = (236, 238, 240)
DIM: Colour = (166, 172, 180)
RULE: Colour = (62, 68, 78)
WARNING: Colour = (255, 200, 60)

#: Smallest size that is still read on a monitor at arm's length, pixels.
SMALLEST = 12


def typographic(text: str) -> str:
    """ASCII text of the report with the signs that a printed page has: m², a true minus, an ellipsis."""
    text = re.sub(r"\b([cm]m)2\b", "\\1²", text)
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return text.replace("...", "…")


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = TEXT,
    anchor: str = "la",
    width: float | None = None,
    weight: Weight = REGULAR,
    edge: int = 0,
) -> float:
    """Draw one line; returns its width in pixels.

    With `width` the line is first set smaller, then cut with '…', until it fits. `anchor` is Pillow's. `edge` is the
    width of a dark outline, for text that stands on a picture.
    """
    if width is not None:
        text = text[: _most(width)]
    text = typographic(text)
    while width is not None and size > SMALLEST and _font(size, weight).getlength(text) > width:
        size -= 1
    if width is not None and _font(size, weight).getlength(text) > width:
        ends = range(1, len(text) + 1)
        text = text[: bisect_right(ends, width, key=lambda end: _font(size, weight).getlength(text[:end] + "…"))]
        text = text.rstrip() + "…" if text else ""
    draw.text(place, text, colour, _font(size, weight), anchor=anchor, stroke_width=edge, stroke_fill=(0, 0, 0))
    return float(_font(size, weight).getlength(text))


def paragraph(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    width: float,
    colour: Colour = TEXT,
    lines: int = 100,
    weight: Weight = REGULAR,
) -> float:
    """Draw text broken into lines of at most `width`; returns the y below the last.

    Text beyond `lines` lines is cut with '…'.
    """
    x, y = place
    broken = [""]
    for word in typographic(text[: lines * _most(width)]).split():
        longer = f"{broken[-1]} {word}".strip()
        if broken[-1] and _font(size, weight).getlength(longer) > width:
            broken.append(word)
        else:
            broken[-1] = longer
    if len(broken) > lines:
        broken = [*broken[: lines - 1], " ".join(broken[lines - 1 :])]
    for line in broken:
        write(draw, (x, y), line, size, colour, width=width, weight=weight)
        y += leading(size)
    return y


def _most(width: float) -> int:
    """Characters that surely do not fit into so many pixels: what comes after them is cut without being measured.

    None is narrower than a pixel, and `typographic` makes one of three at most. So time does not grow with the text.
    """
    return 3 * int(width) + 1


def table_row(
    draw: ImageDraw.ImageDraw,
    y: float,
    cells: Sequence[str],
    columns: Sequence[tuple[float, str, float]],
    size: int,
    colour: Colour = TEXT,
) -> None:
    """Draw one row; a column is (x, 'l' or 'r' for what x is the edge of, width)."""
    for cell, (x, side, width) in zip(cells, columns, strict=True):
        write(draw, (x, y), cell, size, colour, f"{side}a", width)


def leading(size: int) -> int:
    """Distance between two lines of this size, pixels."""
    return round(size * 1.4)


def font_file(weight: Weight) -> str:
    """Path of the TrueType file of a weight."""
    return str(_FONTS / f"Roboto-{_STYLE[weight]}.ttf")


@cache
def _font(size: int, weight: Weight) -> ImageFont.FreeTypeFont:
    # The plain layout, as Pillow's other one depends on a library that not every machine has.
    return ImageFont.truetype(font_file(weight), size, layout_engine=ImageFont.Layout.BASIC)
