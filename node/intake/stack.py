"""Slices in space: do they make one regular stack, is one missing, or does geometry not tell?

Which slices belong together is decided here; how they are spaced, and whether they make a grid, by
`node.images.geometry`, as for the volume.

Slices are ordered along the slice normal, row × column cosine (PS3.3 C.7.6.2.1.1), never by instance number or slice
location, which scanners and archives rewrite.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from node.images.geometry import GAP_FACTOR, SAME_PLACE_MM, VolumeError, regular_grid, require_same_planes, spacing
from node.intake.header import InstanceHeader

#: Normals whose cosine is above this (2.6 degrees) belong to one stack.
SAME_NORMAL = 0.999

#: Fewer slices than this have no spacing to compare with.
FEWEST = 3

#: Seconds between two images from which they may be of different phases: those of one phase follow faster upon another.
PHASE_S = 2.0

#: Values of one attribute by which slices are told apart at most; a perfusion CT has a hundred phases. Each costs a
#: look at all slices.
MOST_VALUES = 300

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Tiling:
    """How the slices of a series lie in space."""

    #: 'uneven': no slice is missing, and yet they make no regular grid, such as with a tilted gantry.
    kind: Literal["even", "uneven", "gap", "unknown"]
    #: In words: the extent and step, where the gaps are, why there is no grid, or why geometry does not tell.
    detail: str
    #: mm along the slice normal, of the first and last slice of the largest stack.
    first: float = 0.0
    last: float = 0.0
    #: mm between neighbours.
    step: float = 0.0
    #: Slices per position; greater than 1 when the series stacks several phases or reconstructions.
    layers: int = 1
    #: Slices among the others that are of another acquisition or reconstruction, and too few to be judged: those that
    #: watch for the arrival of contrast, say.
    strays: int = 0

    @property
    def whole(self) -> bool:
        """Whether the slices tile space without a gap."""
        return self.kind in ("even", "uneven")

    @property
    def extent_mm(self) -> float:
        """mm that the slices cover, half a step beyond the first and last included."""
        return abs(self.last - self.first) + self.step


def tile(headers: Iterable[InstanceHeader]) -> Tiling:
    """Judge the slices of one series.

    Slices of several orientations are judged stack by stack; a gap in any stack is a gap. Stacks of fewer than
    `FEWEST` slices, such as a pair of localizers, tell nothing, nor do so few of another acquisition among the others.
    """
    stacks = _stacks(headers)
    judged = sorted((_judge(stack) for stack in stacks if len(stack) >= FEWEST), key=lambda t: -t.extent_mm)
    for tiling in judged:
        if tiling.kind == "gap":
            return tiling
    if judged:
        return judged[0]
    count = sum(map(len, stacks))
    return Tiling("unknown", f"{count} placed slices are too few to compare" if count else "no slice positions")


@dataclass(frozen=True)
class Acquisition:
    """Slices of a series that were acquired together, once or several times reconstructed."""

    #: Words that tell it from the others of the series, such as 'acquisition 2'; empty for the only one.
    name: str
    #: For each reconstruction, words that tell it from the others, and which of the headers it is.
    reconstructions: tuple[tuple[str, tuple[int, ...]], ...]


def acquisitions(headers: Sequence[InstanceHeader]) -> list[Acquisition]:
    """The acquisitions of one series, in the order in which they were made.

    Those whose slices lie in the same part of the body are several (phases, breathing states, a scan made again); those
    that lie end to end are one, made in steps or in several passes of the table. Stacks and acquisitions of fewer than
    `FEWEST` slices are left out. Where nothing tells slices at one place apart, they stay together.
    """
    number = {id(header): n for n, header in enumerate(headers)}
    stacks = [stack for stack in _stacks(headers) if len(stack) >= FEWEST]
    return [
        Acquisition(
            part.name,
            tuple(
                (one.name, tuple(sorted({number[id(slice_.header)] for slice_ in one.slices})))
                for one in _enough(_reconstructions(part.slices))
            ),
        )
        for n, stack in enumerate(stacks, 1)
        for part in _enough(_acquired(stack, f"orientation {n} of {len(stacks)}" if len(stacks) > 1 else ""))
    ]


def normal(header: InstanceHeader) -> Vector | None:
    """Unit normal of the slice (row × column cosine), turned so that its largest component is positive."""
    if header.orientation is None:
        return None
    a, b, c, d, e, f = header.orientation
    across = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.hypot(*across)
    if length < 0.5:
        return None
    largest = max(across, key=abs)
    scale = math.copysign(length, largest)
    return (across[0] / scale, across[1] / scale, across[2] / scale)


def numbers_missing(headers: Sequence[InstanceHeader]) -> str:
    """Why the sender's own numbering says that more is to come; empty when it does not."""
    numbers = {header.instance_number for header in headers if header.instance_number is not None}
    if len(numbers) > 1 and max(numbers) - min(numbers) + 1 > len(numbers):
        missing = max(numbers) - min(numbers) + 1 - len(numbers)
        return f"{missing} instance numbers between {min(numbers)} and {max(numbers)} are missing"
    counts = {header.images_in_acquisition for header in headers}
    acquisitions = {header.acquisition_number for header in headers}
    if len(counts) == 1 and len(acquisitions) == 1 and (count := counts.pop()) is not None and count > len(headers):
        return f"the sender counts {count} images in the acquisition"
    return ""


def count_reached(headers: Sequence[InstanceHeader]) -> bool:
    """Whether the sender itself counts as many images in the acquisition as there are, and they are of one."""
    counts = {(header.images_in_acquisition, header.acquisition_number) for header in headers}
    return len(counts) == 1 and len(headers) >= FEWEST and counts.pop()[0] == len(headers)


@dataclass(frozen=True, slots=True)
class _Slice:
    along: float
    #: mm, LPS.
    position: Vector
    header: InstanceHeader


@dataclass(frozen=True, slots=True)
class _Part:
    #: What its slices have in common, and others in the same part of the body have not.
    name: str
    slices: list[_Slice]


def _stacks(headers: Iterable[InstanceHeader]) -> list[list[_Slice]]:
    """Slices with a place in space, gathered by the direction of their normal.

    Empty where there are more directions than `MOST_VALUES`: each slice is compared with all of them, and no stack has
    so many.
    """
    stacks: list[tuple[Vector, list[_Slice]]] = []
    for header in headers:
        direction = normal(header)
        if direction is None or not header.positions:
            continue
        stack = next((stack for stack in stacks if _dot(stack[0], direction) > SAME_NORMAL), (direction, []))
        if not stack[1]:
            if len(stacks) >= MOST_VALUES:
                return []
            stacks.append(stack)
        stack[1].extend(_Slice(_dot(stack[0], at), at, header) for at in header.positions)
    return [stack for _, stack in stacks]


def _judge(stack: list[_Slice]) -> Tiling:
    split = _enough(one for part in _acquired(stack) for one in _reconstructions(part.slices))
    judged = [one for part in split for one in part.slices]
    # Stacks one upon the other: a slice that one lacks is hidden by the other's, so each is judged alone.
    each = ((_lie(one.slices), one.slices) for one in split)
    worst, slices = min(each, key=lambda both: (both[0].kind != "gap", -both[0].extent_mm))
    if worst.kind == "even" and worst.layers == 1 and (fault := _irregular(slices)):
        worst = replace(worst, kind="uneven", detail=fault)
    layers = max(_lie(judged).layers, 2) if len(split) > 1 else worst.layers
    return replace(worst, layers=layers, strays=len(stack) - len(judged))


def _enough(parts: Iterable[_Part]) -> list[_Part]:
    """The parts without those of too few slices."""
    return [part for part in parts if len(part.slices) >= FEWEST]


def _lie(stack: list[_Slice]) -> Tiling:
    """How slices lie, taken as one stack."""
    places = _places(stack)
    layers = Counter(len(at) for at in places).most_common(1)[0][0]
    along = [at[0].along for at in places]
    if len(places) == 1:
        return Tiling("unknown", f"all {len(stack)} slices are at one place", along[0], along[0], 0.0, layers)
    found = spacing(along)
    step = found.step
    gaps = [(along[n] + along[n + 1]) / 2 for n in found.gaps]
    if gaps:
        apart = f"{found.largest:z.1f} mm between slices, {step:z.1f} mm elsewhere"
        return Tiling("gap", f"{_list_gaps(gaps)} ({apart})", along[0], along[-1], step, layers)
    most = max(map(len, places))
    thin = [at[0].along for at in places if len(at) < most]
    if thin:
        detail = f"{_list_gaps(thin)} (fewer slices there than elsewhere)"
        return Tiling("gap", detail, along[0], along[-1], step, layers)
    if not found.on_grid and found.largest > GAP_FACTOR * found.smallest:
        detail = f"uneven spacing: {found.smallest:z.1f} to {found.largest:z.1f} mm between slices"
        return Tiling("gap", detail, along[0], along[-1], step, layers)
    detail = f"slices tile space from z={along[0]:z.1f} to z={along[-1]:z.1f} every {step:z.1f} mm"
    return Tiling("even", detail, along[0], along[-1], step, layers)


def _irregular(slices: list[_Slice]) -> str:
    """Why slices that leave no gap make no regular grid; empty where they do, or where the headers do not tell."""
    planes = [(one.header.orientation, one.header.pixel_spacing) for one in slices]
    known = [(orientation, pixels) for orientation, pixels in planes if orientation and pixels]
    if len(known) < len(planes):
        return ""
    orientations, pixels = zip(*known, strict=True)
    try:
        require_same_planes(orientations, pixels)
        regular_grid([one.position for one in slices], orientations[0], pixels[0], None)
    except VolumeError as fault:
        return str(fault)
    return ""


def _places(stack: list[_Slice]) -> list[list[_Slice]]:
    """Slices gathered by place, in order."""
    places: list[list[_Slice]] = []
    for one in sorted(stack, key=lambda s: s.along):
        if places and one.along - places[-1][0].along < SAME_PLACE_MM:
            places[-1].append(one)
        else:
            places.append([one])
    return places


#: What a value is called, and how it is read from a header. Numbers are shown as they are, never text of the header.
_Telling = tuple[str, Callable[[InstanceHeader], object]]

#: What tells acquisitions apart, beside their times.
_ACQUISITIONS: tuple[_Telling, ...] = (
    ("acquisition", lambda h: h.acquisition_number),
    ("temporal position", lambda h: h.temporal_position),
)

#: What tells the reconstructions of one acquisition apart, the most telling first.
_RECONSTRUCTIONS: tuple[_Telling, ...] = (
    ("slice thickness", lambda h: h.slice_thickness),
    ("kernel", lambda h: h.kernel),
    ("pixel spacing", lambda h: (h.rows, h.columns, h.pixel_spacing)),
    ("image type", lambda h: h.image_type),
)


def _acquired(stack: list[_Slice], name: str = "") -> list[_Part]:
    """The acquisitions in a stack."""
    parts = [_Part(name, stack)]
    for telling in _ACQUISITIONS:
        parts = [piece for part in parts for piece in _split_by(part, *telling)]
    # Clocks tell less than numbers, as makers differ in what they time: what is one stack without them stays so.
    return [piece for part in parts for piece in ([part] if _is_one(part.slices) else _split_by_time(part))]


def _split_by_time(part: _Part) -> list[_Part]:
    times = sorted({one.header.acquired_at for one in part.slices if one.header.acquired_at is not None})
    starts = [after for before, after in pairwise(times) if after - before > PHASE_S]
    if any(one.header.acquired_at is None for one in part.slices):
        return [part]
    return _split_by(part, "phase", lambda h: 1 + bisect(starts, h.acquired_at or 0.0))


def _reconstructions(stack: list[_Slice]) -> list[_Part]:
    """The reconstructions in the stack of one acquisition, as far as what makers write can tell them apart."""
    parts = [_Part("", stack)]
    for telling in _RECONSTRUCTIONS:
        parts = [piece for part in parts for piece in ([part] if _is_one(part.slices) else _split_by(part, *telling))]
    return parts


def _is_one(stack: list[_Slice]) -> bool:
    """Whether slices make one stack, whatever else is said of them."""
    tiling = _lie(stack)
    return tiling.whole and tiling.layers == 1


def _split_by(part: _Part, name: str, value: Callable[[InstanceHeader], object]) -> list[_Part]:
    """The part as stacks that differ in a value and lie in the same part of the body.

    Fewer slices than make a stack are parts of their own where the others are whole without them.
    """
    by_value: dict[object, list[_Slice]] = defaultdict(list)
    for one in part.slices:
        by_value[value(one.header)].append(one)
    if len(by_value) > MOST_VALUES:
        return [part]
    few = [by_value.pop(found) for found in list(by_value) if len(by_value[found]) < FEWEST]
    if few and not _are_strays(few, list(by_value.values()), part.slices):
        return [part]
    strays = [_Part(part.name, slices) for slices in few]
    if len(by_value) == 1 or not _overlap(*by_value.values()):
        return [_Part(part.name, [one for one in part.slices if value(one.header) in by_value]), *strays]
    numbers = all(isinstance(found, int | float) for found in by_value)
    pieces: list[tuple[list[object], list[_Slice]]] = []
    for found in sorted(by_value) if numbers else by_value:  # type: ignore[type-var]
        slices = by_value[found]
        if pieces and not _overlap(pieces[-1][1], slices) and _is_one(both := pieces[-1][1] + slices):
            pieces[-1] = [*pieces[-1][0], found], both
        else:
            pieces.append(([found], slices))
    made = []
    for n, (values, slices) in enumerate(pieces, 1):
        first, last = (f"{one:g}" if isinstance(one, float) else str(one) for one in (values[0], values[-1]))
        words = f"{name} {first}" if len(values) == 1 else f"{name}s {first} to {last}"
        if not numbers:
            words = f"{name} {n} of {len(pieces)}"
        made.append(_Part(", ".join(filter(None, (part.name, words))), slices))
    return [*made, *strays]


def _are_strays(few: list[list[_Slice]], others: list[list[_Slice]], stack: list[_Slice]) -> bool:
    """Whether the few slices of some values lie among the others of a stack, and disturb it.

    They do not where they fill a place that the others leave, or where another acquisition may just begin.
    """
    among = all(any(_overlap(slices, other) for other in others) for slices in few)
    return among and not _is_one(stack) and all(_lie(other).whole for other in others)


def _overlap(*stacks: list[_Slice]) -> bool:
    """Whether any two of the stacks lie in the same part of the body, be it with slices at other places."""
    ends = sorted((min(one.along for one in slices), max(one.along for one in slices)) for slices in stacks)
    return any(after - before < SAME_PLACE_MM for (_, before), (after, _) in pairwise(ends))


def _list_gaps(gaps: list[float]) -> str:
    shown = ", ".join(f"{gap:z.1f}" for gap in gaps[:3])
    return f"gap at z = {shown}{f' and {len(gaps) - 3} more' if len(gaps) > 3 else ''} mm"


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
