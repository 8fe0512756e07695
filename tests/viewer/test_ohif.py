"""What a radiologist sees: lungnode's results of real cases, in OHIF on Orthanc, read back from the viewer itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Orthanc, running_orthanc
from numpy.typing import NDArray
from ohif import Viewer, opened, running_browser, served, viewer_files
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels import pixel_array
from synthetic_chest import KINDS, crude_findings, findings_of

from models.labels import LEFT, RIGHT
from models.registry import load_bundle
from models.segmenter.inference import Segmenter
from node.config import Peer, Stow
from node.delivery.peer import Outgoing
from node.delivery.push import push_all
from node.delivery.stow import ByStow
from node.images.volume import Volume, read_volume
from node.methods.pneumonia import pipeline
from node.methods.pneumonia.findings import Findings
from node.methods.pneumonia.outcome import COLOURS, outcome_of
from node.methods.pneumonia.outcome import INFECTION_COLOUR as INFECTION
from node.results import makers
from node.results.forms import Profile

pytestmark = [pytest.mark.peer, pytest.mark.data, pytest.mark.timeout(900)]

#: Where the screenshots stay, and the pictures of which `tests/viewer/pictures.py` makes the README's.
SCREENSHOTS = REPOSITORY / "viewer-out"

MOMENT = datetime(2026, 11, 21, 6, 0)


@dataclass(frozen=True)
class Case:
    """A study in an archive, and what its results should show."""

    findings: Findings
    #: Headers of the results by the names of their files.
    objects: dict[str, Dataset]
    study: str
    #: Source instance with the most infection.
    key_instance: str


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    viewer_files()
    SCREENSHOTS.mkdir(exist_ok=True)
    with running_orthanc(tmp_path_factory.mktemp("archive") / "orthanc") as orthanc:
        yield orthanc


@pytest.fixture(scope="module")
def browser(archive: Orthanc) -> Iterator[tuple[Any, str]]:
    """Chromium, and the address of OHIF on the archive."""
    dist, program = viewer_files()
    with served(archive, dist) as base, running_browser(program) as chromium:
        yield chromium, base


@pytest.fixture(scope="module")
def case(data_dir: Path, archive: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """P001 with its results in the usual form, and its infection as a label map too."""
    paths = series(data_dir, "P001")
    volume, findings = pipeline.analyse(
        paths, Segmenter(load_bundle("lungs"), load_bundle("infection"), "cpu"), minimum_lesion_mm3=100
    )
    folder = tmp_path_factory.mktemp("P001")
    profiles = [Profile(KINDS), Profile(("infection-seg",), seg="labelmap")]
    made = makers.build(volume, outcome_of(volume, findings), None, folder, profiles, content_datetime=MOMENT)
    makers.overlay_png(volume, outcome_of(volume, findings), SCREENSHOTS / "overlay.png")
    capture = next(one.path for one in made if one.kind == "capture")
    Image.fromarray(pixel_array(capture, index=0)).save(SCREENSHOTS / "summary.png")
    return sent(archive, volume, findings, paths, made)


@pytest.fixture(scope="module")
def healthy(data_dir: Path, archive: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """normal001 as a network that finds nothing leaves it; its lungs, whose voxels P001 proves, by a threshold."""
    paths = series(data_dir, "normal001")
    volume = read_volume(paths)
    lungs = crude_findings(volume).lungs
    findings = findings_of(volume, lungs, np.zeros(lungs.shape, np.uint16), 0)
    folder = tmp_path_factory.mktemp("normal001")
    made = makers.build(volume, outcome_of(volume, findings), None, folder, content_datetime=MOMENT)
    return sent(archive, volume, findings, paths, made)


def series(data_dir: Path, name: str) -> list[Path]:
    return sorted((data_dir / "ct-series" / "covid-ct-md" / name).glob("*.dcm"))


def sent(
    archive: Orthanc, volume: Volume, findings: Findings, paths: list[Path], made: list[makers.ResultObject]
) -> Case:
    """Send a series and its results as the node sends them: by C-STORE, and label maps by STOW-RS."""
    assert [one.problems for one in made] == [()] * len(made)
    refused: list[object] = []
    peer = Peer(ae_title=archive.ae_title, host="127.0.0.1", port=archive.port)
    # Orthanc 1.10 takes no Label Map Segmentation over an association.
    by_stow = [one.path for one in made if "labelmap" in one.path.name]
    items = [Outgoing.read(path) for path in (*paths, *(one.path for one in made if one.path not in by_stow))]
    push_all(items, peer, "LUNGNODE", lambda _item, error: refused.append(error) if error else None)
    with ByStow(Stow(url=f"{archive.http}/dicom-web"), "archive") as stow:
        for path in by_stow:
            stow.send(Outgoing.read(path))
    assert refused == []
    objects = {one.path.stem: dcmread(one.path, stop_before_pixels=True) for one in made}
    most = int(np.argmax([np.count_nonzero(plane) for plane in findings.lesions]))
    return Case(findings, objects, volume.study_instance_uid, volume.sources[most].sop_instance_uid)


@pytest.fixture(scope="module")
def viewer(case: Case, browser: tuple[Any, str]) -> Iterator[Viewer]:
    with opened(*browser, case.study, SCREENSHOTS) as open_viewer:
        yield open_viewer


@pytest.mark.parametrize("name", ["infection-seg", "lung-seg", "infection-seg-labelmap"])
def test_viewer_holds_every_voxel_of_every_segment(case: Case, viewer: Viewer, name: str) -> None:
    seg = case.objects[name]
    found = viewer.open_segmentation(seg.SeriesInstanceUID)
    viewer.present(case.key_instance)
    viewer.shoot(name)
    here = (case.findings.lesions > 0) == name.startswith("infection")
    expected = {1: (case.findings.lungs == RIGHT) & here, 2: (case.findings.lungs == LEFT) & here}
    assert found["counts"] == {str(number): np.count_nonzero(mask) for number, mask in expected.items()}
    assert found["names"] == {str(one.SegmentNumber): one.SegmentLabel for one in seg.SegmentSequence}
    part = "infection" if name.startswith("infection") else "lung"
    for number, side in ((1, "right"), (2, "left")):
        # Recommended Display CIELab Value has 16 bits a part: the way to Lab and back costs a step or two.
        assert found["colours"][str(number)] == pytest.approx(COLOURS[f"{side}-{part}"], abs=3)
    complain(viewer)


def test_report_shows_its_groups_on_the_image(case: Case, viewer: Viewer) -> None:
    groups = groups_shown(case, viewer, "sr")
    lesions = case.findings.lesion_list[:10]
    assert [group["name"] for group in groups] == [
        "Right lung",
        "Left lung",
        "Infection, both lungs",
        *(f"Lesion {lesion.label}, {lesion.side} lung" for lesion in lesions),
    ]
    assert f"Infected share of both lungs: {100 * case.findings.both.infected_share:.2f} %" in groups[2]["values"]


def groups_shown(case: Case, viewer: Viewer, name: str) -> list[dict[str, Any]]:
    """Open the report: the viewer draws an outline for each group, with its values, and complains of nothing."""
    report = case.objects["sr"].SeriesInstanceUID
    viewer.open(report)
    groups = viewer.until(
        lambda: (one := viewer.series(report)) and one["loaded"] and one["groups"], "the report's groups"
    )
    assert all(group["on_image"] and group["outlines"] == 1 for group in groups)
    # OHIF draws outlines and values in pure green.
    viewer.present()
    viewer.until_picture(name, lambda picture: pixels_near(picture, (0, 255, 0)) > 500)
    assert viewer.page.get_by_text("Something went wrong").count() == 0
    complain(viewer)
    return list(groups)


def test_capture_shows_in_colour(case: Case, viewer: Viewer) -> None:
    capture = case.objects["capture"]
    shown = viewer.open(capture.SeriesInstanceUID)
    assert shown["pages"] == capture.NumberOfFrames
    viewer.until_picture("capture", lambda picture: pixels_near(picture, INFECTION) > 200)
    complain(viewer)


def test_pdf_opens(case: Case, viewer: Viewer) -> None:
    document = case.objects["pdf"]
    shown = viewer.open(document.SeriesInstanceUID)
    assert "pdf" in shown["handler"]
    # The viewer gives the document to the browser, which fetches it from the archive.
    embedded = viewer.page.locator('object[type="application/pdf"]')
    embedded.wait_for(state="attached")
    address = str(embedded.get_attribute("data"))
    assert viewer.page.evaluate(_BEGINNING, address) == "%PDF-"
    complain(viewer)


_BEGINNING = """async address => (await (await fetch(address)).text()).slice(0, 5)"""


def test_a_healthy_chest_shows_as_one(healthy: Case, browser: tuple[Any, str]) -> None:
    with opened(*browser, healthy.study, SCREENSHOTS) as viewer:
        assert set(healthy.objects) == {"lung-seg", "sr", "capture", "pdf"}
        groups = groups_shown(healthy, viewer, "no-finding-sr")
        assert [group["name"] for group in groups] == ["Right lung", "Left lung"]
        # OHIF shows a measured 0 as nothing (`NumericValue ? … : ''` in its SR extension); the report has the 0.
        assert "Right lung infected share:  %" in groups[0]["values"]
        viewer.open(healthy.objects["capture"].SeriesInstanceUID)
        picture = viewer.until_picture("no-finding", lambda picture: pixels_near(picture, (236, 238, 240)) > 200)
        assert pixels_near(picture, INFECTION) == 0
        assert not any(one["unsupported"] for one in viewer.sets())
        complain(viewer)


def pixels_near(picture: NDArray[np.int_], colour: tuple[int, int, int]) -> int:
    """Pixels of about this colour."""
    return int(np.count_nonzero(np.abs(picture - np.array(colour)).sum(axis=-1) < 60))


def complain(viewer: Viewer) -> None:
    """No toast, no dialog, no error in the console."""
    assert viewer.notices() == []
    assert viewer.complaints == []
