"""The seam of methods: a package of somebody else's brings one, and nothing outside that package knows of it."""

from __future__ import annotations

import dataclasses
import email
import io
import os
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import REPOSITORY, Orthanc, accepts, running_node, series_closed, tool, wait_for
from pydicom import Dataset, dcmread
from rich.console import Console
from rich.progress import Progress
from synthetic_chest import MOMENT, Shape, make_chest

from models.phantom.draw import phantom
from models.registry import BUNDLES, ModelIdentity, load_bundle
from models.runtime import CardMemoryError
from node import tasks
from node.cli.folder import NothingToAnalyse, analyse_folder, closed_folder
from node.config import Settings
from node.images.phantom_series import write_series
from node.images.volume import VolumeError
from node.installation import Node
from node.intake import closing
from node.intake.assembly import ClosedSeries
from node.intake.verdict import Verdict
from node.ledger.tables import AnalysisJob
from node.ledger.views import all_series
from node.methods import registry
from node.methods.pneumonia import method, pipeline
from node.methods.pneumonia.outcome import outcome_of
from node.results import makers

PACKAGE = Path(__file__).parent / "low_attenuation"
KIND = "low-attenuation-seg"


def run(code: str, *paths: Path) -> str:
    """Standard output of a fresh interpreter that has these folders beside the node's."""
    path = os.pathsep.join(map(str, (REPOSITORY, *paths)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_listed_without_an_import_and_one_is_found_without_the_others() -> None:
    code = """
import sys
from node.methods import registry
heavy = lambda: sorted({"low_attenuation", "node.methods.pneumonia", "numpy", "torch"} & set(sys.modules))
print(registry.names(), heavy())
registry.find("low-attenuation")
print([name for name in heavy() if name != "numpy"])
"""
    listed, found = run(code, PACKAGE).splitlines()
    assert listed == "['low-attenuation', 'pneumonia'] []"
    assert found == "['low_attenuation']"


def test_the_distribution_registers_what_a_source_tree_has() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP] == registry.SHIPPED


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("nowhere:METHOD", "cannot be loaded from nowhere:METHOD (ModuleNotFoundError)"),
        ("json:nothing", "cannot be loaded from json:nothing (AttributeError)"),
        ("json:loads", "json:loads is no method called 'mine'"),
        ("node.methods.pneumonia.method:METHOD", "is no method called 'mine'"),
    ],
)
def test_a_package_that_brings_no_method_is_named(monkeypatch: pytest.MonkeyPatch, value: str, told: str) -> None:
    monkeypatch.setattr(registry, "_found", lambda: {"mine": value})
    registry.find.cache_clear()
    try:
        with pytest.raises(registry.MethodError) as error:
            registry.find("mine")
        assert told in str(error.value)
    finally:
        registry.find.cache_clear()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    pacs = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}
    kinds = ["infection-seg", "lung-seg", "sr", "capture", "pdf"]
    routes = [{"name": "chest", "from": ["pacs"], "to": {"pacs": kinds}}]
    settings = {"data": tmp_path / "var", "peers": {"pacs": pacs}, "routes": routes, "worker": {"device": "cpu"}}
    made = Node.open(Settings.model_validate(settings))
    monkeypatch.setattr(tasks, "node", lambda: made)
    monkeypatch.setattr(tasks, "dispatch", lambda *_: None)
    return made


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ct")
    write_series(phantom(3, severity=2, shape=(40, 48, 48), spacing=(5.0, 7.0, 7.0)), folder / "1.2" / "1.3", 3)
    return folder


def received(here: Node, ct: Path, sender: str = "PACS") -> ClosedSeries:
    """The series in the spool, closed."""
    shutil.copytree(ct, here.spool, dirs_exist_ok=True)
    (closed,) = closed_folder(here.spool)
    return dataclasses.replace(closed, calling_ae=sender)


def test_a_method_is_asked_only_for_series_that_a_route_takes(here: Node, ct: Path) -> None:
    asked = []

    def judge(method: str, closed: Any) -> list[Verdict]:
        asked.append(method)
        return accepts(method, closed)

    closing.series_closed(here, received(here, ct, "STRANGER"), judge, lambda _: None)
    assert asked == []
    assert all_series(here.ledger)[0].verdict == "not analysed: no route takes it"


def test_a_method_that_fails_to_judge_lets_the_series_end_in_sight(here: Node, ct: Path) -> None:
    def broken(_method: str, _closed: Any) -> list[Verdict]:
        raise ValueError("Doe^Jane")

    closing.series_closed(here, received(here, ct), broken, lambda _: None)
    verdict = all_series(here.ledger)[0].verdict
    assert verdict.startswith("not analysed: method 'pneumonia' failed to judge it")
    assert "Doe" not in verdict


def test_worker_and_command_line_make_the_same_bytes(here: Node, ct: Path, tmp_path: Path) -> None:
    series_closed(here, received(here, ct))
    tasks.analyse(1)
    (analysis,) = all_series(here.ledger)[0].analyses
    assert (analysis.state, analysis.method) == ("done", "pneumonia")
    with here.ledger.read() as session:
        made_at = session.get_one(AnalysisJob, 1).content_at
    moment = datetime.fromtimestamp(made_at or 0, datetime.now(UTC).astimezone().tzinfo)
    progress = Progress(console=Console(file=io.StringIO()))
    (done,) = analyse_folder(ct, tmp_path / "out", here.settings, progress, content_at=moment)
    by_worker = {Path(made.path).name: (here.results / made.path).read_bytes() for made in analysis.objects}
    assert set(by_worker) == set(done.files) - {"overlay.png"}
    assert len(by_worker) == 5
    for name, content in by_worker.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    same = ("lungs", "lesions", "scan", "models", "notes", "page", "method")
    assert {key: done.summary[key] for key in same} == {key: (analysis.summary or {})[key] for key in same}


def test_the_command_line_takes_the_models_of_the_settings_and_falls_back_to_the_cpu(
    ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"data": tmp_path / "var", "models": {"pneumonia": {"lungs": "ours"}}})
    bundle = Path(shutil.copytree(BUNDLES / "lungs", settings.installed_models / "ours"))
    file = bundle / "configs" / "metadata.json"
    file.write_text(file.read_text().replace('"name": "lungs"', '"name": "ours"'))
    asked = []

    def networks(device: str | None, lungs: Path, infection: Path) -> Any:
        asked.append((device, lungs.name, infection.name))

        def segment(*_: Any) -> Any:
            raise VolumeError("read on the CPU") if device == "cpu" else CardMemoryError("cuda has too little memory")

        return segment

    monkeypatch.setattr(method, "segmenter", networks)
    page = Console(file=io.StringIO(), record=True, width=200)
    with pytest.raises(NothingToAnalyse, match="not analysed: read on the CPU"):
        analyse_folder(ct, tmp_path / "out", settings, Progress(console=page))
    assert asked == [(None, "ours", "infection"), ("cpu", "ours", "infection")]
    assert "goes on on the CPU: cuda has too little memory" in page.export_text()


@pytest.mark.parametrize("smallest", [20.0, 250.0])
def test_the_smallest_lesion_is_what_the_model_s_metadata_say(monkeypatch: pytest.MonkeyPatch, smallest: float) -> None:
    seen = []

    def analysed(*_: Any, minimum_lesion_mm3: float) -> Any:
        seen.append(minimum_lesion_mm3)
        raise VolumeError("seen")

    models = {role: load_bundle(role) for role in ("lungs", "infection")}
    metadata = models["infection"].metadata | {"minimum_lesion_mm3": smallest}
    models["infection"] = dataclasses.replace(models["infection"], metadata=metadata)
    monkeypatch.setattr(method, "segmenter", lambda *_: None)
    monkeypatch.setattr(pipeline, "analyse", analysed)
    with pytest.raises(VolumeError, match="seen"):
        method.METHOD.run([], models, "cpu", lambda *_: None)
    assert seen == [smallest]


def test_each_group_names_the_model_that_made_it(tmp_path: Path) -> None:
    """Also where the models are more than two, and in another order."""
    chest = make_chest(tmp_path / "ct", Shape())
    third = ModelIdentity("lesions", "3", "c3" * 32)
    outcome = outcome_of(chest.volume, chest.findings)
    first, *others = outcome.groups
    groups = (dataclasses.replace(first, model=third), *others)
    changed = dataclasses.replace(outcome, models=(third, *outcome.models), groups=groups)
    made = makers.build(chest.volume, changed, None, tmp_path, content_datetime=MOMENT)
    (report,) = (dcmread(one.path) for one in made if one.kind == "sr")
    told = [
        next(item.TextValue for item in group.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "111001")
        for group in walk(report)
        if group.get("ConceptNameCodeSequence") and group.ConceptNameCodeSequence[0].CodeValue == "125007"
    ]
    assert told[0] == "lesions"
    assert told[1:] == [group.model.name for group in others]


def walk(item: Dataset) -> Any:
    yield item
    for child in item.get("ContentSequence", []):
        yield from walk(child)


def test_two_methods_never_share_a_uid(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct", Shape())
    subject = dataclasses.replace(chest.outcome.subject, method="another")
    other = dataclasses.replace(chest.outcome, subject=subject)
    uids: list[str] = []
    for name, outcome in (("one", chest.outcome), ("two", other)):
        (tmp_path / name).mkdir()
        made = makers.build(chest.volume, outcome, None, tmp_path / name, content_datetime=MOMENT)
        made += makers.not_analysed(
            chest.headers, "gap", tmp_path / name, content_datetime=MOMENT, subject=outcome.subject
        )
        assert [one.problems for one in made] == [()] * 7
        uids += [one.sop_instance_uid for one in made]
    assert len(set(uids)) == 14


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_said_of_calibration_is_true_of_the_model(tmp_path: Path, calibrated: bool) -> None:
    chest = make_chest(tmp_path / "ct", Shape())
    outcome = outcome_of(chest.volume, dataclasses.replace(chest.findings, calibrated=calibrated))
    (noisy_or,) = (one for one in outcome.statements if one.name == "Noisy-OR")
    assert ("not calibrated" in noisy_or.verdict) is not calibrated
    assert ("lesions calibrated" in noisy_or.sentence) is calibrated
    assert "suffices" in noisy_or.limits or calibrated


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed for processes that this one starts."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPOSITORY), str(PACKAGE), os.environ.get("PYTHONPATH", ""))))


@pytest.mark.peer
@pytest.mark.timeout(300)
def test_a_second_method_reaches_orthanc(tmp_path: Path, orthanc: Orthanc, beside: None) -> None:
    peers = {
        "pacs": {"ae_title": orthanc.ae_title, "host": "127.0.0.1", "port": orthanc.port, "may": ["receive"]},
        "scanner": {"ae_title": "STORESCU", "host": "127.0.0.1", "port": 104, "may": ["send"]},
    }
    route = {"name": "emphysema", "analysis": "low-attenuation", "to": {"pacs": [KIND, "sr", "capture"]}}
    paths = write_series(phantom(3, severity=2, shape=(40, 96, 96), spacing=(5.0, 3.5, 3.5)), tmp_path / "ct", 3)
    with running_node(tmp_path / "node", {"peers": peers, "routes": [route]}) as node:
        arguments = ["--scan-directories", "-aec", node.ae_title, "-aet", "STORESCU", "127.0.0.1", str(node.port)]
        subprocess.run([tool("storescu"), *arguments, tmp_path / "ct"], check=True, capture_output=True)
        wait_for(lambda: list(node.states().values()) in (["delivered"], ["failed"]), 200, "the node to deliver")
        (told,) = node.status()
    assert told["state"] == "delivered", told
    (analysis,) = told["analyses"]
    assert (analysis["method"], [made["kind"] for made in analysis["objects"]]) == (
        "low-attenuation",
        [KIND, "sr", "capture"],
    )
    objects = {one.Modality: one for one in fetch(orthanc, str(dcmread(paths[0]).StudyInstanceUID))}
    assert set(objects) == {"SEG", "SR", "OT"}
    dark = {segment.SegmentLabel for segment in objects["SEG"].SegmentSequence}
    assert dark == {"Below -950 HU, right lung", "Below -950 HU, left lung"}
    report = objects["SR"].to_json()
    for text in ("Share of the lung below -950 HU", "99LOWATT", "of the lungs is below -950 HU"):
        assert text in report
    # Nothing of the pneumonia method is in them.
    assert "nfect" not in report + objects["SEG"].to_json() + objects["OT"].SeriesDescription
    assert analysis["summary"]["low_attenuation"]["both"] == pytest.approx(
        measured(objects["SEG"], analysis["summary"]), rel=0.01
    )


def measured(seg: Dataset, summary: dict[str, Any]) -> float:
    """Share of the lungs that the segments have, by the numbers of the page."""
    lungs_ml = float(summary["page"]["rows"][-1][1])
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    spacing = [float(mm) for mm in (*measures.PixelSpacing, measures.SpacingBetweenSlices)]
    return float(np.count_nonzero(seg.pixel_array) * np.prod(spacing) / 1000 / lungs_ml)


def fetch(orthanc: Orthanc, study: str) -> list[Dataset]:
    answer = httpx.get(
        f"{orthanc.http}/dicom-web/studies/{study}",
        headers={"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'},
        timeout=60,
    )
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    parts: Any = email.message_from_bytes(head + answer.content).get_payload()
    return [dcmread(BytesIO(part.get_payload(decode=True))) for part in parts]
