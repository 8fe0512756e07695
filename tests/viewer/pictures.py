"""The README's pictures, from what the viewer's tests have left: `make pictures` runs both.

    python tests/viewer/pictures.py

Look at every picture afterwards.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent.parent

#: The image in a screenshot of the viewer.
_VIEWPORT = (430, 60, 1430, 940)

#: Screenshot, picture, part of it, width in pixels.
PICTURES = (
    ("overlay", "overlay", None, 1536),
    ("summary", "summary", None, 640),
    ("lung-seg", "viewer-segmentations", _VIEWPORT, 640),
    ("sr", "viewer-report", _VIEWPORT, 640),
)


def main() -> None:
    for name, picture, part, width in PICTURES:
        with Image.open(REPOSITORY / "viewer-out" / f"{name}.png") as shot:
            seen = shot.convert("RGB").crop(part or (0, 0, *shot.size))
        small = seen.resize((width, round(width * seen.height / seen.width)), Image.Resampling.LANCZOS)
        # A palette makes a file a third as large; chosen so that rare colours stay and greys are smooth.
        small = small.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
        small.save(REPOSITORY / "docs" / f"{picture}.png", optimize=True)


if __name__ == "__main__":
    main()
