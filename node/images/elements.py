"""The elements of an encoded data set, one after the other, without a parser that could be made to run endlessly.

A received file may be broken or hostile, so it is walked here and not by pydicom: a malformed element that nobody asked
for must neither stop the walk nor be quoted in a warning (it may be patient data), nesting must not cost stack, and a
data set that ends too early must be told from one that ends.

What a data set may cost is bounded, whoever wrote it: inflated bytes, elements visited, bytes of a value that is looked
at, levels of nesting.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from node.text import printable

#: PS3.5 A.5: the one transfer syntax whose whole data set is a raw deflate stream.
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"

#: Characters of a value that are read; a longer one is cut, which makes a number unreadable. The longest that is
#: needed, Image Type, has some ten values of 16 characters.
VALUE_LIMIT = 1024

#: Bytes of a deflated data set that are inflated to see that it does not end too early; a bomb has gigabytes.
INFLATE_LIMIT = 64 << 20

#: Bytes of it that are held in memory to find its header, which has kilobytes. Of an enhanced image with more, which
#: takes 5,000 frames, the places of the frames are not known.
INFLATED_HELD = 16 << 20

#: Elements, items and delimiters that are visited in one data set, at most: about four seconds of one core. An enhanced
#: image of 15,000 frames with 200 elements each has three million.
MOST_ELEMENTS = 1 << 22

#: The same for a small data set, and how many of its bytes as sent allow for one more: a deflated one of 200 kB can
#: hold millions, and a real one as small cannot.
FEW_ELEMENTS = 1 << 17
BYTES_AN_ELEMENT = 8

#: Values of undefined length in one another; nothing that is real comes near, and each takes memory to get out of.
DEEPEST_SKIPPED = 1 << 18

#: Bytes of a value that is looked at: UIDs, numbers and words are shorter. A longer one counts as absent.
LONGEST_TEXT = 4096

#: Bytes of a file that are read at a time. The first are enough for nearly every header.
_WINDOW = 64 << 10

#: Bytes inflated at a time.
_INFLATED_AT_ONCE = 1 << 20

#: Held while a data set is inflated and looked at: any number may come at once, and memory is there for one.
INFLATING = threading.Lock()


class HeaderError(ValueError):
    """The bytes are no data set that can be filed; the message says why, free of patient data."""


class TooLargeError(HeaderError):
    """The data set holds more than is read of any."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A data set within an open file, which is read piece by piece.

    It is not mapped: where a sector is bad, a read raises and a mapping kills the process.
    """

    #: File descriptor.
    file: int
    #: Offset of the data set in the file, bytes.
    start: int
    #: Bytes of the data set.
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, at: int, count: int) -> bytes:
        """Bytes of the data set; fewer at its end."""
        pieces, count = list[bytes](), min(count, self.size - at)
        while count > 0 and (piece := os.pread(self.file, count, self.start + at)):
            pieces.append(piece)
            at, count = at + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Value:
    """Where an element's value lies, and how the elements within it are encoded."""

    start: int
    end: int
    explicit: bool


#: Values by tag.
Found = dict[int, Value]

ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
#: Float, Double Float and Pixel Data: the walk ends here.
PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
UNDEFINED = 0xFFFFFFFF

# fmt: off
#: VRs with a 16-bit length (PS3.5 table 7.1-2); every other, known or yet to come, has 32 bits (7.1.2).
_SHORT = frozenset([
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO",
    b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
])
# fmt: on
#: What a walk can be within, implicit and explicit: one of each, as there can be very many at a time.
_ITEMS, _ELEMENTS = ((ITEM, False), (ITEM, True)), ((0, False), (0, True))
#: Bytes of the longest element's tag, VR and length.
_LONGEST_START = 12


class Walk:
    """A walk over the elements of one encoded data set.

    Parameters
    ----------
    data
        The bytes, or where they lie in a file.
    order
        'little' or 'big'.
    whole
        Whether they are all.
    size
        Bytes of the whole data set.
    sent
        Bytes of it as they were sent, deflated or not, which bound how many elements are visited.
    """

    def __init__(self, data: memoryview | FileSpan, order: str, whole: bool, size: int, sent: int) -> None:
        self._file = data if isinstance(data, FileSpan) else None
        #: What is at hand of the data set, and from where on.
        self._data: bytes | memoryview = b"" if isinstance(data, FileSpan) else data
        self._base = 0
        #: Where in it the last element may begin that is wholly at hand.
        self._last = -1 if isinstance(data, FileSpan) else len(data)
        self._end = len(data)
        self._whole = whole
        self._size = size
        self.sent = sent
        #: Elements that may still be visited.
        self.left = min(MOST_ELEMENTS, FEW_ELEMENTS + sent // BYTES_AN_ELEMENT)
        prefix = ">" if order == "big" else "<"
        self._tag = struct.Struct(prefix + "HH").unpack_from
        self._length16 = struct.Struct(prefix + "H").unpack_from
        self._length32 = struct.Struct(prefix + "L").unpack_from

    def read(self, start: int, end: int) -> bytes:
        """Bytes of the data set."""
        return bytes(self._data[start:end]) if self._file is None else self._file.read(start, end - start)

    def wanted(self, at: int, end: int, explicit: bool, tags: frozenset[int]) -> Found:
        """Values of `tags` among the elements of one level between `at` and `end`."""
        found: Found = {}
        while at < end:
            if end - at < 8:
                if self._whole and any(self.read(at, end)):
                    raise HeaderError("the data set ends within an element")
                break
            tag, value, length, inner = self.element(at, explicit)
            if tag in PIXELS and end == self._end:
                # A cut pixel value would be found only when the volume is read: too late for the sender to send again.
                if self._whole and length != UNDEFINED and value + length > self._size:
                    raise HeaderError("the data set ends within its pixel data")
                return found
            after = self.skip(value, end, inner) if length == UNDEFINED else value + length
            if after > end:
                if not self._whole:
                    break
                raise HeaderError("the data set ends within an element")
            if tag in tags and tag not in found:
                found[tag] = Value(value, after, inner)
            at = after
        if end == self._end < self._size:
            raise HeaderError("the pixel data was not seen")
        return found

    def items(self, value: Value | None) -> Iterator[Value]:
        """Items of a sequence."""
        if value is None:
            return
        at = value.start
        while value.end - at >= 8:
            tag, length = self.mark(at)
            if tag != ITEM:
                return
            after = self.skip_item(at + 8, value.end, value.explicit) if length == UNDEFINED else at + 8 + length
            # An item's own delimiter is 8 bytes that are no element of it.
            yield Value(at + 8, after - 8 if length == UNDEFINED else min(after, value.end), value.explicit)
            at = after

    def text(self, found: Found, tag: int, length: int = VALUE_LIMIT) -> str:
        """A value of default repertoire (UI, CS, DS, IS), without padding, at most `length` characters of it.

        Bytes outside ASCII and control characters become '?'.
        """
        value = found.get(tag)
        if value is None or value.end - value.start > LONGEST_TEXT:
            return ""
        # One byte of padding more than a value may have (PS3.5 6.2).
        raw = self.read(value.start, min(value.end, value.start + VALUE_LIMIT + 2))
        return printable(raw.decode("ascii", "replace").strip("\0 ").replace("�", "?"), length)

    def short(self, found: Found, tag: int) -> int | None:
        """A US value."""
        value = found.get(tag)
        if value is None or value.end - value.start < 2:
            return None
        return int(self._length16(self.read(value.start, value.start + 2))[0])

    def mark(self, at: int) -> tuple[int, int]:
        """Tag and length of an item or delimiter, which have no VR (PS3.5 7.5)."""
        self.left -= 1
        here = at - self._base
        if self.left < 0 or not 0 <= here <= self._last:
            here = self._seek(at)
        group, element = self._tag(self._data, here)
        return group << 16 | element, self._length32(self._data, here + 4)[0]

    def _seek(self, at: int) -> int:
        """Where in what is at hand an element lies that is not, or may not be visited any more."""
        if self.left < 0:
            raise TooLargeError("the data set has more elements than are read of any")
        if self._file is None:
            raise struct.error
        self._data, self._base = self._file.read(at, _WINDOW), at
        self._last = len(self._data) - _LONGEST_START
        return 0

    def element(self, at: int, explicit: bool) -> tuple[int, int, int, bool]:
        """(tag, where the value starts, its length, whether what is nested in it is explicit)."""
        self.left -= 1
        here = at - self._base
        if self.left < 0 or not 0 <= here <= self._last:
            here = self._seek(at)
        group, element = self._tag(self._data, here)
        tag = group << 16 | element
        vr = bytes(self._data[here + 4 : here + 6])
        # Scanners write implicit elements into explicit data sets; two capitals are a VR, anything else is a length.
        if not explicit or not (vr.isalpha() and vr.isupper()):
            return tag, at + 8, self._length32(self._data, here + 4)[0], False
        if vr in _SHORT:
            return tag, at + 8, self._length16(self._data, here + 6)[0], True
        # UN of undefined length holds implicit elements (PS3.5 6.2.2, note 2).
        return tag, at + 12, self._length32(self._data, here + 8)[0], vr != b"UN"

    def skip(self, at: int, end: int, explicit: bool) -> int:
        """Offset after a value of undefined length."""
        return self._out_of(at, end, [_ITEMS[explicit]])

    def skip_item(self, at: int, end: int, explicit: bool) -> int:
        """Offset after an item of undefined length."""
        return self._out_of(at, end, [_ELEMENTS[explicit]])

    def _out_of(self, at: int, end: int, within: list[tuple[int, bool]]) -> int:
        """Offset after all that `within` is a stack of: items or elements, and whether they are explicit."""
        while within:
            if len(within) > DEEPEST_SKIPPED:
                raise TooLargeError("the data set has more sequences in one another than are read of any")
            if end - at < 8:
                raise HeaderError("the data set ends within a sequence")
            kind, explicit = within[-1]
            tag, length = self.mark(at)
            if kind == ITEM:
                if tag == SEQUENCE_END:
                    within.pop()
                    at += 8
                elif tag == ITEM:
                    at += 8
                    if length == UNDEFINED:
                        within.append(_ELEMENTS[explicit])
                    else:
                        at += length
                else:
                    raise HeaderError("a sequence holds something that is no item")
            elif tag == ITEM_END:
                within.pop()
                at += 8
            else:
                _, at, length, inner = self.element(at, explicit)
                if length == UNDEFINED:
                    within.append(_ITEMS[inner])
                else:
                    at += length
        return at


def inflate(data: memoryview | FileSpan, limit: int, held: int) -> tuple[memoryview, int, bool]:
    """Inflate the first `limit` bytes of a deflated data set.

    Returns
    -------
    tuple
        Of these the first, at most `held`; how many there are; and whether they are all.

    Raises
    ------
    HeaderError
        It is no deflate stream.
    OSError
        The file cannot be read.
    """
    stream, count, at = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
    # Mapped, so that the memory goes back to the system: each thread's heap would keep as much for itself.
    inflated = memoryview(mmap.mmap(-1, max(held, 1)))
    try:
        while not stream.eof and count < limit:
            more: bytes | memoryview = stream.unconsumed_tail
            if not more:
                more = data.read(at, _WINDOW) if isinstance(data, FileSpan) else data[at : at + _WINDOW]
                at += len(more)
            piece = stream.decompress(more, min(_INFLATED_AT_ONCE, limit - count))
            if not piece and not more:
                break
            if count < held:
                fits = piece[: held - count]
                inflated[count : count + len(fits)] = fits
            count += len(piece)
    except zlib.error:
        raise HeaderError("the data set is no deflate stream") from None
    return inflated[: min(count, held)], count, stream.eof
