"""Encoded data set → `InstanceHeader`: what intake must know of an instance, and nothing else of it.

The elements are walked here and not by pydicom because intake sees every instance of the hospital, whole or broken:
a malformed element that nobody asked for must neither stop the walk nor be quoted in a warning (it may be patient
data), nesting must not cost stack, and a data set that ends too early must be told from one that ends.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date

from node.text import LENGTH, UID, printable

#: PS3.5 A.5: the one transfer syntax whose whole data set is a raw deflate stream.
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"

#: Characters of a value that are read; a longer one is cut, which makes a number unreadable. The longest that is
#: needed, Image Type, has some ten values of 16 characters.
VALUE_LIMIT = 1024

#: Characters of Body Part Examined that are looked at: scanners write more than the 16 of a CS.
_PART_LENGTH = 64

#: Bytes of a deflated data set that are inflated to find its header; a header is kilobytes, a bomb is not.
INFLATE_LIMIT = 64 << 20


class HeaderError(ValueError):
    """The bytes are no data set that can be filed; the message says why, free of patient data."""


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """What assembly and triage need of one instance. Attributes that are absent or unreadable are None or empty."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    modality: str = ""
    image_type: tuple[str, ...] = ()
    body_part: str = ""
    instance_number: int | None = None
    acquisition_number: int | None = None
    #: Temporal Position Identifier (0020,0100).
    temporal_position: int | None = None
    #: Acquisition DateTime, else Acquisition Date and Time, in seconds from no epoch that matters.
    acquired_at: float | None = None
    #: Images in Acquisition (0020,1002): some senders' own count.
    images_in_acquisition: int | None = None
    number_of_frames: int = 1
    rows: int | None = None
    columns: int | None = None
    #: mm between rows, between columns.
    pixel_spacing: tuple[float, float] | None = None
    #: mm.
    slice_thickness: float | None = None
    #: Degrees (0018,1120).
    gantry_tilt: float | None = None
    #: Convolution Kernel (0018,1210).
    kernel: str = ""
    #: Cosines of a row, then of a column, LPS (PS3.3 C.7.6.2.1.1). None also where the frames of one instance differ.
    orientation: tuple[float, float, float, float, float, float] | None = None
    #: mm, LPS, of each slice: one for a single-frame image, one a frame for an enhanced one, none where not given.
    positions: tuple[tuple[float, float, float], ...] = ()


def read_header(
    dataset: bytes | bytearray | memoryview, transfer_syntax_uid: str, *, whole: bool = True, size: int | None = None
) -> InstanceHeader:
    """Read the header of an encoded data set (without File Meta Information).

    Parameters
    ----------
    dataset
        The bytes of the data set as they came over the wire.
    transfer_syntax_uid
        The transfer syntax that was negotiated for them. Every one but Implicit VR Little Endian, Explicit VR Big
        Endian and the deflated one is Explicit VR Little Endian up to the pixel data (PS3.5 A.4).
    whole
        False for the first bytes of a data set, of which only what they hold is asked.
    size
        Bytes of the whole data set where `dataset` is only its first; the answer is that for the whole then, or a
        `HeaderError` if more of it has to be seen.

    Raises
    ------
    HeaderError
        The bytes are no data set, end within an element, or name no study, series or instance.
    """
    data = memoryview(dataset)
    size = len(data) if size is None else size
    if size > len(data) and transfer_syntax_uid == DEFLATED:
        raise HeaderError("the end of the deflated data set was not seen")
    if transfer_syntax_uid == DEFLATED:
        data, all_of_it = _inflated(data, whole)
        whole, size = whole and all_of_it, len(data)
    walk = _Walk(data, "big" if transfer_syntax_uid == EXPLICIT_BIG else "little", whole, size)
    try:
        found = walk.wanted(0, len(data), transfer_syntax_uid != IMPLICIT_LITTLE, _TOP)
        for tag, name in _NEEDED.items():
            if not (uid := walk.text(found, tag, LENGTH["UI"])):
                raise HeaderError(f"the data set has no {name}")
            if not UID.match(uid):  # it becomes a path and an identity
                raise HeaderError("a UID is not digits and dots of at most 64 characters (PS3.5 9.1)")
        return _header(walk, found)
    except struct.error:
        raise HeaderError("the data set ends within an element") from None


@dataclass(frozen=True, slots=True)
class _Value:
    """Where an element's value lies, and how the elements within it are encoded."""

    start: int
    end: int
    explicit: bool


_Found = dict[int, _Value]

_NEEDED = {
    0x0020000D: "Study Instance UID",
    0x0020000E: "Series Instance UID",
    0x00080016: "SOP Class UID",
    0x00080018: "SOP Instance UID",
}
# fmt: off
#: Image Type, SOP Class and Instance UID, Acquisition Date, DateTime and Time, Modality; Body Part, Thickness, Tilt,
#: Kernel; Study and Series UID, Acquisition and Instance Number, Position, Orientation, Temporal Position, Images in
#: Acquisition; Frames, Rows, Columns, Spacing; functional groups.
_TOP = frozenset([
    0x00080008, 0x00080016, 0x00080018, 0x00080022, 0x0008002A, 0x00080032, 0x00080060, 0x00180015, 0x00180050,
    0x00181120, 0x00181210, 0x0020000D, 0x0020000E, 0x00200012, 0x00200013, 0x00200032, 0x00200037, 0x00200100,
    0x00201002, 0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x52009229, 0x52009230,
])
#: VRs with a 16-bit length (PS3.5 table 7.1-2); every other, known or yet to come, has 32 bits (7.1.2).
_SHORT = frozenset([
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO",
    b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
])
# fmt: on
_POSITION, _ORIENTATION, _SPACING, _THICKNESS = 0x00200032, 0x00200037, 0x00280030, 0x00180050
#: Plane Position, Plane Orientation and Pixel Measures Sequence (PS3.3 C.7.6.16.2).
_PLANE = frozenset((0x00209113, 0x00209116, 0x00289110))
_MEASURES = frozenset((_POSITION, _ORIENTATION, _SPACING, _THICKNESS))

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
#: Float, Double Float and Pixel Data: the walk ends here.
_PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
_UNDEFINED = 0xFFFFFFFF


def _header(walk: _Walk, found: _Found) -> InstanceHeader:
    frames = _integer(walk.text(found, 0x00280008)) or 1
    orientation = _numbers(walk.text(found, _ORIENTATION), 6)
    spacing = _numbers(walk.text(found, _SPACING), 2)
    thickness = _number(walk.text(found, _THICKNESS))
    position = _numbers(walk.text(found, _POSITION), 3)
    positions: tuple[tuple[float, ...], ...] = () if position is None or frames > 1 else (position,)
    if 0x52009229 in found or 0x52009230 in found:
        orientation, spacing, thickness, positions = _functional_groups(walk, found, frames)
    return InstanceHeader(
        study_instance_uid=walk.text(found, 0x0020000D),
        series_instance_uid=walk.text(found, 0x0020000E),
        sop_class_uid=walk.text(found, 0x00080016),
        sop_instance_uid=walk.text(found, 0x00080018),
        modality=walk.text(found, 0x00080060, LENGTH["CS"]),
        image_type=tuple(part.strip() for part in walk.text(found, 0x00080008).split("\\") if part.strip()),
        body_part=walk.text(found, 0x00180015, _PART_LENGTH),
        instance_number=_integer(walk.text(found, 0x00200013)),
        acquisition_number=_integer(walk.text(found, 0x00200012)),
        temporal_position=_integer(walk.text(found, 0x00200100)),
        acquired_at=_moment(*(walk.text(found, tag) for tag in (0x0008002A, 0x00080022, 0x00080032))),
        images_in_acquisition=_integer(walk.text(found, 0x00201002)),
        number_of_frames=frames,
        rows=walk.short(found, 0x00280010),
        columns=walk.short(found, 0x00280011),
        pixel_spacing=spacing,  # type: ignore[arg-type]
        slice_thickness=thickness,
        gantry_tilt=_number(walk.text(found, 0x00181120)),
        kernel=walk.text(found, 0x00181210),
        orientation=orientation,  # type: ignore[arg-type]
        positions=positions,  # type: ignore[arg-type]
    )


_Geometry = tuple[tuple[float, ...] | None, tuple[float, ...] | None, float | None, tuple[tuple[float, ...], ...]]


def _functional_groups(walk: _Walk, found: _Found, frames: int) -> _Geometry:
    """Orientation, spacing, thickness and positions of an enhanced image (PS3.3 C.7.6.16)."""
    shared = [walk.measures(item) for item in walk.items(found.get(0x52009229))]
    each = [walk.measures(item) for item in walk.items(found.get(0x52009230))] or [{}]
    whole = shared[0] if shared else {}
    orientations = {walk.text({**whole, **frame}, _ORIENTATION) for frame in each}
    first = {**whole, **each[0]}
    positions = [_numbers(walk.text({**whole, **frame}, _POSITION), 3) for frame in each]
    known = tuple(position for position in positions if position is not None)
    return (
        _numbers(orientations.pop(), 6) if len(orientations) == 1 else None,
        _numbers(walk.text(first, _SPACING), 2),
        _number(walk.text(first, _THICKNESS)),
        known if len(known) == frames else (),
    )


class _Walk:
    """A walk over the elements of one encoded data set."""

    def __init__(self, data: memoryview, order: str, whole: bool, size: int) -> None:
        self._data = data
        self._whole = whole
        self._size = size
        prefix = ">" if order == "big" else "<"
        self._tag = struct.Struct(prefix + "HH").unpack_from
        self._length16 = struct.Struct(prefix + "H").unpack_from
        self._length32 = struct.Struct(prefix + "L").unpack_from

    def wanted(self, at: int, end: int, explicit: bool, tags: frozenset[int]) -> _Found:
        """Values of `tags` among the elements of one level between `at` and `end`."""
        found: _Found = {}
        while at < end:
            if end - at < 8:
                if self._whole and any(self._data[at:end]):
                    raise HeaderError("the data set ends within an element")
                break
            tag, value, length, inner = self._element(at, explicit)
            if tag in _PIXELS and end == len(self._data):
                # A cut pixel value would be found only when the volume is read: too late for the sender to send again.
                if self._whole and length != _UNDEFINED and value + length > self._size:
                    raise HeaderError("the data set ends within its pixel data")
                return found
            after = self._skip(value, end, [(_ITEM, inner)]) if length == _UNDEFINED else value + length
            if after > end:
                if not self._whole:
                    break
                raise HeaderError("the data set ends within an element")
            if tag in tags and tag not in found:
                found[tag] = _Value(value, after, inner)
            at = after
        if end == len(self._data) < self._size:
            raise HeaderError("the pixel data was not seen")
        return found

    def items(self, value: _Value | None) -> Iterator[_Value]:
        """Items of a sequence."""
        if value is None:
            return
        at = value.start
        while value.end - at >= 8:
            tag, length = self._mark(at)
            if tag != _ITEM:
                return
            after = self._skip(at + 8, value.end, [(0, value.explicit)]) if length == _UNDEFINED else at + 8 + length
            # An item's own delimiter is 8 bytes that are no element of it.
            yield _Value(at + 8, after - 8 if length == _UNDEFINED else min(after, value.end), value.explicit)
            at = after

    def measures(self, item: _Value) -> _Found:
        """Position, orientation, spacing and thickness that a functional group holds."""
        found: _Found = {}
        for sequence in self.wanted(item.start, item.end, item.explicit, _PLANE).values():
            for inner in self.items(sequence):
                found.update(self.wanted(inner.start, inner.end, inner.explicit, _MEASURES))
        return found

    def text(self, found: _Found, tag: int, length: int = VALUE_LIMIT) -> str:
        """A value of default repertoire (UI, CS, DS, IS), without padding, at most `length` characters of it.

        Bytes outside ASCII and control characters become '?'.
        """
        value = found.get(tag)
        if value is None:
            return ""
        # One byte of padding more than a value may have (PS3.5 6.2).
        raw = bytes(self._data[value.start : min(value.end, value.start + VALUE_LIMIT + 2)])
        return printable(raw.decode("ascii", "replace").strip("\0 ").replace("�", "?"), length)

    def short(self, found: _Found, tag: int) -> int | None:
        """A US value."""
        value = found.get(tag)
        return int(self._length16(self._data, value.start)[0]) if value and value.end - value.start >= 2 else None

    def _mark(self, at: int) -> tuple[int, int]:
        """Tag and length of an item or delimiter, which have no VR (PS3.5 7.5)."""
        group, element = self._tag(self._data, at)
        return group << 16 | element, self._length32(self._data, at + 4)[0]

    def _element(self, at: int, explicit: bool) -> tuple[int, int, int, bool]:
        """(tag, where the value starts, its length, whether what is nested in it is explicit)."""
        group, element = self._tag(self._data, at)
        tag = group << 16 | element
        vr = bytes(self._data[at + 4 : at + 6])
        # Scanners write implicit elements into explicit data sets; two capitals are a VR, anything else is a length.
        if not explicit or not (vr.isalpha() and vr.isupper()):
            return tag, at + 8, self._length32(self._data, at + 4)[0], False
        if vr in _SHORT:
            return tag, at + 8, self._length16(self._data, at + 6)[0], True
        # UN of undefined length holds implicit elements (PS3.5 6.2.2, note 2).
        return tag, at + 12, self._length32(self._data, at + 8)[0], vr != b"UN"

    def _skip(self, at: int, end: int, within: list[tuple[int, bool]]) -> int:
        """Offset after a value of undefined length; `within` is a stack of (items or elements, explicit)."""
        while within:
            if end - at < 8:
                raise HeaderError("the data set ends within a sequence")
            kind, explicit = within[-1]
            tag, length = self._mark(at)
            if kind == _ITEM:
                if tag == _SEQUENCE_END:
                    within.pop()
                    at += 8
                elif tag == _ITEM:
                    at += 8
                    if length == _UNDEFINED:
                        within.append((0, explicit))
                    else:
                        at += length
                else:
                    raise HeaderError("a sequence holds something that is no item")
            elif tag == _ITEM_END:
                within.pop()
                at += 8
            else:
                _, at, length, inner = self._element(at, explicit)
                if length == _UNDEFINED:
                    within.append((_ITEM, inner))
                else:
                    at += length
        return at


def _inflated(data: memoryview, whole: bool) -> tuple[memoryview, bool]:
    """The inflated bytes up to `INFLATE_LIMIT`, and whether they are all."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, INFLATE_LIMIT)
    except zlib.error:
        raise HeaderError("the data set is no deflate stream") from None
    if whole and not stream.eof and len(inflated) < INFLATE_LIMIT:
        raise HeaderError("the deflated data set ends too early")
    return memoryview(inflated), stream.eof


def _numbers(text: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite decimal strings, else None."""
    try:
        values = tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _number(text: str) -> float | None:
    first = _numbers(text.split("\\")[0], 1)
    return first[0] if first else None


def _integer(text: str) -> int | None:
    number = _number(text)
    # An IS has 32 bits (PS3.5 table 6.2-1).
    return int(number) if number is not None and abs(number) < 1 << 31 and number == int(number) else None


def _moment(both: str, day: str, time: str) -> float | None:
    """Seconds of a DT value, else of a DA and a TM (with colons, where they are old); the zone is left out."""
    text = both or f"{day or '00010101'}{time.replace(':', '')}"
    match = re.match(r"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)?(\d\d(?:\.\d+)?)?", text)
    if match is None:
        return None
    year, month, of_month, hours, minutes, seconds = match.groups()
    with suppress(ValueError):
        days = date(int(year), int(month), int(of_month)).toordinal()
        return 86400.0 * days + 3600 * int(hours) + 60 * int(minutes or 0) + float(seconds or 0)
    return None
