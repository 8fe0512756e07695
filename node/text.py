"""Text that came from outside, made harmless: for a terminal, a log line, a table row or a page.

`printable` is applied where such text enters (with the length that its VR allows) and again where text leaves (log,
terminal, ledger), so that what an older version stored does no harm either.
"""

from __future__ import annotations

import re
from typing import Any

#: Most characters of a value by its VR (PS3.5 table 6.2-1).
LENGTH = {"AE": 16, "CS": 16, "LO": 64, "SH": 16, "UI": 64}

#: Most characters of one text in a log line, and of one sentence in the ledger or on a page.
LOG_LENGTH = 500
SENTENCE_LENGTH = 2000

#: Elements of one list that are shown.
_MOST_ITEMS = 50

#: Stands at the end of a text that was cut. ASCII, as it must fit every character set.
CUT = "..."

#: Digits in components, at most 64 characters (PS3.5 9.1). Leading zeros, which 9.1 forbids, are let through: scanners
#: write them, and they do no harm in a path.
UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(?:\.[0-9]+)*\Z", re.ASCII)


def printable(text: str, length: int) -> str:
    """`text` as one line of at most `length` characters that a terminal shows as they are.

    Control characters (C0 with line breaks and escape sequences, DEL, C1), bidirectional overrides and isolates,
    zero-width characters, line and paragraph separators, surrogates and unassigned characters become '?'. What is too
    long is cut and ends in '...'. Time and memory grow with `length`, not with the text.
    """
    if len(text) > length:
        text = text[: length - len(CUT)] + CUT
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def ae_title(text: str) -> str:
    """An AE title as a peer gave it, without the spaces or NULs around it (PS3.5 table 6.2-1: 16 characters)."""
    return printable(text.strip(" \0"), LENGTH["AE"])


def uid(value: object) -> str:
    """A UID for a message; 'an invalid UID' for a text that is none, which is never quoted."""
    text = str(value)
    return text if not text or UID.match(text) else "an invalid UID"


def tidy(value: Any, length: int) -> Any:
    """`value` with every text in it `printable`, and numbers, None and times as they are; anything else as its text."""
    if isinstance(value, str):
        return printable(value, length)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {printable(str(key), length): tidy(one, length) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [tidy(one, length) for one in list(value)[:_MOST_ITEMS]]
    return printable(str(value), length)
