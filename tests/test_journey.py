"""The whole path with real peers: DCMTK sends a CT to lungnode, the results arrive in Orthanc and are read back."""

from __future__ import annotations

import email
import json
import os
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import SimpleITK
from conftest import Orthanc, RunningNode, running_node, running_orthanc, tool, wait_for
from pydicom import Dataset, dcmread

from models.phantom.draw import phantom
from node.images.phantom_series import write_series

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

KINDS = ["infection-seg", "lung-seg", "sr", "capture"]

#: Of the phantoms: slices, rows, columns, and their distances in mm; 200 mm of a chest.
CHEST: dict[str, Any] = {"shape": (40, 128, 128), "spacing": (5.0, 3.0, 3.0)}


def settings(orthanc: Orthanc) -> dict[str, Any]:
    peers = {
        "pacs": {"ae_title": orthanc.ae_title, "host": "127.0.0.1", "port": orthanc.port, "may": ["receive"]},
        "scanner": {"ae_title": "STORESCU", "host": "127.0.0.1", "port": 104, "may": ["send"]},
    }
    return {"peers": peers, "routes": [{"name": "chest", "from": ["scanner"], "to": {"pacs": KINDS}}]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """The PACS of all that is sent to `node`."""
    with running_orthanc(tmp_path_factory.mktemp("archive") / "orthanc") as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, archive: Orthanc) -> Iterator[RunningNode]:
    """One node for several series, as in a hospital; to start it takes longer than to analyse a phantom."""
    with running_node(tmp_path_factory.mktemp("node") / "node", settings(archive)) as running:
        yield running


def storescu(folder: Path, node: RunningNode, *options: str) -> None:
    arguments = [*options, "--scan-directories", "--recurse", "-aec", node.ae_title, "-aet", "STORESCU"]
    done = subprocess.run(
        [tool("storescu"), *arguments, "127.0.0.1", str(node.port), folder],
        env={**os.environ, "TCP_NODELAY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def wait_until_finished(node: RunningNode, series_uid: str, seconds: float = 300) -> dict[str, Any]:
    """What `lungnode status` says of the newest generation of a series, when nothing is to be done for any."""

    def finished() -> bool:
        states = node.states()
        assert "failed" not in states.values(), node.log.read_text()
        return series_uid in states and not set(states.values()) & {"waiting", "running", "delivering"}

    wait_for(finished, seconds, f"the node to finish; its log:\n{node.log.read_text()[-3000:]}")
    return next(one for one in node.status() if one["series_instance_uid"] == series_uid)


def fetch(orthanc: Orthanc, study: str) -> list[Dataset]:
    """All instances of a study over DICOMweb (WADO-RS, PS3.18 10.4)."""
    answer = httpx.get(
        f"{orthanc.http}/dicom-web/studies/{study}",
        headers={"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'},
        timeout=60,
    )
    answer.raise_for_status()
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + answer.content).get_payload()
    return [dcmread(BytesIO(part.get_payload(decode=True))) for part in parts]  # type: ignore[union-attr]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.data
def test_covid_case_from_storescu_to_orthanc(
    data_dir: Path, node: RunningNode, archive: Orthanc, tmp_path: Path
) -> None:
    case = data_dir / "ct-series" / "covid-ct-md" / "P001"
    source = [dcmread(path, stop_before_pixels=True) for path in sorted(case.glob("*.dcm"))]
    storescu(case, node, "--propose-lossless")
    series = wait_until_finished(node, source[0].SeriesInstanceUID)
    assert series["complete"], series["closed_because"]
    assert series["state"] == "delivered"

    objects = fetch(archive, source[0].StudyInstanceUID)
    assert sorted(one.Modality for one in objects) == ["OT", "SEG", "SEG", "SR"]
    for one in objects:
        assert one.PatientID == source[0].PatientID
        assert one.StudyInstanceUID == source[0].StudyInstanceUID
        assert one.SeriesInstanceUID != source[0].SeriesInstanceUID
        purposes = [item.PurposeOfReferenceCodeSequence[0].CodeValue for item in one.ContributingEquipmentSequence]
        assert "109102" in purposes  # Processing Equipment
    assert len({one.SeriesInstanceUID for one in objects}) == 4

    files: dict[str, Path] = {}
    for one in objects:
        infected = any("nfection" in segment.SegmentLabel for segment in one.get("SegmentSequence", []))
        name = "infection" if infected else {"SEG": "lungs", "SR": "sr", "OT": "capture"}[one.Modality]
        files[name] = tmp_path / f"{name}.dcm"
        one.save_as(files[name], enforce_file_format=True)
        assert "Error" not in run(tool("dciodvfy"), files[name])
    assert "Imaging Measurements" in run(tool("dsrdump"), files["sr"])

    measured = {name: _segment_ml(files[name], tmp_path / name, _voxel_ml(source)) for name in ("lungs", "infection")}
    both = series["analyses"][0]["summary"]["lungs"]["both"]
    # The lungs' segments are what is left beside the infection's.
    assert measured["lungs"] + measured["infection"] == pytest.approx(both["volume_ml"], rel=1e-6)
    assert measured["infection"] == pytest.approx(both["infected_ml"], rel=1e-6)
    report = tmp_path / "report.json"
    run(tool("tid1500reader"), "--inputDICOM", files["sr"], "--outputMetadata", report)
    groups = json.loads(report.read_text())["Measurements"]
    assert len(groups) >= 3

    storescu(case, node, "--propose-lossless")
    # Nothing of it is new, so nothing is opened: what was sent is answered, and that is all.
    time.sleep(5)
    assert wait_until_finished(node, source[0].SeriesInstanceUID)["generation"] == 1
    assert len(fetch(archive, source[0].StudyInstanceUID)) == 4


def test_two_acquisitions_reach_orthanc_and_the_terminal_tells(
    node: RunningNode, archive: Orthanc, tmp_path: Path
) -> None:
    ct = [write_series(phantom(3, severity=2, **CHEST), tmp_path / "ct", 3, acquisition) for acquisition in (1, 2)]
    storescu(tmp_path / "ct", node)
    first = dcmread(ct[0][0])
    series = wait_until_finished(node, first.SeriesInstanceUID)
    objects = fetch(archive, first.StudyInstanceUID)
    assert len({one.SeriesInstanceUID for one in objects}) == len({one.SeriesNumber for one in objects}) == 8
    for acquisition, paths in enumerate(ct, 1):
        of_it = [one for one in objects if one.SeriesDescription.endswith(f", acquisition {acquisition}")]
        assert sorted(one.Modality for one in of_it) == ["OT", "SEG", "SEG", "SR"]
        (lungs,) = [one for one in of_it if "lungs" in one.SeriesDescription]
        named = {item.ReferencedSOPInstanceUID for item in lungs.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
        assert named == {dcmread(path).SOPInstanceUID for path in paths}
    (row,) = [line for line in node.command("status").stdout.splitlines() if "8/8" in line]
    assert "delivered" in row
    timeline = node.command("status", str(series["id"])).stdout
    assert "acquisition 2: sr delivered to pacs" in timeline
    for stage in ("received", "triage", "analysis", "delivery"):
        assert stage in timeline
    assert node.command("echo", "pacs").returncode == 0


def test_dead_pacs_owes_and_retry_delivers(tmp_path: Path, orthanc: Orthanc) -> None:
    wrong = settings(orthanc)
    alive, wrong["peers"]["pacs"]["port"] = wrong["peers"]["pacs"]["port"], 1
    paths = write_series(phantom(3, severity=2, **CHEST), tmp_path / "ct", 3)
    with running_node(tmp_path / "node", wrong) as node:
        storescu(tmp_path / "ct", node)
        wait_for(lambda: list(node.states().values()) == ["delivering"], 120, "the objects to be owed")
        wait_for(lambda: "no connection to ORTHANC" in node.command("status", "1").stdout, 120, "the refusal")
        assert node.status()[0]["state"] == "delivering"
        assert node.command("echo", "pacs").returncode == 1
        assert "will be tried again now" in node.command("retry", "1").stdout
    wrong["peers"]["pacs"]["port"] = alive
    with running_node(tmp_path / "node", wrong) as node:
        wait_until_finished(node, dcmread(paths[0]).SeriesInstanceUID)
        assert orthanc.get("/statistics").json()["CountInstances"] == 4


def test_series_that_cannot_be_analysed_is_told_in_its_study(
    node: RunningNode, archive: Orthanc, tmp_path: Path
) -> None:
    paths = write_series(phantom(4, severity=0, **CHEST), tmp_path / "ct", 4)
    paths[len(paths) // 2].unlink()
    storescu(tmp_path / "ct", node)
    series = wait_until_finished(node, dcmread(paths[0]).SeriesInstanceUID)
    assert series["state"] == "not analysed"
    assert "gap at z" in series["verdict"]
    told = fetch(archive, dcmread(paths[0]).StudyInstanceUID)
    assert {one.Modality for one in told} <= {"SR", "OT"}
    assert told


def _voxel_ml(source: list[Dataset]) -> float:
    z = sorted(float(one.ImagePositionPatient[2]) for one in source)
    row, column = source[0].PixelSpacing
    return float((z[-1] - z[0]) / (len(z) - 1) * row * column / 1000)


def _segment_ml(seg: Path, folder: Path, voxel_ml: float) -> float:
    """Volume of all segments as dcmqi reads them."""
    folder.mkdir()
    run(tool("segimage2itkimage"), "--inputDICOM", seg, "--outputDirectory", folder, "--outputType", "nrrd")
    images = [SimpleITK.ReadImage(path) for path in folder.glob("*.nrrd")]
    return sum(int((SimpleITK.GetArrayFromImage(image) > 0).sum()) for image in images) * voxel_ml
