"""Slices in space: do they tile a stack evenly, is one missing, or does geometry not tell?

Slices are ordered along the slice normal, row × column cosine (PS3.3 C.7.6.2.1.1), never by instance number or slice
location, which scanners and archives rewrite.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from node.intake.header import InstanceHeader

#: Two neighbouring slices further apart than this many steps have a missing slice between them (which makes it 2).
GAP_STEPS = 1.5

#: mm within which two slices are at the same place: decimal strings are rounded, slices are not this thin.
SAME_PLACE_MM = 0.05

#: Normals whose cosine is above this (2.6 degrees) belong to one stack.
SAME_NORMAL = 0.999

#: Fewer slices than this have no spacing to compare with.
FEWEST = 3

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Tiling:
    """How the slices of a series lie in space."""

    kind: Literal["even", "gap", "unknown"]
    #: In words: the extent and step, where the gaps are, or why geometry does not tell.
    detail: str
    #: mm along the slice normal, of the first and last slice of the largest stack.
    first: float = 0.0
    last: float = 0.0
    #: mm between neighbours.
    step: float = 0.0
    #: Slices at one place: over 1 where a series holds phases or reconstructions one upon the other.
    layers: int = 1

    @property
    def extent_mm(self) -> float:
        """mm that the slices cover, half a step beyond the first and last included."""
        return abs(self.last - self.first) + self.step


def tile(headers: Iterable[InstanceHeader]) -> Tiling:
    """Judge the slices of one series.

    Slices of several orientations are judged stack by stack; a gap in any stack is a gap. Stacks of fewer than
    `FEWEST` slices, such as a pair of localizers, tell nothing.
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


def parts(headers: Sequence[InstanceHeader]) -> list[tuple[str, list[int]]]:
    """The stacks of one series: which of the headers, and what tells them from others at the same places.

    The latter is words such as 'acquisition 2'. Stacks of fewer than `FEWEST` slices are left out. Where nothing tells
    slices at one place apart, they stay together.
    """
    number = {id(header): n for n, header in enumerate(headers)}
    return [
        (part.name, sorted({number[id(one.header)] for one in part.slices}))
        for stack in _stacks(headers)
        if len(stack) >= FEWEST
        for part in _split(stack)
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
    header: InstanceHeader


@dataclass(frozen=True, slots=True)
class _Part:
    #: What its slices have in common, and others at the same places have not.
    name: str
    slices: list[_Slice]


def _stacks(headers: Iterable[InstanceHeader]) -> list[list[_Slice]]:
    """Slices with a place in space, gathered by the direction of their normal."""
    stacks: list[tuple[Vector, list[_Slice]]] = []
    for header in headers:
        direction = normal(header)
        if direction is None or not header.positions:
            continue
        stack = next((stack for stack in stacks if _dot(stack[0], direction) > SAME_NORMAL), (direction, []))
        if not stack[1]:
            stacks.append(stack)
        stack[1].extend(_Slice(_dot(stack[0], at), header) for at in header.positions)
    return [stack for _, stack in stacks]


def _judge(stack: list[_Slice]) -> Tiling:
    places = _places(stack)
    layers = Counter(len(at) for at in places).most_common(1)[0][0]
    if max(map(len, places)) > 1 and len(split := _split(stack)) > 1:
        # Stacks one upon the other: a slice that one lacks is hidden by the other's, so each is judged alone.
        worst = min((_judge(one.slices) for one in split), key=lambda t: (t.kind != "gap", -t.extent_mm))
        return Tiling(worst.kind, worst.detail, worst.first, worst.last, worst.step, max(layers, 2))
    along = [at[0].along for at in places]
    steps = sorted(b - a for a, b in pairwise(along))
    if not steps:
        return Tiling("unknown", f"all {len(stack)} slices are at one place", along[0], along[0], 0.0, layers)
    # The lower quartile is the true step even when several slices are missing, and a few extra ones do not mislead it.
    step = steps[len(steps) // 4]
    gaps = [(a + b) / 2 for a, b in pairwise(along) if b - a > GAP_STEPS * step]
    if gaps:
        apart = f"{steps[-1]:z.1f} mm between slices, {step:z.1f} mm elsewhere"
        return Tiling("gap", f"{_list_gaps(gaps)} ({apart})", along[0], along[-1], step, layers)
    thin = [at[0].along for at in places if len(at) < max(map(len, places))]
    if thin:
        detail = f"{_list_gaps(thin)} (fewer slices there than elsewhere)"
        return Tiling("gap", detail, along[0], along[-1], step, layers)
    if steps[-1] > GAP_STEPS * steps[0]:
        detail = f"uneven spacing: {steps[0]:z.1f} to {steps[-1]:z.1f} mm between slices"
        return Tiling("gap", detail, along[0], along[-1], step, layers)
    detail = f"slices tile space from z={along[0]:z.1f} to z={along[-1]:z.1f} every {step:z.1f} mm"
    return Tiling("even", detail, along[0], along[-1], step, layers)


def _places(stack: list[_Slice]) -> list[list[_Slice]]:
    """Slices gathered by place, in order."""
    places: list[list[_Slice]] = []
    for one in sorted(stack, key=lambda s: s.along):
        if places and one.along - places[-1][0].along < SAME_PLACE_MM:
            places[-1].append(one)
        else:
            places.append([one])
    return places


#: What tells slices at one place apart, the most telling first: phases are acquisitions, reconstructions differ in
#: thickness, kernel or field of view. Values are shown as they are where they are numbers, never text from the header.
_TELLING: tuple[tuple[str, Callable[[InstanceHeader], object]], ...] = (
    ("acquisition", lambda h: h.acquisition_number),
    ("slice thickness", lambda h: h.slice_thickness),
    ("kernel", lambda h: h.kernel),
    ("pixel spacing", lambda h: (h.rows, h.columns, h.pixel_spacing)),
    ("image type", lambda h: h.image_type),
)


def _split(stack: list[_Slice]) -> list[_Part]:
    """The stack as stacks with one slice a place, as far as what makers write can tell them apart."""
    parts = [_Part("", stack)]
    for name, value in _TELLING:
        parts = [piece for part in parts for piece in _split_by(part, name, value)]
    return parts


def _split_by(part: _Part, name: str, value: Callable[[InstanceHeader], object]) -> list[_Part]:
    if len(_places(part.slices)) == len(part.slices):
        return [part]
    by_value: dict[object, list[_Slice]] = defaultdict(list)
    for one in part.slices:
        by_value[value(one.header)].append(one)
    if len(by_value) == 1 or any(len(slices) < FEWEST for slices in by_value.values()):
        return [part]
    pieces = []
    for n, (found, slices) in enumerate(by_value.items(), 1):
        shown = f"{name} {found:g}" if isinstance(found, int | float) else f"{name} {n} of {len(by_value)}"
        pieces.append(_Part(f"{part.name}, {shown}" if part.name else shown, slices))
    return pieces


def _list_gaps(gaps: list[float]) -> str:
    shown = ", ".join(f"{gap:z.1f}" for gap in gaps[:3])
    return f"gap at z = {shown}{f' and {len(gaps) - 3} more' if len(gaps) > 3 else ''} mm"


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
