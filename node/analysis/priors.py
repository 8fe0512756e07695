"""Earlier results of a patient, from the ledger: what a new result is compared with.

Who the patient is stands in the received files only, so those of the latest analyses are asked.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import date, datetime
from pathlib import Path

from pydicom.dataset import Dataset
from sqlalchemy import select

from models.registry import ModelIdentity
from node.images.received import read_received
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Series
from node.ledger.transitions import State
from node.methods import registry
from node.methods.outcome import Earlier
from node.paths import within

#: Latest analyses that are looked at: reading so many headers takes about half a second, and in a hospital it is some
#: weeks of chest CT.
LOOKED_AT = 500

_WHO = ("PatientID", "IssuerOfPatientID", "PatientBirthDate", "StudyDate", "StudyInstanceUID")


def results_of(ledger: Ledger, spool: Path, analysis: int, models: tuple[ModelIdentity, ...]) -> list[Earlier]:
    """Results of earlier studies of the patient of an analysis, by the same method and models; one per study.

    Of several acquisitions in the series that was analysed last, the one that is called as this one counts, else the
    largest by the method (`Point.size`): an inspiration, rather than an expiration.
    """
    first_of = Series.instances[0].as_string()
    with ledger.read() as session:
        mine = session.get_one(AnalysisJob, analysis)
        first = session.scalars(select(first_of).where(Series.id == mine.series_id)).one()
        done = select(first_of, AnalysisJob).join(AnalysisJob.series).where(AnalysisJob.state == State.DONE)
        others = done.where(Series.id != mine.series_id, AnalysisJob.method == mine.method)
        latest_first = others.order_by(AnalysisJob.id.desc())
        candidates = [(name, one) for name, one in session.execute(latest_first.limit(LOOKED_AT)) if one.summary]
    if (here := _header(spool, first)) is None or (today := _day(here)) is None or not here.get("PatientID"):
        return []
    method = registry.find(mine.method)
    by_study: dict[str, list[tuple[int, tuple[bool, float], Earlier]]] = {}
    for name, one in candidates:
        summary = one.summary
        made_by = [(model["name"], model["version"]) for model in summary["models"]]
        if made_by != [(model.name, model.version) for model in models]:
            continue
        header = _header(spool, name)
        if header is None or _who(header) != _who(here) or header.StudyInstanceUID == here.StudyInstanceUID:
            continue
        point = method.point(summary)
        if point is not None and (day := _day(header)) is not None and day < today:
            fits = one.acquisition == mine.acquisition, point.size
            result = Earlier(day, point)
            by_study.setdefault(str(header.StudyInstanceUID), []).append((one.series_id, fits, result))
    # The latest analysis of a study comes first: with it, those of the same series count.
    latest = [[one for one in told if one[0] == told[0][0]] for told in by_study.values()]
    found = [max(told, key=lambda one: one[1])[2] for told in latest]
    return sorted(found, key=lambda one: one.day)


def _header(spool: Path, name: str) -> Dataset | None:
    """What a received file says of its patient; None where it is gone or cannot be read."""
    with suppress(Exception):
        return read_received(within(spool, name), _WHO)
    return None


def _who(header: Dataset) -> tuple[str, ...]:
    return tuple(str(header.get(keyword) or "").strip() for keyword in _WHO[:3])


def _day(header: Dataset) -> date | None:
    try:
        return datetime.strptime(str(header.get("StudyDate") or ""), "%Y%m%d").date()
    except ValueError:
        return None
