"""The pictures: what is burned in, where, and that nothing leaves the page."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from synthetic_chest import FEET_FIRST, MODELS, MOMENT, PRONE, Chest, Shape, make_chest

from node.methods.outcome import Earlier
from node.methods.pneumonia.outcome import INFECTION_COLOUR as INFECTION
from node.methods.pneumonia.outcome import LUNG_COLOUR as LUNG
from node.methods.pneumonia.outcome import outcome_of, point
from node.methods.pneumonia.subject import SUBJECT
from node.results import makers
from node.results.capture import pages, typesetting
from node.results.capture.drawing import PatientView, axial, projection
from node.results.capture.pages import SIDE, key_planes, not_analysed_page, planes_of, slice_page, summary_page
from node.results.forms import Profile
from node.results.trend import trend

STORED = {
    "feet first": Shape(orientation=FEET_FIRST, patient_position="FFS"),
    "prone": Shape(orientation=PRONE, patient_position="HFP"),
    "coronal": Shape(slices=30, orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0), extent=(300.0, 240.0, 360.0)),
    "sagittal": Shape(slices=36, orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0), extent=(360.0, 240.0, 300.0)),
    "7 x 13": Shape(slices=9, rows=7, columns=13),
    "unequal spacing": Shape(rows=96, columns=40),
}


@pytest.fixture(scope="module", params=STORED)
def chest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chest:
    return make_chest(tmp_path_factory.mktemp("chest"), STORED[request.param])


def orange(image: Image.Image) -> NDArray[np.bool_]:
    """Pixels near the colour of infection."""
    return np.abs(np.asarray(image, int) - INFECTION).sum(axis=-1) < 60


def test_a_right_posterior_lesion_is_drawn_left_and_low(chest: Chest) -> None:
    view = chest.view
    plane = int(view.tinted_area.argmax())
    # 36 mm is a slice and a half of the coarsest of these.
    assert view.heights[plane] == pytest.approx(55, abs=25)
    rows, columns = np.nonzero(orange(axial(view, plane, 400, 300)))
    assert columns.mean() < 200
    assert rows.mean() > 150
    rows, columns = np.nonzero(orange(projection(view, "front", 300, 300)) | tinted(view))
    assert columns.mean() < 150
    assert rows.mean() < 150


def tinted(view: PatientView) -> NDArray[np.bool_]:
    """Pixels of the coronal projection that have any of the colour of infection."""
    picture = np.asarray(projection(view, "front", 300, 300), int)
    return (picture[..., 0] - picture[..., 2]) > 40


def test_heights_are_those_of_the_patient(chest: Chest) -> None:
    view = chest.view
    steps = np.diff(view.heights)
    assert steps == pytest.approx(view.spacing[0])
    assert view.heights.mean() == pytest.approx(0, abs=1e-6)


def test_pictures_are_true_to_scale(tmp_path: Path) -> None:
    ball = ((-75.0, 10.0, 0.0), 30.0)
    for shape in (Shape(slices=60, rows=300, columns=120), Shape(slices=60, rows=100, columns=300)):
        chest = make_chest(tmp_path, shape, [ball])
        view = chest.view
        rows, columns = np.nonzero(orange(axial(view, int(view.tinted_area.argmax()), 700, 700)))
        assert np.ptp(rows) / np.ptp(columns) == pytest.approx(1, abs=0.08)


def test_the_capture_is_a_summary_and_key_slices(chest: Chest, tmp_path: Path) -> None:
    (made,) = makers.build(
        chest.volume, chest.outcome, None, tmp_path, [Profile(("capture",))], content_datetime=MOMENT
    )
    capture = pydicom.dcmread(made.path)
    assert capture.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7.4"
    assert (capture.BurnedInAnnotation, capture.BodyPartExamined) == ("NO", "CHEST")
    assert capture.ImageType == ["DERIVED", "SECONDARY"]
    view = chest.view
    planes = key_planes(view, 20)
    assert capture.NumberOfFrames == 1 + len(planes) == len(capture.FrameLabelVector)
    frames = capture.pixel_array
    assert frames.shape == (1 + len(planes), SIDE, SIDE, 3)
    # Read back, a frame is the page that was drawn.
    assert np.array_equal(frames[0], np.asarray(summary_page(view, chest.outcome)))
    assert np.array_equal(frames[-1], np.asarray(slice_page(view, chest.outcome, planes[-1])))


def test_key_planes_go_down_through_the_lungs_and_hold_the_most_infected(chest: Chest) -> None:
    view = chest.view
    for count in (1, 5, 20):
        planes = key_planes(view, count)
        assert planes == sorted(set(planes), reverse=True)
        assert 1 <= len(planes) <= count
        assert set(planes) <= set(view.planes.tolist())
        assert int(view.tinted_area.argmax()) in planes


def test_no_page_is_written_to_its_edge(chest: Chest) -> None:
    """Text that were too long, or a picture too large, would touch the border of the page."""
    crowded = replace(
        chest.findings,
        models=tuple(replace(model, name=model.name * 12, version="2026.11.21+abcdef") for model in MODELS),
        right=replace(chest.findings.right, volume_ml=123456789.0, infected_ml=12345678.9),
        notes=("The lungs reach the lowest slice: part of them may not have been scanned.",) * 6,
    )
    view, outcome = chest.view, outcome_of(chest.volume, crowded)
    pages = [summary_page(view, outcome), not_analysed_page("the scan has a gap " * 60, SUBJECT)]
    for page in pages:
        pixels = np.asarray(page, int)
        border = np.concatenate([pixels[:8].reshape(-1, 3), pixels[-8:].reshape(-1, 3)])
        sides = np.concatenate([pixels[:, :16].reshape(-1, 3), pixels[:, -16:].reshape(-1, 3)])
        assert (border == typesetting.PAGE).all()
        assert (sides == typesetting.PAGE).all()


@settings(max_examples=60)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80), st.integers(40, 400))
def test_a_line_keeps_to_its_width(text: str, width: int) -> None:
    image = Image.new("RGB", (500, 60), typesetting.PAGE)
    typesetting.write(ImageDraw.Draw(image), (20, 10), text, 20, width=width)
    drawn = (np.asarray(image, int) != typesetting.PAGE).any(axis=(0, 2))
    # The dark edge and a slanted last letter stand out by a few pixels.
    assert not drawn[20 + width + 5 :].any()


def test_colours_differ_in_brightness_too() -> None:
    """On a grey monitor, and for an eye without red or green, brightness is what is left."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    linear = (np.array([INFECTION, LUNG, typesetting.PAGE, typesetting.TEXT]) / 255) ** 2.2 @ weights
    infection, lung, page, text = linear + 0.05
    # Contrast ratios as of WCAG 2.2: 3 for graphics beside each other would leave no room; 1.5 is plain to see.
    assert infection / lung > 1.5
    assert text / page > 12


def test_the_montage_is_a_picture_of_everything(chest: Chest, tmp_path: Path) -> None:
    makers.overlay_png(chest.volume, chest.outcome, tmp_path / "montage.png")
    with Image.open(tmp_path / "montage.png") as montage:
        assert montage.size == (2048, 768)
        assert orange(montage.convert("RGB").crop((768, 0, 2048, 768))).any()


def test_peers_choose_which_slices_they_get(tmp_path: Path) -> None:
    chest = make_chest(tmp_path, Shape(slices=48))
    view = chest.view
    every = planes_of(view, "every-slice")
    assert every == list(range(47, -1, -1))
    # The slices are 5 mm apart.
    assert planes_of(view, "every-20-mm") == every[::4]
    assert planes_of(view, "every-0.5-mm") == every
    assert planes_of(view, "key-images") == key_planes(view, 20)
    profile = Profile(("capture",), capture="every-20-mm")
    (made,) = makers.build(chest.volume, chest.outcome, None, tmp_path, [profile], content_datetime=MOMENT)
    assert pydicom.dcmread(made.path, stop_before_pixels=True).FrameLabelVector[1] == f"z {view.heights[47]:.1f} mm"
    assert made.path.name == "capture-every-20-mm.dcm"


def test_longest_series_are_thinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Weasis 4.6 stops at 400 frames, and one is the summary.
    assert pages.MOST_SLICES + 1 <= 400
    monkeypatch.setattr(pages, "MOST_SLICES", 20)
    chest = make_chest(tmp_path, Shape(slices=48, rows=24, columns=24))
    planes = planes_of(chest.view, "every-slice")
    assert planes == list(range(47, -1, -3))


def test_earlier_results_stand_on_the_summary(chest: Chest) -> None:
    view = chest.view
    before = [Earlier(date(2026, 1, 12), point(250.0, 0.0812)), Earlier(date(2025, 12, 30), point(100.0, 0.033))]
    (rule,) = trend(before, chest.outcome)
    assert rule.inputs == "30 Dec 2025: 3.3 %, then 12 Jan 2026: 8.1 %"
    assert rule.outcome.startswith("before 8.1 %, 250.0 ml; now ")
    with_course, without = summary_page(view, chest.outcome, before), summary_page(view, chest.outcome)
    assert np.asarray(with_course).shape == np.asarray(without).shape
    assert (np.asarray(with_course) != np.asarray(without)).any()


def test_report_text_becomes_print() -> None:
    given = "z -12.5 mm, -600 HU, 20 mm2 and 5 cm2, sha-256, 2026-01-02..."
    assert typesetting.typographic(given) == "z −12.5 mm, −600 HU, 20 mm² and 5 cm², sha-256, 2026-01-02…"
    # Every sign that the pages use is in the typeface: none is drawn as the box for what is missing.
    font = TTFont(typesetting.font_file(typesetting.REGULAR))
    assert {ord(sign) for sign in "²−–…%"} <= set(font.getBestCmap())
