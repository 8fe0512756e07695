"""The pages as they were last looked at and found good; a change that an eye would see fails here.

To renew them after a change that is meant: run with LUNGNODE_GOLDEN=write, and look at every picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter
from synthetic_chest import Chest, Shape, make_chest

from node.methods.outcome import Earlier
from node.methods.pneumonia.outcome import point
from node.methods.pneumonia.subject import SUBJECT
from node.results.capture.pages import key_planes, not_analysed_page, slice_page, summary_page

GOLDEN = Path(__file__).parent / "golden"

LESIONS = [((-75.0, 45.0, 55.0), 18.0), ((70.0, 20.0, -50.0), 26.0)]
EARLIER = [Earlier(date(2025, 12, 30), point(310.0, 0.081)), Earlier(date(2026, 1, 12), point(160.5, 0.042))]

#: Largest difference of brightness, of 255, between pictures softened by two pixels. Another rendering of the same
#: letters stays below 20; a line of text that moved or a colour that changed is above 60.
VISIBLE = 40


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Chest:
    return make_chest(tmp_path_factory.mktemp("chest"), Shape(slices=48, rows=128, columns=128), LESIONS)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Chest:
    return make_chest(tmp_path_factory.mktemp("healthy"), Shape(slices=48, rows=128, columns=128), [])


def difference(one: Image.Image, other: Image.Image) -> int:
    """How much two pictures differ to an eye: the largest difference of any colour once both are softened."""
    soft = [picture.convert("RGB").filter(ImageFilter.GaussianBlur(2)) for picture in (one, other)]
    return max(high for _, high in ImageChops.difference(*soft).getextrema())


def pages(chest: Chest, healthy: Chest) -> dict[str, Callable[[], Image.Image]]:
    view = chest.view
    return {
        "summary": lambda: summary_page(view, chest.outcome, EARLIER),
        "slice": lambda: slice_page(view, chest.outcome, int(view.tinted_area.argmax())),
        "no-infection": lambda: summary_page(healthy.view, healthy.outcome),
        "not-analysed": lambda: not_analysed_page("there is a gap at z = -12.5 mm: 4.00 mm between slices", SUBJECT),
    }


@pytest.mark.parametrize("name", ["summary", "slice", "no-infection", "not-analysed"])
def test_page_looks_as_it_did(chest: Chest, healthy: Chest, name: str, tmp_path: Path) -> None:
    page = pages(chest, healthy)[name]()
    if os.environ.get("LUNGNODE_GOLDEN") == "write":
        page.quantize(128).save(GOLDEN / f"{name}.png", optimize=True)
    with Image.open(GOLDEN / f"{name}.png") as golden:
        page.save(tmp_path / f"{name}.png")
        assert difference(page, golden) < VISIBLE, f"compare {tmp_path / name}.png with {GOLDEN / name}.png"


def test_what_an_eye_sees_is_found(chest: Chest) -> None:
    view = chest.view
    page = slice_page(view, chest.outcome, key_planes(view, 5)[2])
    moved, noise = page.copy(), np.asarray(page, np.int16)
    moved.paste(page.crop((0, 0, 768, 60)), (0, 6))
    assert difference(page, moved) > VISIBLE
    assert difference(page, page.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > VISIBLE
    # What nobody sees is not.
    grain = np.random.default_rng(1).integers(-4, 5, noise.shape)
    assert difference(page, Image.fromarray((noise + grain).clip(0, 255).astype(np.uint8))) < VISIBLE / 4
