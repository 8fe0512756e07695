"""What a radiologist sees: lungnode's results of a real case, in OHIF on Orthanc, read back from the viewer itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, Orthanc, running_orthanc
from ohif import Viewer, opened, served, viewer_files
from pydicom import Dataset, dcmread

from node import results
from node.analysis import pipeline
from node.analysis.findings import LEFT, RIGHT, Findings
from node.config import Peer
from node.delivery.peer import Outgoing
from node.delivery.push import push_all
from node.results.drawing import INFECTION
from node.tasks import segmenter

pytestmark = [pytest.mark.peer, pytest.mark.data, pytest.mark.timeout(900)]

#: Where the screenshots stay.
SCREENSHOTS = REPOSITORY / "viewer-out"


@dataclass(frozen=True)
class Case:
    """A study in an archive, and what its results should show."""

    findings: Findings
    objects: dict[str, Dataset]
    study: str
    slices: int


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    viewer_files()
    with running_orthanc(tmp_path_factory.mktemp("archive") / "orthanc") as orthanc:
        yield orthanc


@pytest.fixture(scope="module")
def case(data_dir: Path, archive: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """P001 with its results, sent as the node sends them."""
    paths = sorted((data_dir / "ct-series" / "covid-ct-md" / "P001").glob("*.dcm"))
    volume, findings = pipeline.analyse(paths, segmenter("cpu"))
    folder = tmp_path_factory.mktemp("results")
    made = results.build(volume, findings, None, folder, content_datetime=datetime(2026, 11, 21, 6, 0))
    assert [one.problems for one in made] == [()] * len(made)
    refused: list[object] = []
    peer = Peer(ae_title=archive.ae_title, host="127.0.0.1", port=archive.port)
    items = [Outgoing.read(path) for path in (*paths, *(one.path for one in made))]
    push_all(items, peer, "LUNGNODE", lambda _item, error: refused.append(error) if error else None)
    assert refused == []
    objects = {one.kind: dcmread(one.path, stop_before_pixels=True) for one in made}
    return Case(findings, objects, volume.study_instance_uid, len(paths))


@pytest.fixture(scope="module")
def viewer(case: Case, archive: Orthanc) -> Iterator[Viewer]:
    dist, browser = viewer_files()
    SCREENSHOTS.mkdir(exist_ok=True)
    with served(archive, dist) as base, opened(base, browser, case.study, SCREENSHOTS, case.slices) as open_viewer:
        yield open_viewer


@pytest.mark.parametrize("kind", ["infection-seg", "lung-seg"])
def test_viewer_holds_every_voxel_of_every_segment(case: Case, viewer: Viewer, kind: str) -> None:
    seg = case.objects[kind]
    viewer.load(seg.SeriesDescription)
    viewer.hydrate()

    def held() -> dict[str, dict[str, int]] | None:
        shown = viewer.series(seg.SeriesInstanceUID)
        return viewer.state()["segmentations"].get(shown["uid"]) if shown else None

    found = viewer.until(held, f"the segmentation {kind}")
    here = (case.findings.lesions > 0) == (kind == "infection-seg")
    expected = [np.count_nonzero((case.findings.lungs == side) & here) for side in (RIGHT, LEFT)]
    assert found["counts"] == {"1": expected[0], "2": expected[1]}
    assert found["names"] == {str(one.SegmentNumber): one.SegmentLabel for one in seg.SegmentSequence}
    viewer.shoot(kind)
    complain(viewer)


def test_report_shows_its_groups_on_the_image(case: Case, viewer: Viewer) -> None:
    report = case.objects["sr"]
    viewer.load(report.SeriesDescription)

    def loaded() -> list[dict[str, object]] | None:
        shown = viewer.series(report.SeriesInstanceUID)
        return shown["groups"] if shown and shown["loaded"] and shown["groups"] else None

    groups = viewer.until(loaded, "the report's groups")
    lesions = case.findings.lesion_list[:10]
    assert [group["name"] for group in groups] == [
        "Right lung",
        "Left lung",
        "Infection, both lungs",
        *(f"Lesion {lesion.label}, {lesion.side} lung" for lesion in lesions),
    ]
    assert all(group["on_image"] and group["outlines"] == 1 for group in groups)
    assert f"Infected share of both lungs: {100 * case.findings.both.infected_share:.2f} %" in groups[2]["values"]
    viewer.page.wait_for_timeout(3000)
    picture = viewer.shoot("sr")
    # OHIF draws outlines and values in pure green.
    green = (picture[..., 1] > 200) & (picture[..., 0] < 60) & (picture[..., 2] < 60)
    assert np.count_nonzero(green) > 500
    assert viewer.page.get_by_text("Something went wrong").count() == 0
    complain(viewer)


def test_capture_shows_in_colour(case: Case, viewer: Viewer) -> None:
    capture = case.objects["capture"]
    viewer.load(capture.SeriesDescription)
    viewer.until(lambda: (viewer.series(capture.SeriesInstanceUID) or {}).get("shown"), "the capture")
    viewer.page.wait_for_timeout(3000)
    picture = viewer.shoot("capture")
    assert np.count_nonzero(np.abs(picture - np.array(INFECTION)).sum(axis=-1) < 60) > 200
    complain(viewer)


def complain(viewer: Viewer) -> None:
    """No toast, no dialog, no error in the console."""
    assert viewer.notices() == []
    assert viewer.complaints == []
