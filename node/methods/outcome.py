"""What a method found in a series: neutral parts, which `node/results` renders without knowing what they are of.

Plain data on the source grid, without patient attributes. Texts are ASCII, as they must fit any character set of a
source, and are read by radiologists.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.sr.coding import Code

from models.registry import ModelIdentity
from node.methods.registry import DEFAULT

Colour = tuple[int, int, int]


#: Where a method names no other procedure.
IMAGING = Code("363679005", "SCT", "Imaging")


@dataclass(frozen=True)
class Subject:
    """What the objects of a method are about, whether or not there is a result."""

    #: Name of the method.
    method: str = ""
    #: Title of pages: 'Chest CT'.
    title: str = "Series"
    #: Body Part Examined (0018,0015), a defined term of PS3.16 annex L; empty to leave it out.
    body_part: str = ""
    #: The procedure that a report is of.
    procedure: Code = IMAGING

    @property
    def uid_names(self) -> tuple[str, ...]:
        """What tells the UIDs of this method's objects from those of others of the same series.

        Nothing for the default method: its objects had UIDs before there were others, and keep them.
        """
        return () if self.method in ("", DEFAULT) else (f"method {self.method}",)


#: Of no method.
NEUTRAL = Subject()


@dataclass(frozen=True)
class Segment:
    """One segment of a segmentation."""

    #: From 1 without a gap: a gap loses the last segment in OHIF. Also the value of its voxels in the label map.
    number: int
    #: Stable name such as 'right-lung', from which the tracking UID is derived; a measurement group of the same name
    #: has the same tracking UID.
    name: str
    label: str
    #: Segmented Property Category and Type, and the anatomic regions that they are in (PS3.3 C.8.20.4).
    category: Code
    type: Code
    regions: tuple[Code, ...]
    #: sRGB.
    colour: Colour
    model: ModelIdentity


@dataclass(frozen=True)
class Segmentation:
    """Segments that do not overlap; they become one SEG, or none where there is no segment."""

    #: One of the method's `segmentations`.
    kind: str
    #: Series Description and Content Label (a CS, PS3.5 6.2).
    description: str
    content_label: str
    segments: tuple[Segment, ...]
    #: uint8 (slices, rows, columns) on the source grid: the segment's number, 0 for none.
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Measurement:
    """One number with its meaning and unit."""

    name: Code
    #: nan where there is nothing to measure: it is left out.
    value: float
    #: UCUM.
    unit: Code
    decimals: int
    #: The segments that it was measured on: kind of segmentation and segment numbers. A peer that does not get the
    #: segmentation gets no reference.
    sources: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Outline:
    """A region on one slice; the report draws its outer contour (OHIF stops at a group without one)."""

    #: Index of the slice.
    slice: int
    #: bool (rows, columns), with at least one pixel.
    mask: NDArray[np.bool_]

    @classmethod
    def largest(cls, volume: NDArray[Any], value: int | None = None) -> Outline | None:
        """The slice of a label map on which most has this value (any but 0, for None); None where none has."""
        most, largest = 0, None
        for index, plane in enumerate(volume):
            mask = plane > 0 if value is None else plane == value
            if (area := int(np.count_nonzero(mask))) > most:
                most, largest = area, cls(index, mask)
        return largest


@dataclass(frozen=True)
class MeasurementGroup:
    """Measurements of one finding (TID 1411)."""

    #: Stable name such as 'lesion-3', from which the tracking UID is derived.
    name: str
    #: Tracking Identifier, which viewers show.
    label: str
    finding: Code
    site: Code
    laterality: Code | None
    outline: Outline
    measurements: tuple[Measurement, ...]
    model: ModelIdentity
    #: Concept and value.
    evaluations: tuple[tuple[Code, Code], ...] = ()


@dataclass(frozen=True)
class Statement:
    """What a rule or a classifier says of the scan: what went in, the limits it judges by, what came out."""

    name: str
    inputs: str
    limits: str
    outcome: str
    #: What is known about the outcome's calibration, such as 'not calibrated'; empty where it is no probability.
    calibration: str = ""
    #: Whether it stands on the pages too, or in the report alone.
    on_pages: bool = True

    @property
    def verdict(self) -> str:
        """The outcome, and what is known about its calibration."""
        return ", ".join(filter(None, (self.outcome, self.calibration)))

    @property
    def sentence(self) -> str:
        """All of it."""
        return f"{self.name}: {self.inputs}; {self.limits}. Outcome: {self.verdict}."


@dataclass(frozen=True)
class Column:
    """One column of the table of numbers."""

    heading: str
    decimals: int
    #: Whether it is on the capture's page too, which has room for four.
    on_page: bool = True


@dataclass(frozen=True)
class Row:
    """One row of the table of numbers."""

    name: str
    #: One per column; nan is shown as a dash.
    values: tuple[float, ...]
    #: 0 to 1, drawn as a bar from 0 to 100 %.
    share: float


@dataclass(frozen=True)
class Table:
    """The numbers of the pages at a glance."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Layer:
    """What is drawn on the slices in one colour."""

    #: uint8 (slices, rows, columns); 0 for nothing.
    labels: NDArray[np.uint8]
    colour: Colour
    #: What it is, for keys: 'lungs'.
    name: str
    #: The line that explains the colour below a slice, with its sum: 'Lungs 4200 ml'.
    legend: str


@dataclass(frozen=True)
class Pictures:
    """How slices are drawn, and what is written beside them."""

    #: Outlined, each label for itself. Pictures are framed by it, and slices chosen from those that show it.
    outlined: Layer
    #: Tinted and outlined.
    tinted: Layer
    #: Centre and width, HU, and their name.
    window: tuple[float, float]
    window_name: str
    #: On a slice that shows some of `tinted`: a format of `area`, cm2, and `share`, % of what is outlined there.
    here: str
    nothing_here: str
    #: Captions of a slice: the one that shows most of `tinted`, or the middle of `outlined` where nothing is tinted.
    most: str
    middle: str


@dataclass(frozen=True)
class CodingScheme:
    """A private coding scheme (PS3.3 C.12.1.1.1) of a method that needs codes of its own."""

    designator: str
    name: str
    uid: str
    organization: str


@dataclass(frozen=True)
class Point:
    """What one scan came to, for the comparison with other scans of the patient."""

    #: '8.1 %'.
    short: str
    #: '8.1 %, 250.0 ml'.
    long: str
    #: Of several acquisitions of a study, the one of the largest size counts.
    size: float = 0.0


@dataclass(frozen=True)
class Earlier:
    """What an earlier scan of the patient came to."""

    day: date
    point: Point


@dataclass(frozen=True)
class Outcome:
    """Everything that one method says about one series."""

    subject: Subject
    #: Title of the pages and of the document.
    title: str
    #: The models that took part, in order of use; at least one.
    models: tuple[ModelIdentity, ...]
    #: One for each of the method's kinds, in their order.
    segmentations: tuple[Segmentation, ...]
    groups: tuple[MeasurementGroup, ...]
    #: Why there is no group, as a group needs an outline; for the report that stands in for that of measurements.
    if_no_group: str
    #: The conclusion in one sentence, and sentences that belong to it, in the report only.
    headline: str
    details: tuple[str, ...]
    statements: tuple[Statement, ...]
    #: What limits these findings, in a sentence each.
    notes: tuple[str, ...]
    #: How much of the body part the series shows: 'whole lungs'. Then sentences on image quality.
    coverage: str
    quality: tuple[str, ...]
    #: Limits of use, in the words that a reader of the result needs.
    limits: str
    table: Table
    pictures: Pictures
    #: Name of the row of earlier results, and this scan's place in it.
    trend: str
    point: Point
    #: One line for status and logs.
    brief: str
    #: The method's own numbers, for the ledger and for JSON: plain types.
    summary: dict[str, Any]
    schemes: tuple[CodingScheme, ...] = ()
    #: Stage name → seconds.
    timings: dict[str, float] = field(default_factory=dict)


def plain(outcome: Outcome) -> dict[str, Any]:
    """What the ledger keeps of an outcome and the command line prints.

    Returns
    -------
    dict
        Strings, numbers, booleans, None, lists and dicts only: the method's own `summary`, and beside it `method`,
        `models`, `notes`, `timings_s`, and as `page` the headline, table and statements that the pages show.
    """
    table = outcome.table
    page = {
        "headline": outcome.headline,
        "columns": [column.heading for column in table.columns],
        "rows": [[row.name, *map(_cell, table.columns, row.values)] for row in table.rows],
        "statements": [[one.name, one.inputs, one.limits, one.verdict] for one in outcome.statements],
    }
    common = {
        "method": outcome.subject.method,
        "models": [dataclasses.asdict(model) for model in outcome.models],
        "timings_s": outcome.timings,
        "notes": outcome.notes,
        "page": page,
    }
    return {key: to_json(value) for key, value in (outcome.summary | common).items()}


def cell(column: Column, value: float) -> str:
    """A number of the table as text; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{column.decimals}f}"


def _cell(column: Column, value: float) -> str:
    return "" if math.isnan(value) else cell(column, value)


def to_json(value: Any) -> Any:
    """Plain types for JSON, which knows neither tuples nor nan."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value


def counted(number: int, noun: str, plural: str = "s") -> str:
    """`number` and `noun` in the singular or the plural."""
    return f"{number} {noun}{'' if number == 1 else plural}"
