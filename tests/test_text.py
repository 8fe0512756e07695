"""Text from outside, wherever it is shown: harmless to a terminal, on one line, of bounded length."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from node import text
from node.cli import render
from node.ledger import views
from node.ledger.events import EventKind
from node.ledger.ledger import Ledger
from node.ledger.record import record_event
from node.methods.outcome import NEUTRAL
from node.results.capture.pages import not_analysed_page
from node.results.capture.typesetting import write
from node.terminal import Terminal, cell
from node.text import CUT, LOG_LENGTH, SENTENCE_LENGTH, printable, tidy

#: What a terminal, a log viewer or rich would act on.
HOSTILE = (
    "\x1b]0;title\x07\x1b[2K\x1b[1A\x1b[32mgreen\x9b31m\x7f\r\n\v\f\x85\u2028\u2029\u202e\u2066\u200b\ufeff\ud800\U000e0041"
    "[bold red]markup[/][link=http://evil]\x1b]8;;http://evil\x07"
)
BAD = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def harmful(shown: str, *, lines: bool = False) -> list[str]:
    """Characters that must not be shown."""
    return [one for one in shown if unicodedata.category(one) in BAD and not (lines and one == "\n")]


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf"]), max_size=300), st.integers(3, 80))
def test_any_text_is_one_printable_line_of_at_most_its_length(raw: str, length: int) -> None:
    shown = printable(raw, length)
    assert len(shown) == min(len(raw), length)
    assert not harmful(shown)
    assert shown == raw if raw.isprintable() and len(raw) <= length else True
    assert shown.endswith(CUT) if len(raw) > length else True
    assert printable(shown, length) == shown


def test_values_of_any_kind_are_tidied() -> None:
    shown = tidy({"a\n": [HOSTILE, 3, None, ("b\x1b",)], "path": Path("x\ny")}, 40)
    assert json.loads(json.dumps(shown))["a?"][1:] == [3, None, ["b?"]]
    assert not harmful(json.dumps(shown, ensure_ascii=False))


def test_a_uid_is_quoted_and_nothing_else() -> None:
    assert [text.uid(one) for one in ("1.2.3", "", "1.2.Doe", "1" * 65, "1.2\n")] == [
        "1.2.3",
        "",
        *["an invalid UID"] * 3,
    ]


@pytest.mark.parametrize("form", ["1" * 10**6, "word " * 200_000, "." * 10**6, "a" * 700 + " b" * 500_000])
def test_a_text_of_a_megabyte_is_set_as_fast_as_a_page(form: str) -> None:
    not_analysed_page("so that the typeface is loaded", NEUTRAL)
    start = time.process_time()
    page = not_analysed_page(form, NEUTRAL)
    assert time.process_time() - start < 2
    # What does not fit is cut with an ellipsis: another text that begins with the same looks the same.
    assert page.tobytes() == not_analysed_page(form[: 10**5], NEUTRAL).tobytes()


@pytest.mark.parametrize("count", [1, 40, 80, 200, 10**6])
def test_a_line_is_cut_where_it_was(count: int) -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (400, 40)))
    assert 0 < write(draw, (0, 0), "i" * count, 17, width=300) <= 300


def test_rows_of_an_older_ledger_are_harmless_wherever_they_are_read(ledger: Ledger) -> None:
    values: dict[str, Any] = {"instances": [], "complete": False, "closed_because": "x", "verdict": "v"}
    with ledger() as session:
        series = ledger.add_series(session, "1.2", "1.1", ["1.2.1"], calling_ae="A", **values)
        assert series is not None
        record_event(session, series.id, EventKind.TRIAGED, decision="to be replaced")
    bad = (HOSTILE + "A" * 5_000_000).encode("utf-8", "surrogatepass").decode("utf-8", "ignore")
    with ledger() as session:  # as a version did that bounded nothing
        connection = session.connection()
        connection.exec_driver_sql("UPDATE events SET data=?, stage=?", (json.dumps({"decision": bad}), bad))
        connection.exec_driver_sql("UPDATE series SET verdict=?, calling_ae=?", (bad, bad))
    (one,) = views.all_series(ledger)
    assert {len(one.verdict), len(one.events[0].text)} == {SENTENCE_LENGTH}
    file = io.StringIO()
    console = Terminal(file=file, width=100, force_terminal=True, color_system=None)
    console.print(render.table([one]), render.timeline(one))
    shown = file.getvalue()
    assert not harmful(shown, lines=True)
    assert "[bold" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert not harmful(json.dumps(views.as_json(one), ensure_ascii=False))


def test_what_is_written_to_the_ledger_is_bounded(ledger: Ledger) -> None:
    with ledger() as session:
        values: dict[str, Any] = {"calling_ae": HOSTILE, "instances": [], "complete": True, "closed_because": HOSTILE}
        ledger.add_series(session, "1.2", "1.1", ["1.2.1"], verdict=HOSTILE * 10_000, **values)
    with ledger() as session:
        row = session.connection().exec_driver_sql("SELECT calling_ae, closed_because, verdict FROM series").one()
    assert not harmful("".join(row))
    assert len(row[2]) == SENTENCE_LENGTH


def test_a_console_prints_no_control_character_and_no_markup() -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=200, force_terminal=True, color_system="truecolor")
    for one in (HOSTILE, cell(HOSTILE)):
        console.print(one)
    shown = file.getvalue()
    assert "\x1b" not in shown
    assert "[bold red]markup[/][link=http://evil]" in shown
    assert len(shown.splitlines()) == 3  # one line break of the first is kept, none of the cell


#: Logs and fails in every way with a value that must not be quoted.
PROGRAM = """
import logging, sys, threading, warnings
import structlog
from node.telemetry import logs
from pydicom import Dataset, config
from pydicom.valuerep import DA

logs.configure("DEBUG")
VALUE = "DOE^JOHN \\x1b[2K\\n" + "A" * 100_000
structlog.get_logger("node.x").warning("a\\nb", ours="\\x1b[31m" + "B" * 100_000, many=["\\u202e"] * 1000)
logging.getLogger("celery.worker").warning("c\\nd %s", "\\x1b[31m")
for name in ("pydicom", "pynetdicom.acse", "highdicom.sr", "PIL.Image", "py.warnings"):
    logging.getLogger(name).critical("it has %s", VALUE)
warnings.warn(VALUE)
Dataset().PatientBirthDate = VALUE
threading.Thread(target=lambda: DA(VALUE).nothing).start()
class Bad:
    def __del__(self):
        raise ValueError(VALUE)
Bad()
try:
    raise ValueError(VALUE)
except ValueError:
    logging.getLogger("celery").exception("failed")
from node.tasks import app
app.log.setup(loglevel="DEBUG")
warnings.warn(VALUE + "again")
raise ValueError(VALUE)
"""


def test_no_log_line_quotes_a_value_or_breaks() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    lines = done.stderr.split("\n")[:-1]
    assert done.returncode == 1
    assert not done.stdout
    for line in lines:
        json.loads(line)  # nothing else is on standard error
    assert not harmful("".join(lines))
    assert max(map(len, lines)) < 2 * LOG_LENGTH
    assert "DOE" not in done.stderr
    assert "AAA" not in done.stderr
    events = [json.loads(line)["event"] for line in lines]
    assert events[0] == "a?b"
    assert "c?d ?[31m" in events
    assert events.count("an exception that nobody caught") == 3
    assert {"pydicom logged", "pynetdicom logged", "highdicom logged", "PIL logged"} <= set(events)
    assert "a library warned" in events
    assert "ValueError at <string>:" in done.stderr
