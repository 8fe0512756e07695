"""Events: that each kind has its words, that what is recorded fits them, and that any row can be shown."""

from __future__ import annotations

import ast
import string

import pytest
from conftest import REPOSITORY
from sqlalchemy import text

from node.ledger.events import STAGES, WORDS, EventKind, render
from node.ledger.ledger import Ledger
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob, Delivery, Event, Object
from node.text import SENTENCE_LENGTH


def fields(kind: EventKind) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(WORDS[kind]) if name}


def test_every_kind_has_words_and_what_the_code_records_fits_them() -> None:
    assert WORDS.keys() == set(EventKind)
    recorded = set()
    for file in (REPOSITORY / "node").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "EventKind"
                and "ledger/events" not in str(file)
            ):
                recorded.add(EventKind[node.attr])
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("record_event"):
                continue
            kind = ast.unparse(node.args[2])
            names = {keyword.arg for keyword in node.keywords}
            if kind.startswith("EventKind.") and None not in names:
                assert names == fields(EventKind[kind.removeprefix("EventKind.")]), f"{file.name}:{node.lineno}"
    assert recorded == set(EventKind) - {EventKind.TEXT}


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_kind_is_rendered(kind: EventKind) -> None:
    words = render(kind, {name: f"<{name}>" for name in fields(kind)})
    assert all(f"<{name}>" in words for name in fields(kind))
    assert render(kind, {**dict.fromkeys(fields(kind), "x"), "acquisition": "acquisition 2"}).startswith(
        "acquisition 2: "
    )


@pytest.mark.parametrize(
    ("kind", "data", "shown"),
    [
        ("text", {"text": "old {words} %s"}, "old {words} %s"),
        ("of_a_later_version", {"peer": "pacs", "count": 3}, "of_a_later_version peer=pacs count=3"),
        ("delivered", {"object": "sr"}, "delivered object=sr"),
        ("set_aside", {"reason": "{peer.__class__}"}, "set aside: {peer.__class__}"),
        ("analysis_started", {"attempt": 1}, "started"),
        ("analysis_started", {"attempt": 2}, "started, attempt 2"),
        ("set_aside", {"reason": "x" * 5000}, "set aside: " + "x" * (SENTENCE_LENGTH - 14) + "..."),
    ],
)
def test_any_row_is_shown(kind: str, data: dict[str, object], shown: str) -> None:
    assert render(kind, data) == shown


def test_an_event_of_a_delivery_is_recorded_with_its_acquisition_as_kind_and_data(ledger: Ledger) -> None:
    with ledger() as session:
        more = {"calling_ae": "", "instances": [], "closed_because": "", "verdict": ""}
        series = ledger.add_series(session, "1.2", "1.1", ["1"], True, **more)
        assert series is not None
        names = {"kind": "sr", "sop_class_uid": "1", "sop_instance_uid": "1", "series_instance_uid": "1", "path": "x"}
        made = Object(**names, deliveries=[Delivery(peer="pacs")])
        series.analyses.append(AnalysisJob(route="r", destinations={}, acquisition="acquisition 2", objects=[made]))
        session.flush()
        words = record_event(session, made.deliveries[0], EventKind.DELIVERED, object="sr", peer="pacs\x1b[2J")
        record_event(session, series.id, EventKind.RETRIED, count=2)
    with ledger.read() as session:
        first, second = session.query(Event).order_by(Event.id)
        assert (first.stage, first.kind) == ("delivery", "delivered")
        assert first.data == {"object": "sr", "peer": "pacs?[2J", "acquisition": "acquisition 2"}
        assert first.text == "acquisition 2: sr delivered to pacs?[2J"
        assert words == "sr delivered to pacs?[2J"
        assert (second.stage, second.data) == (STAGES[EventKind.RETRIED], {"count": 2})
        assert "\\u001b" not in session.execute(text("SELECT data FROM events")).scalars().first()
