"""What the ledger knows, for a terminal: all series as a table, one series as a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from node.ledger.transitions import PUT_BACK, TAKEN, State
from node.ledger.views import AnalysisView, DeliveryView, SeriesView, UnreachablePeer
from node.terminal import cell

#: Colours of the states of a series; each is also said by its word.
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


def table(series: Iterable[SeriesView]) -> Table:
    """Series, one per row."""
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
        there = sum(delivery.state in (State.DONE, State.CONFIRMED, State.STORED) for delivery in one.deliveries)
        made.add_row(
            str(one.id),
            _time(one.closed_at, "%d %b %H:%M"),
            cell(one.calling_ae),
            str(len(one.instances)),
            Text(one.state, style=STYLE[one.state]),
            f"{there}/{len(one.deliveries)}" if one.deliveries else "",
            cell(one.headline),
        )
    return made


def timeline(series: SeriesView) -> Table:
    """Everything that happened to one series, and what is still due."""
    made = Table(
        box=None,
        show_header=False,
        pad_edge=False,
        title_justify="left",
        title=cell(f"series {series.series_instance_uid}: {series.state}", "table.title"),
    )
    made.add_column(justify="right", style="dim")
    made.add_column(style="bold")
    made.add_column(overflow="fold", ratio=1)
    start = series.events[0].at if series.events else series.closed_at
    for event in series.events:
        made.add_row(f"{_time(event.at, '%H:%M:%S')}  +{event.at - start:.1f} s", cell(event.stage), cell(event.text))
    for analysis in series.analyses:
        if analysis.state in TAKEN or analysis.state in PUT_BACK:
            made.add_row("now", "analysis", cell(analysis.about(_due(analysis))))
    for delivery in series.deliveries:
        if delivery.state in (State.WAITING, State.RUNNING, State.STORED, State.FAILED, State.UNCONFIRMED):
            text = f"{delivery.kind} to {delivery.peer}: {_due(delivery)}"
            made.add_row("now", "delivery", cell(delivery.about(text)))
    for line in series.to_do:
        made.add_row("", "to do", cell(line))
    return made


def unreachable(peer: UnreachablePeer) -> str:
    """Since when a peer does not answer, why, what waits for it, and when it is tried again."""
    return (
        f"{peer.name} is silent since {_time(peer.since, '%d %b %H:%M')}: {peer.reason}; "
        f"{peer.waiting} objects wait, next try {_time(peer.next_try_at, '%H:%M:%S')}"
    )


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


def _due(work: AnalysisView | DeliveryView) -> str:
    """Where work stands that has not come to a good end."""
    if isinstance(work, DeliveryView) and work.state is State.STORED:
        return f"{work.reason}; confirmation asked for {work.asks} times, next at {_time(work.due_at, '%H:%M:%S')}"
    if work.state in TAKEN:
        if work.attempts:
            return f"attempt {work.attempts} failed, next at {_time(work.due_at, '%H:%M:%S')}: {work.reason}"
        return work.reason or "waiting for a worker"
    if work.state in PUT_BACK:
        lost = "; its process is silent, another takes it up within a minute" if work.worker_lost else ""
        return f"under way, attempt {work.attempts}{lost}"
    return work.reason


def _time(at: float, form: str) -> str:
    return datetime.fromtimestamp(at).strftime(form)
