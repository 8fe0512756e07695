"""The writers of the ledger: a row's next state, and an event of a series.

Both work in the caller's transaction, with the clock of its ledger.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import CursorResult, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from node.ledger.events import STAGES, EventKind, render
from node.ledger.tables import AnalysisJob, Delivery, Event, Work
from node.ledger.transitions import ENDED, TAKEN, State, require


def now(session: Session) -> float:
    """The time by the clock of the session's ledger."""
    return float(session.info["clock"]())


def move(session: Session, row: Work, to: State, *, reason: str | None = None) -> None:
    """Bring a row to a state, and say why.

    A lease ends unless the next state is under one too. A row that waits may be notified of again; one that ended gets
    the time when it did.

    Raises
    ------
    TransitionError
        The table has no such transition.
    """
    require(row.kind_of_work, row.state, to)
    row.state = to
    for name, value in _with(session, to).items():
        setattr(row, name, value)
    if reason is not None:
        row.reason = reason


def move_all(
    session: Session, table: type[Work], of: Collection[State], to: State, *where: ColumnElement[bool], **values: Any
) -> int:
    """Bring all rows in one of some states to another by one UPDATE, with further column values; gives their number.

    Raises
    ------
    TransitionError
        The table has no such transition from one of them.
    """
    for state in of:
        require(table.kind_of_work, state, to)
    change = update(table).where(table.state.in_(of), *where)
    return rows(session.execute(change.values(state=to, **_with(session, to) | values)))


def rows(result: Any) -> int:
    """Rows that an UPDATE changed."""
    assert isinstance(result, CursorResult)
    return int(result.rowcount)


def record_event(session: Session, of: int | Work, kind: EventKind, **data: str | int | float) -> str:
    """Record what happened to a series, by its row number, or to one of its rows of work; gives the words.

    The names of `data` are those of `events.WORDS`; no value holds patient data.
    """
    words = render(kind, data)
    series_id, stage = of, ""
    if isinstance(of, Work):
        analysis = of.object.analysis if isinstance(of, Delivery) else of
        assert isinstance(analysis, AnalysisJob)
        series_id, stage = analysis.series_id, of.kind_of_work.value
        if analysis.acquisition:
            data["acquisition"] = analysis.acquisition
    stage = STAGES.get(kind, stage)
    session.add(Event(series_id=series_id, at=now(session), stage=stage, kind=kind.value, data=data))
    return words


def _with(session: Session, to: State) -> dict[str, Any]:
    """Values that go with a state."""
    values: dict[str, Any] = {"finished_at": now(session) if to in ENDED else None}
    if to not in TAKEN.values():
        values |= {"lease_owner": None, "lease_until": 0.0}
    if to in TAKEN:
        values |= {"last_notified_at": 0.0}
    return values
