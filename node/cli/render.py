"""What the ledger knows, for people: all series as a table, one series as a timeline."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select
from sqlalchemy.orm import selectinload

from node.ledger.store import SET_ASIDE, Analysis, Delivery, Ledger, Line, Object, Series
from node.terminal import cell

_WHOLE = select(Series).options(
    selectinload(Series.events),
    selectinload(Series.analyses)
    .selectinload(Analysis.objects)
    .selectinload(Object.deliveries)
    .joinedload(Delivery.object)
    .joinedload(Object.analysis),
)

#: Colours of states; each state is also told by its word.
STYLE = {
    "delivered": "green",
    "confirmed": "green",
    "stored": "green",
    "kept": "dim",
    "superseded": "dim",
    "waiting": "yellow",
    "running": "cyan",
    "delivering": "cyan",
    "not analysed": "yellow",
    "failed": "bold red",
    "refused": "bold red",
}


def all_series(ledger: Ledger, limit: int = 200) -> list[Series]:
    """The newest generations of series, newest first, with their events, analyses, objects and deliveries."""
    with ledger.read() as session:
        return list(session.scalars(_WHOLE.order_by(Series.id.desc()).limit(limit)))


def find(ledger: Ledger, name: str) -> Series | None:
    """The newest series whose row number or series instance UID is `name`."""
    named = Series.id == int(name) if name.isdigit() else Series.series_instance_uid == name
    with ledger.read() as session:
        return session.scalars(_WHOLE.where(named).order_by(Series.id.desc()).limit(1)).first()


def state(series: Series) -> str:
    """One word or two for where a series stands."""
    if not series.analyses:
        return "failed" if series.verdict.startswith(SET_ASIDE) else "kept"
    states = {analysis.state for analysis in series.analyses}
    owed = deliveries(series)
    sent = {"stored" if _stored(delivery) else delivery.state for delivery in owed}
    made = [made for analysis in series.analyses for made in analysis.objects]
    outdated = bool(made) and all(one.superseded_by is not None for one in made)
    if "failed" in states and not outdated:
        return "failed"
    for word in ("running", "waiting"):
        if word in states:
            return word
    if sent & {"waiting", "running"}:
        return "delivering"
    if outdated:
        return "superseded"
    for word in ("failed", "refused", "stored"):
        if word in sent:
            return word
    if states == {"superseded"} or sent == {"superseded"}:
        return "superseded"
    if states <= {"refused", "superseded"}:
        return "not analysed"
    return "confirmed" if owed and sent <= {"confirmed", "superseded"} else "delivered"


def silent_peers(ledger: Ledger) -> list[str]:
    """A line for each peer that does not answer: since when, why, what waits for it, and when it is tried again."""
    waits = (Delivery.peer == Line.peer, Delivery.state == "waiting", Delivery.stored_at.is_(None))
    count = select(func.count(Delivery.id)).where(*waits).scalar_subquery()
    query = select(Line, count).where(Line.silent_since.is_not(None)).order_by(Line.peer)
    with ledger.read() as session:
        return [
            f"{line.peer} is silent since {_time(line.silent_since or 0.0, '%d %b %H:%M')}: {line.reason}; "
            f"{waiting} objects wait, next try {_time(line.due_at, '%H:%M:%S')}"
            for line, waiting in session.execute(query)
        ]


def table(series: list[Series]) -> Table:
    """All series, one a row."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name, options in (
        ("#", {"justify": "right"}),
        ("received", {}),
        ("from", {}),
        ("slices", {"justify": "right"}),
        ("state", {}),
        ("objects", {"justify": "right"}),
        ("what", {"overflow": "fold", "ratio": 1}),
    ):
        made.add_column(name, **options)
    for one in series:
        word, owed = state(one), deliveries(one)
        done = sum(delivery.state in ("done", "confirmed") or _stored(delivery) for delivery in owed)
        made.add_row(
            str(one.id),
            _time(one.closed_at, "%d %b %H:%M"),
            cell(one.calling_ae),
            str(len(one.instances)),
            Text(word, style=STYLE[word]),
            f"{done}/{len(owed)}" if owed else "",
            cell(_what(one)),
        )
    return made


def timeline(series: Series) -> Table:
    """Everything that happened to one series, and what is still owed."""
    made = Table(
        box=None,
        show_header=False,
        pad_edge=False,
        title_justify="left",
        title=cell(f"series {series.series_instance_uid}: {state(series)}", "table.title"),
    )
    made.add_column(justify="right", style="dim")
    made.add_column(style="bold")
    made.add_column(overflow="fold", ratio=1)
    events = series.events
    start = events[0].at if events else series.closed_at
    for event in events:
        made.add_row(f"{_time(event.at, '%H:%M:%S')}  +{event.at - start:.1f} s", cell(event.stage), cell(event.text))
    for analysis in series.analyses:
        if analysis.state in ("waiting", "running"):
            made.add_row("now", "analysis", cell(analysis.about(_owed(analysis))))
    for delivery in deliveries(series):
        if delivery.state in ("waiting", "running", "failed"):
            text = f"{delivery.object.kind} to {delivery.peer}: {_owed(delivery)}"
            made.add_row("now", "delivery", cell(delivery.object.analysis.about(text)))
    for line in to_do(series):
        made.add_row("", "to do", cell(line))
    return made


def to_do(series: Series) -> list[str]:
    """What an admin can do about a series that is in trouble; nothing for one that is not."""
    sent, lines = deliveries(series), list[str]()
    if state(series) == "superseded":
        return lines
    for peer in sorted({one.peer for one in sent if one.state == "waiting" and one.reason and not _stored(one)}):
        lines.append(
            f"nothing is lost, and what waits goes out by itself once {peer} takes it; "
            f"`lungnode echo {peer}` asks it now, `lungnode retry {series.id}` sends now"
        )
    for peer in sorted({one.peer for one in sent if _stored(one) and one.asks > 1}):
        lines.append(
            f"{peer} has it and is yet to confirm that it keeps it: is storage commitment enabled there, and can it "
            "reach our AE title and port?"
        )
    ended = [one for one in sent if one.state in ("refused", "failed")]
    for peer in sorted({one.peer for one in ended}):
        if kinds := ", ".join(one.object.kind for one in ended if one.peer == peer and one.stored_at is None):
            lines.append(
                f"{peer} does not have {kinds}: mend what the reason says there, then `lungnode retry {series.id}`; "
                f"or leave out what it cannot store (peers.{peer}.takes in the settings)"
            )
        if kinds := ", ".join(one.object.kind for one in ended if one.peer == peer and one.stored_at is not None):
            lines.append(
                f"{peer} took {kinds} and did not confirm to keep it: mend what the reason says, start lungnode again "
                f"after a change of its settings, then `lungnode retry {series.id}` sends it and asks again"
            )
    for analysis in series.analyses:
        if analysis.state == "failed":
            lines.append(f"mend what the reason says, then `lungnode retry {series.id}` analyses it again")
        elif analysis.state == "waiting" and analysis.attempts:
            lines.append(f"it is tried again by itself; `lungnode retry {series.id}` tries now")
    if any(event.stage == "conflict" for event in series.events):
        lines.append(
            f"another peer sent other content under the UIDs of this series, and only what {series.calling_ae} sent is "
            "used: see which of them is right; to take the other's, stop lungnode, remove "
            f"spool/{series.study_instance_uid}/{series.series_instance_uid} and send the series from there"
        )
    if not series.complete and not series.verdict.startswith(SET_ASIDE):
        lines.append("send the series again: what is missing makes it whole, what is here is not stored twice")
    return lines


def findings(summary: dict[str, Any]) -> Table:
    """What one analysis found (`node.methods.outcome.plain`), for a terminal."""
    page = summary["page"]
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", *page["columns"]):
        made.add_column(name, justify="left" if not name else "right")
    for row in page["rows"]:
        made.add_row(*map(Text, row))
    lines = [
        *((name, f"{inputs} → {verdict}") for name, inputs, _, verdict in page["statements"]),
        ("models", ", ".join(f"{model['name']} {model['version']}" for model in summary["models"])),
        *(("note", note) for note in summary["notes"]),
    ]
    rules = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for name, text in lines:
        rules.add_row(cell(name), cell(text))
    whole = Table.grid()
    for part in (
        Text(page["headline"]),
        Text(),
        made,
        Text(),
        rules,
        Text("research use; not for primary diagnosis", style="dim"),
    ):
        whole.add_row(part)
    return whole


def as_json(series: list[Series]) -> list[dict[str, Any]]:
    """All series, with their events, as plain data."""
    return [
        {
            "id": one.id,
            "series_instance_uid": one.series_instance_uid,
            "study_instance_uid": one.study_instance_uid,
            "generation": one.generation,
            "calling_ae": one.calling_ae,
            "instances": len(one.instances),
            "complete": one.complete,
            "closed_because": one.closed_because,
            "verdict": one.verdict,
            "closed_at": one.closed_at,
            "state": state(one),
            "events": [{"at": event.at, "stage": event.stage, "text": event.text} for event in one.events],
            "analyses": [
                {
                    "route": analysis.route,
                    "method": analysis.method,
                    "acquisition": analysis.acquisition,
                    "state": analysis.state,
                    "attempts": analysis.attempts,
                    "reason": analysis.reason,
                    "summary": analysis.summary,
                    "objects": [
                        {
                            "kind": made.kind,
                            "sop_instance_uid": made.sop_instance_uid,
                            "deliveries": {d.peer: {"state": d.state, "reason": d.reason} for d in made.deliveries},
                        }
                        for made in analysis.objects
                    ],
                }
                for analysis in one.analyses
            ],
        }
        for one in series
    ]


def deliveries(series: Series) -> list[Delivery]:
    """All that is or was owed to peers for a series."""
    return [d for analysis in series.analyses for made in analysis.objects for d in made.deliveries]


def _what(series: Series) -> str:
    """The most telling line: what is not delivered, else what came of the analyses, else what was decided."""
    for one in deliveries(series):
        waits = one.state == "waiting" and one.reason and not _stored(one)
        if waits or one.state in ("failed", "refused"):
            return one.object.analysis.about(one.reason)
    told = [analysis.about(analysis.reason) for analysis in series.analyses if analysis.reason]
    return "; ".join(told) or series.verdict


def _stored(delivery: Delivery) -> bool:
    """Whether the peer has the object and is yet to commit to it."""
    return delivery.state in ("waiting", "running") and delivery.stored_at is not None


def _owed(work: Analysis | Delivery) -> str:
    if isinstance(work, Delivery) and _stored(work):
        return f"{work.reason}; confirmation asked for {work.asks} times, next at {_time(work.due_at, '%H:%M:%S')}"
    if work.state == "waiting" and work.reason and not work.attempts:
        return work.reason
    if work.state == "waiting" and work.attempts:
        return f"attempt {work.attempts} failed, next at {_time(work.due_at, '%H:%M:%S')}: {work.reason}"
    if work.state == "running":
        gone = "; its process is silent, another takes it up within a minute" if work.lease_until < time.time() else ""
        return f"under way, attempt {work.attempts}{gone}"
    return "waiting for a worker" if work.state == "waiting" else work.reason


def _time(at: float, form: str) -> str:
    return datetime.fromtimestamp(at).strftime(form)
