"""The terminal: where commands print, with nothing in what they print that a terminal would act on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from node.text import SENTENCE_LENGTH, printable


class Terminal(Console):
    """A console that prints texts as they are: no markup, and '?' in the place of what a terminal would act on.

    Line breaks are kept, as it cannot tell ours from others'; who prints a text of the ledger puts it in a `cell`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, and let no text but rich's own control codes through as it is."""
        for text, style, control in super().render(renderable, options):
            plain = control or text.isprintable()
            yield Segment(text, style, control) if plain else Segment(_lines(text), style, control)


def cell(text: str, style: str = "") -> Text:
    """A text of the ledger or of a peer, as one line of a table."""
    return Text(printable(text, SENTENCE_LENGTH), style)


def progress(console: Console, text: str, *more: ProgressColumn) -> Progress:
    """A progress bar that is gone when it has ended."""
    columns = (SpinnerColumn(), TextColumn(text, markup=False), BarColumn(), *more, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def fail(message: str) -> NoReturn:
    """Say on standard error what is wrong, and end with status 1."""
    err.print(message, style="red", soft_wrap=True)
    raise typer.Exit(1)


def _lines(text: str) -> str:
    return "\n".join(printable(line, len(line) or 1) for line in text.split("\n"))


out = Terminal()
err = Terminal(stderr=True)
