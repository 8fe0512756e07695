"""Text on pictures: one typeface, colours that read on a grey monitor, and lines that never leave their column.

The typeface is the one inside Pillow, so that a picture is the same on every machine; it covers ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]

#: Page, text, text that matters less, rules, and text that warns.
PAGE: Colour = (14, 16, 20)
TEXT: Colour = (236, 238, 240)
DIM: Colour = (160, 166, 174)
RULE: Colour = (62, 68, 78)
WARNING: Colour = (255, 200, 60)

#: Smallest size that is still read on a monitor at arm's length, pixels.
SMALLEST = 12


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = TEXT,
    anchor: str = "la",
    width: float | None = None,
) -> float:
    """Draw one line, dark-edged so that it reads on any picture; returns its width in pixels.

    With `width` the line is first set smaller, then cut with '...', until it fits. `anchor` is Pillow's.
    """
    while width is not None and size > SMALLEST and _font(size).getlength(text) > width:
        size -= 1
    if width is not None and _font(size).getlength(text) > width:
        while text and _font(size).getlength(text + "...") > width:
            text = text[:-1]
        text = text.rstrip() + "..." if text else ""
    draw.text(place, text, colour, _font(size), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    return float(_font(size).getlength(text))


def paragraph(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    width: float,
    colour: Colour = TEXT,
    lines: int = 100,
) -> float:
    """Draw text broken into lines of at most `width`; returns the y below the last.

    Text beyond `lines` lines is cut with '...'.
    """
    x, y = place
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if broken[-1] and _font(size).getlength(longer) > width:
            broken.append(word)
        else:
            broken[-1] = longer
    if len(broken) > lines:
        broken = [*broken[: lines - 1], " ".join(broken[lines - 1 :])]
    for line in broken:
        write(draw, (x, y), line, size, colour, width=width)
        y += leading(size)
    return y


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


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
