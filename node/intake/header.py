"""Encoded data set → `InstanceHeader`: what intake must know of an instance, and nothing else of it.

Intake sees every instance of the hospital, whole or broken; `node.images.elements` bounds what each may cost. Here the
frames whose places are kept are bounded too.
"""

from __future__ import annotations

import math
import re
import struct
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import date
from itertools import chain, islice

from node.images.elements import (
    DEFLATED,
    EXPLICIT_BIG,
    IMPLICIT_LITTLE,
    INFLATE_LIMIT,
    INFLATED_HELD,
    INFLATING,
    FileSpan,
    Found,
    HeaderError,
    TooLargeError,
    Value,
    Walk,
    inflate,
)
from node.text import LENGTH, UID

#: Characters of Body Part Examined that are looked at: scanners write more than the 16 of a CS.
_PART_LENGTH = 64

#: Bytes as sent that each frame takes at least beyond the first few, its pixels and functional groups together, and the
#: most frames of one image. A header that counts more than that, or than there is room for, is a bomb, and the places
#: of its frames are not kept: they take 140 bytes each while the series is open, and are compared under a lock.
BYTES_A_FRAME = 512
FEW_FRAMES = 16
MOST_FRAMES = 1 << 15

#: Values of Image Type that are kept; scanners write up to ten.
_MOST_TYPES = 16


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
    dataset: bytes | bytearray | memoryview | FileSpan,
    transfer_syntax_uid: str,
    *,
    whole: bool = True,
    size: int | None = None,
) -> InstanceHeader:
    """Read the header of an encoded data set (without File Meta Information).

    Parameters
    ----------
    dataset
        The bytes of the data set as they came over the wire, or where they lie in a file.
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
        The bytes are no data set, end within an element, name no study, series or instance, or hold more than is read.
    OSError
        The file cannot be read.
    """
    size = sent = len(dataset) if size is None else size
    if size > len(dataset) and transfer_syntax_uid == DEFLATED:
        raise HeaderError("the end of the deflated data set was not seen")
    with INFLATING if transfer_syntax_uid == DEFLATED else nullcontext():
        data: memoryview | FileSpan = dataset if isinstance(dataset, FileSpan) else memoryview(dataset)
        if transfer_syntax_uid == DEFLATED:
            inflated, count, all_of_it = inflate(data, INFLATE_LIMIT, INFLATED_HELD)
            if whole and not all_of_it and count < INFLATE_LIMIT:
                raise HeaderError("the deflated data set ends too early")
            data, whole, size = inflated, whole and all_of_it and count == len(inflated), len(inflated)
        walk = Walk(data, "big" if transfer_syntax_uid == EXPLICIT_BIG else "little", whole, size, sent)
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
# fmt: on
_POSITION, _ORIENTATION, _SPACING, _THICKNESS = 0x00200032, 0x00200037, 0x00280030, 0x00180050
#: Plane Position, Plane Orientation and Pixel Measures Sequence (PS3.3 C.7.6.16.2).
_PLANE = frozenset((0x00209113, 0x00209116, 0x00289110))
_MEASURES = frozenset((_POSITION, _ORIENTATION, _SPACING, _THICKNESS))


def _header(walk: Walk, found: Found) -> InstanceHeader:
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
        image_type=_values(walk.text(found, 0x00080008))[:_MOST_TYPES],
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


def _functional_groups(walk: Walk, found: Found, frames: int) -> _Geometry:
    """Orientation, spacing, thickness and positions of an enhanced image (PS3.3 C.7.6.16); none of too many frames.

    The places of 15,000 frames may be more than is looked at; the object is kept all the same.
    """
    try:
        shared = [_measures(walk, item) for item in islice(walk.items(found.get(0x52009229)), 1)]
        whole = shared[0] if shared else {}
        first, orientations, positions = dict[int, Value](), set[str](), list[tuple[float, ...]]()
        room = min(MOST_FRAMES, FEW_FRAMES + walk.sent // BYTES_A_FRAME)
        each = walk.items(found.get(0x52009230)) if frames <= room else iter(())
        measures = (_measures(walk, item) for item in islice(each, max(frames, 0) + 1))
        for n, frame in enumerate(chain([next(measures, {})], measures)):
            both = {**whole, **frame}
            first = first if n else both
            orientations.add(walk.text(both, _ORIENTATION))
            if (position := _numbers(walk.text(both, _POSITION), 3)) is not None:
                positions.append(position)
    except TooLargeError:
        return None, None, None, ()
    return (
        _numbers(orientations.pop(), 6) if len(orientations) == 1 else None,
        _numbers(walk.text(first, _SPACING), 2),
        _number(walk.text(first, _THICKNESS)),
        tuple(positions) if len(positions) == frames else (),
    )


def _measures(walk: Walk, item: Value) -> Found:
    """Position, orientation, spacing and thickness that a functional group holds."""
    found: Found = {}
    for sequence in walk.wanted(item.start, item.end, item.explicit, _PLANE).values():
        for inner in walk.items(sequence):
            found.update(walk.wanted(inner.start, inner.end, inner.explicit, _MEASURES))
    return found


def _numbers(text: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite decimal strings, else None."""
    try:
        values = tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _values(text: str) -> tuple[str, ...]:
    """The values of a text, without the empty ones."""
    return tuple(part.strip() for part in text.split("\\") if part.strip())


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
