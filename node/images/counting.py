"""How many elements a value holds, its sequences and their items included, before a parser makes objects of them."""

from __future__ import annotations

import struct

from node.images.elements import ITEM, ITEM_END, PIXELS, SEQUENCE_END, UNDEFINED, HeaderError, TooLargeError, Walk

#: Sequences in one another; deeper ones are left out. Structured reports, the deepest that there are, have about ten.
DEEPEST = 32


def count_within(walk: Walk, at: int, end: int, explicit: bool, most: int) -> int | None:
    """Elements and items in a value, itself one; None where they are more than `most` or nested too deeply."""
    before = walk.left
    try:
        if end - at >= 8 and walk.mark(at)[0] == ITEM:
            _descend(walk, at, end, explicit, 1)
    except (TooLargeError, _DeepError):
        return None
    except (HeaderError, struct.error):
        pass  # bytes that only look like a sequence
    count = max(before - walk.left, 1)
    return count if count <= most else None


class _DeepError(Exception):
    """Sequences lie too deeply in one another."""


def _descend(walk: Walk, at: int, end: int, explicit: bool, depth: int) -> int:
    """Visit the items of a sequence and all in them; gives where it ends."""
    if depth > DEEPEST:
        raise _DeepError
    while end - at >= 8:
        tag, length = walk.mark(at)
        at += 8
        if tag == SEQUENCE_END:
            break
        if tag != ITEM:
            raise HeaderError("a sequence holds something that is no item")
        at = _visit(walk, at, end if length == UNDEFINED else min(at + length, end), explicit, depth)
    return at


def _visit(walk: Walk, at: int, end: int, explicit: bool, depth: int) -> int:
    """Visit the elements of an item; gives where it ends."""
    while end - at >= 8:
        tag, value, length, inner = walk.element(at, explicit)
        if tag == ITEM_END:
            return value
        if length == UNDEFINED and tag in PIXELS:
            at = walk.skip(value, end, inner)
        elif length == UNDEFINED:
            at = _descend(walk, value, end, inner, depth + 1)
        else:
            at = min(value + length, end)
            if at - value >= 8 and walk.mark(value)[0] == ITEM:
                _descend(walk, value, at, inner, depth + 1)
    return end
