"""The tables of docs/conformance.md, from the code and from objects that it makes.

    LUNGNODE_CONFORMANCE=write pytest tests/results/test_conformance.py   # renews the page

Objects of two series that have nothing in common are made. Where a value comes from is seen in them: an attribute is of
the *source* where each object has the value of its own source, *fixed* where both have the same, and of the *analysis*
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.tag import BaseTag
from pydicom.uid import UID
from synthetic_chest import KINDS, MOMENT, Shape, make_chest

from node import identity
from node.delivery import commitment
from node.intake import contexts, listener, series_count
from node.intake.transport import pdu
from node.methods.pneumonia import triage
from node.methods.pneumonia.outcome import outcome_of
from node.methods.pneumonia.subject import SUBJECT
from node.network import associations
from node.results import makers
from node.results.forms import Profile

#: Sequences whose items are listed; those of others follow from the standard's macros.
_OPENED = (
    "SegmentSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "ReferencedSeriesSequence",
)

#: Values longer than this are not repeated in a table.
_SHORT = 110


@dataclass(frozen=True)
class Made:
    """The source's first header, and one object of each kind."""

    header: Dataset
    objects: dict[str, Dataset]


def tables(folder: Path) -> dict[str, str]:
    """Each table of the page by its name, as Markdown."""
    one, other = (_made(folder / name, shape) for name, shape in _SERIES.items())
    common = set.intersection(*(set(dataset.keys()) for dataset in one.objects.values()))
    told = {
        "classes": _classes(one.objects),
        "syntaxes": _rows(("transfer syntax", "UID"), ((UID(uid).name, uid) for uid in contexts.TRANSFER_SYNTAXES)),
        "limits": limits(),
        "common": _attributes(one, other, "infection-seg", common, among=True),
        "codes": _codes(one.objects),
    }
    for kind in ("infection-seg", "sr", "capture", "pdf", "not-analysed-sr", "rejection-note"):
        told[kind] = _attributes(one, other, kind, common, among=False)
    return told


#: Two series that have nothing in common that a result could take from one.
_SERIES = {
    "one": Shape(slices=12, rows=32, columns=32),
    "other": Shape(
        slices=14,
        rows=28,
        columns=36,
        extent=(252.0, 308.0, 362.0),
        attributes={
            "PatientName": "Other^One",
            "PatientID": "LUNG-2",
            "PatientBirthDate": "19700202",
            "PatientSex": "F",
            "PatientAge": "056Y",
            "BodyPartExamined": "THORAX",
            "FrameOfReferenceUID": "1.2.826.0.1.8.3",
            "PositionReferenceIndicator": "XY",
            "StudyInstanceUID": "1.2.826.0.1.8.1",
            "SeriesInstanceUID": "1.2.826.0.1.8.2",
            "StudyDate": "20260304",
            "StudyTime": "080000",
            "StudyID": "2",
            "AccessionNumber": "A2",
            "ReferringPhysicianName": "Doctor^A",
            "StudyDescription": "CT Chest",
            "SeriesNumber": 5,
            "Manufacturer": "Phantoms Ltd",
        },
    ),
}


def _made(folder: Path, shape: Shape) -> Made:
    """Objects of a series of this shape: each kind, in each SOP class."""
    folder.mkdir()
    chest = make_chest(folder / "ct", shape, [((-75.0, 45.0, 55.0), 30.0), ((70.0, 20.0, -50.0), 26.0)])
    header = chest.headers[0]
    # Other weights for each.
    models = tuple(replace(model, sha256=f"{shape.slices:02d}" * 32) for model in chest.findings.models)
    findings = replace(chest.findings, models=models)
    volume = replace(
        chest.volume,
        study_instance_uid=header.StudyInstanceUID,
        series_instance_uid=header.SeriesInstanceUID,
        frame_of_reference_uid=header.FrameOfReferenceUID,
    )
    moment = MOMENT + timedelta(hours=25 * len(chest.headers))
    profiles = [Profile(KINDS), Profile(("sr",), sr="comprehensive"), Profile(("infection-seg",), seg="labelmap")]
    built = makers.build(volume, outcome_of(volume, findings), chest.headers, folder, profiles, content_datetime=moment)
    objects = {one.path.stem: dcmread(one.path) for one in built}
    refused = makers.not_analysed(chest.headers, f"{folder.name} gap", folder, content_datetime=moment, subject=SUBJECT)
    outdated = [(str(one.SOPClassUID), str(one.SOPInstanceUID), str(one.SeriesInstanceUID)) for one in objects.values()]
    note = makers.rejection_note(header, outdated, folder, "note", moment)
    return Made(header, objects | {"not-analysed-sr": dcmread(refused[0].path), "rejection-note": dcmread(note.path)})


def _classes(objects: dict[str, Dataset]) -> str:
    """SOP classes, and our roles in them."""
    kinds: dict[str, list[str]] = {}
    for kind, dataset in objects.items():
        kinds.setdefault(str(dataset.SOPClassUID), []).append(kind.split("-with")[0])
    analysed = [(UID(uid).name, uid, "Storage SCP", "received, kept as sent, analysed") for uid in triage.CT_CLASSES]
    sent = [(_name(uid), uid, "Storage SCU; STOW-RS", "sent: " + ", ".join(made)) for uid, made in kinds.items()]
    services = [
        ("Verification", associations.VERIFICATION, "SCP, SCU", "SCU: `lungnode echo`"),
        (UID(commitment.PUSH_MODEL).name, commitment.PUSH_MODEL, "SCU", "`commitment` of a peer"),
        (series_count.QUERY_MODEL.name, series_count.QUERY_MODEL, "SCU", "`may: [count]` of a peer"),
        ("every other storage SOP class, private ones too", "", "Storage SCP", "received, kept as sent, not analysed"),
    ]
    return _rows(("SOP class", "UID", "role", "use"), [*sorted(analysed), *sorted(sent), *services])


def _name(uid: str) -> str:
    # Younger than pydicom's names.
    return "Label Map Segmentation Storage" if UID(uid).name == uid else UID(uid).name


def limits() -> str:
    told = [
        ("application context", "1.2.840.10008.3.1.1.1"),
        ("implementation class UID", identity.IMPLEMENTATION_CLASS_UID),
        ("implementation version name", identity.IMPLEMENTATION_VERSION_NAME),
        ("largest PDU received", f"{pdu.MAXIMUM_PDU} bytes"),
        ("largest PDU asked for when sending", f"{associations.MAX_PDU} bytes"),
        ("presentation contexts on an association that we open", f"{associations.MAX_CONTEXTS} at most"),
        ("wait for an association's request", f"{listener.ACSE_TIMEOUT_S:g} s"),
        ("wait for a connection, and for each answer", f"{associations.CONNECT_S:g} s, {associations.TIMEOUT_S:g} s"),
        ("asynchronous operations", "none: one at a time"),
    ]
    return _rows(("", "value"), told)


def _attributes(one: Made, other: Made, kind: str, common: set[BaseTag], *, among: bool) -> str:
    """Attributes of a kind of object, either those that are `among` the common ones or those that are not."""
    rows: list[tuple[str, ...]] = []
    for element in one.objects[kind]:
        if (element.tag in common) is among and element.tag in other.objects[kind]:
            rows.extend(_told([one.objects[kind]], [other.objects[kind]], element.tag, (one.header, other.header), ""))
    if among:
        rows = [_by_kind(row, one.objects) for row in rows]
    return _rows(("attribute", "tag", "VR", "value from", "value"), rows)


def _told(
    mine: Sequence[Dataset], theirs: Sequence[Dataset], tag: BaseTag, headers: tuple[Dataset, Dataset], indent: str
) -> Iterator[tuple[str, ...]]:
    """Rows of an attribute of all of some items: its own, and those of what its items hold where these say more."""
    here, there = (_distinct(item[tag] for item in items if tag in item) for items in (mine, theirs))
    keyword = keyword_for_tag(tag)
    name = f"{indent}{keyword}", f"({tag.group:04X},{tag.element:04X})", str(here[0].VR)
    if keyword in _OPENED:
        yield *name, "", ""
        inside = [[below for one in elements for below in one.value] for elements in (here, there)]
        for below in inside[0][0]:
            if below.tag in inside[1][0]:
                yield from _told(*inside, below.tag, headers, f"{indent}> ")
        return
    given = [[header[tag]] if tag in header else [] for header in headers]
    if given == [here, there] and here != there:
        yield *name, "source", ""
    elif here == there:
        yield *name, "fixed", _values(here)
    else:
        yield *name, "analysis", ""


def _distinct(elements: Iterable[DataElement]) -> list[DataElement]:
    """Each once, in their order."""
    found: list[DataElement] = []
    for element in elements:
        if element not in found:
            found.append(element)
    return found


def _by_kind(row: tuple[str, ...], objects: dict[str, Dataset]) -> tuple[str, ...]:
    """A row of what is common, with the values of all kinds where each has a fixed one of its own."""
    if row[3] != "fixed":
        return row
    told = _values(_distinct(dataset[row[0]] for dataset in objects.values()))
    return *row[:4], told or "by kind"


def _values(elements: Sequence[DataElement]) -> str:
    """Values, where they are short."""
    told = " / ".join(_value(element) for element in elements)
    return told if len(told) <= _SHORT and all(_value(element) for element in elements) else ""


def _value(element: DataElement) -> str:
    if element.is_empty:
        return "empty"
    if element.VR == "SQ":
        item = element.value[0]
        return _code(item) if "CodeValue" in item and len(element.value) == 1 else ""
    text = "\\".join(str(one) for one in element.value) if element.VM > 1 else str(element.value)
    return "" if element.VR in ("OB", "OW", "UN") else f"`{text}`"


def _code(item: Dataset) -> str:
    return f"({item.CodeValue}, {item.CodingSchemeDesignator}, {item.CodeMeaning})"


def _codes(objects: dict[str, Dataset]) -> str:
    """Every code that is written, and the objects that it is in."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for kind, dataset in objects.items():
        for item in _items(dataset):
            if "CodeValue" in item:
                code = str(item.CodingSchemeDesignator), str(item.CodeValue), str(item.CodeMeaning)
                found.setdefault(code, set()).add(kind)
    rows = (
        (scheme, value, meaning, "all" if kinds == set(objects) else ", ".join(sorted(kinds)))
        for (scheme, value, meaning), kinds in sorted(found.items())
    )
    return _rows(("scheme", "code", "meaning", "in"), rows)


def _items(dataset: Dataset) -> Iterator[Dataset]:
    """Every item of every sequence, at any depth."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield item
                yield from _items(item)


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
