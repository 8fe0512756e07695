"""What a new result is compared with: earlier studies of the same patient by the same models, as the ledger has it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from synthetic_chest import MODELS, Shape, make_chest

from node.analysis import priors
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob
from node.methods.outcome import Earlier, plain
from node.methods.pneumonia.outcome import outcome_of


class Archive:
    """Received series with their analyses: files in a spool, rows in a ledger."""

    def __init__(self, ledger: Ledger, spool: Path) -> None:
        self.ledger, self.spool = ledger, spool
        self._count = 0

    def add(
        self,
        day: str,
        lesion: Any = ((-75.0, 45.0, 0.0), 30.0),
        study: str = "",
        state: str = "done",
        models: Any = MODELS,
        method: str = "pneumonia",
        **attributes: Any,
    ) -> int:
        """One series of one slice in the spool; gives the id of its analysis' row."""
        self._count += 1
        study, name = study or f"1.2.3.{self._count}", f"1.2.4.{self._count}"
        told = {"StudyDate": day, "StudyInstanceUID": study, **attributes}
        chest = make_chest(
            self.spool / name, Shape(slices=1, rows=24, columns=24, extent=(10, 300, 360), attributes=told), [lesion]
        )
        findings = replace(chest.findings, models=models)
        with self.ledger() as session:
            row = self.ledger.add_series(
                session,
                name,
                study,
                [name],
                calling_ae="CT",
                instances=[f"{name}/0000.dcm"],
                complete=True,
                closed_because="",
                verdict="",
            )
            assert row is not None
            told_in = json.loads(json.dumps(plain(outcome_of(chest.volume, findings))))
            analysis = AnalysisJob(route="r", method=method, destinations={}, state=state, summary=told_in)
            row.analyses.append(analysis)
            session.flush()
            return int(analysis.id)

    def split(self, analysis: int, **shares: float) -> list[int]:
        """Let the series of an analysis have acquisitions, with these parts of its lungs; gives their rows' ids."""
        made = []
        with self.ledger() as session:
            whole = session.get_one(AnalysisJob, analysis)
            session.expunge(whole)
            session.delete(session.get_one(AnalysisJob, analysis))
            for acquisition, share in shares.items():
                told = json.loads(json.dumps(whole.summary))
                told["lungs"]["both"] = {name: value * share for name, value in told["lungs"]["both"].items()}
                of = {"series_id": whole.series_id, "route": "r", "destinations": {}, "acquisition": acquisition}
                made.append(AnalysisJob(**of, state="done", summary=told))
            session.add_all(made)
            session.flush()
            return [int(one.id) for one in made]

    def before(self, analysis: int, models: Any = MODELS) -> list[Earlier]:
        return priors.results_of(self.ledger, self.spool, analysis, models)


def ml(earlier: Earlier) -> float:
    return float(earlier.point.long.split()[-2])


def share(earlier: Earlier) -> float:
    return float(earlier.point.short.split()[0])


@pytest.fixture
def archive(ledger: Ledger, tmp_path: Path) -> Archive:
    return Archive(ledger, tmp_path / "spool")


def test_earlier_studies_are_told_from_the_first(archive: Archive) -> None:
    archive.add("20260301", ((-75.0, 45.0, 0.0), 20.0))
    archive.add("20260101", ((-75.0, 45.0, 0.0), 40.0))
    first, second = archive.before(archive.add("20260310"))
    assert (first.day, second.day) == (date(2026, 1, 1), date(2026, 3, 1))
    assert ml(first) > ml(second) > 0
    assert share(first) > share(second) > 0


@pytest.mark.parametrize(
    "other",
    [
        {"PatientID": "LUNG-2"},
        {"PatientBirthDate": "19600102"},
        {"IssuerOfPatientID": "another hospital"},
        {"day": "20260310"},
        {"day": "20260311"},
        {"day": ""},
        {"state": "failed"},
        {"method": "another"},
        {"models": (MODELS[0], replace(MODELS[1], version="9.9.9"))},
        {"study": "1.2.3.99"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_cannot_be_compared_is_left_out(archive: Archive, other: dict[str, Any]) -> None:
    archive.add(**{"day": "20260301", **other})
    assert archive.before(archive.add("20260310", study="1.2.3.99")) == []


def test_a_patient_without_an_id_is_compared_with_nobody(archive: Archive) -> None:
    archive.add("20260301", PatientID="")
    assert archive.before(archive.add("20260310", PatientID="")) == []


def test_the_latest_analysis_of_a_study_counts(archive: Archive) -> None:
    archive.add("20260301", ((-75.0, 45.0, 0.0), 20.0), study="1.2.3.50")
    archive.add("20260301", ((-75.0, 45.0, 0.0), 40.0), study="1.2.3.50")
    (only,) = archive.before(now := archive.add("20260310"))
    archive.add("20260302", ((-75.0, 45.0, 0.0), 40.0))
    assert only.point == archive.before(now)[1].point


def test_of_several_acquisitions_the_same_counts_else_the_one_with_the_largest_lungs(archive: Archive) -> None:
    before, now = archive.add("20260301"), archive.add("20260310")
    (whole,) = archive.before(now)
    archive.split(before, a=0.5, b=1.0, c=0.25)
    assert archive.before(now) == [whole]
    # Those of one series are not compared with each other, whichever is analysed last.
    first, second = archive.split(now, c=0.5, d=1.0)
    assert [ml(one) for one in archive.before(first)] == [pytest.approx(ml(whole) * 0.25, abs=0.06)]
    assert archive.before(second) == [whole]


def test_files_that_were_dropped_or_damaged_are_passed_over(archive: Archive) -> None:
    kept, dropped, damaged = (archive.add(f"2026030{n}") for n in (1, 2, 3))
    (archive.spool / f"1.2.4.{dropped}" / "0000.dcm").unlink()
    (archive.spool / f"1.2.4.{damaged}" / "0000.dcm").write_bytes(b"no DICOM")
    found = archive.before(archive.add("20260310"))
    assert kept
    assert [one.day for one in found] == [date(2026, 3, 1)]
