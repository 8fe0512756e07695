"""The gate before the wire: an object is read back from disk and held against what it was made from.

What does not pass is never sent: a wrong mask in an archive is worse than none. The checks are of what this package
promises and what readers were seen to stumble over; the whole standard is the matter of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, MultiFrameTrueColorSecondaryCaptureImageStorage

from node.images.volume import Volume
from node.methods.outcome import Segmentation
from node.results.making import Maker, Making
from node.results.provenance import Analysis
from node.results.segmentation import LABELMAP_STORAGE

#: Explicit VR gives the length of pixel data and documents in 32 bits (PS3.5 7.1.2); above this many bytes a file is
#: refused by archives long before.
MAXIMUM_BYTES = 2_000_000_000

#: Millimetres, and part of a cosine, by which geometry may differ: decimal strings are written with ten decimals.
_EXACT = 1e-4

#: Type 1 and type 2 attributes of the mandatory modules that all kinds have; each kind's own are in the table of kinds.
REQUIRED = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality SeriesNumber InstanceNumber"
PRESENT = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    "ReferringPhysicianName Manufacturer"
)


def problems(path: Path, kind: str, maker: Maker, analysis: Analysis, making: Making | None = None) -> list[str]:
    """What is wrong with the object in `path`, in a sentence each; empty when it may be sent.

    Parameters
    ----------
    path
        The file as it would be sent.
    kind, maker
        Its kind, and that kind's entry in the table.
    analysis
        What it belongs to.
    making
        What it was made from; None for an object that says why nothing was analysed.
    """
    if path.stat().st_size > MAXIMUM_BYTES:
        return [f"it has {path.stat().st_size / 1e9:.1f} GB, and archives take no more than {MAXIMUM_BYTES / 1e9:.0f}"]
    try:
        # Values above a megabyte stay on disk until they are asked for.
        with pydicom.dcmread(path, defer_size="1 MB") as made:
            checks = _attributes(made, maker), _identity(made, analysis), maker.check(made, kind, analysis, making)
            return list(chain.from_iterable(checks))
    except Exception as error:
        # The text of an error may quote a value, and a value may be the patient's.
        return [f"it cannot be read back ({type(error).__name__})"]


def segmentation(made: Dataset, kind: str, _analysis: Analysis, making: Making | None) -> Iterator[str]:
    """Check a segmentation: it lies on the source's grid, and holds every voxel that was found and no other."""
    if making is not None:
        yield from _geometry(made, making.volume)
        yield from _segments(made, making.volume, making.segmentation(kind))


def report(made: Dataset, _kind: str, analysis: Analysis, making: Making | None) -> Iterator[str]:
    """Check a report: its references, and its measurement groups."""
    yield from _references(made, analysis)
    if making is not None:
        yield from _groups(made, making.volume)


def capture(made: Dataset, _kind: str, _analysis: Analysis, _making: Making | None) -> Iterator[str]:
    """Check a capture: every page is there, and none is blank."""
    if made.SOPClassUID != MultiFrameTrueColorSecondaryCaptureImageStorage:
        yield "it is no colour capture"
    expected = int(made.NumberOfFrames) * made.Rows * made.Columns * 3
    pixels = np.frombuffer(made.PixelData, np.uint8)
    if pixels.size not in (expected, expected + expected % 2):
        yield f"it has {pixels.size} bytes of pixels, not {expected}"
        return
    # The title or the place is written at the top of each page: one of a single colour was not drawn.
    pages = pixels[:expected].reshape(int(made.NumberOfFrames), -1)
    if any(page[: len(page) // 8].max() == page[: len(page) // 8].min() for page in pages):
        yield "a page is blank"


def pdf(made: Dataset, _kind: str, _analysis: Analysis, _making: Making | None) -> Iterator[str]:
    """Check a PDF: the document is whole."""
    document = bytes(made.EncapsulatedDocument)
    if not document.startswith(b"%PDF-") or b"%%EOF" not in document[-16:]:
        yield "it holds no whole PDF"


def _attributes(made: Dataset, maker: Maker) -> Iterator[str]:
    for keyword in f"{REQUIRED} {maker.required}".split():
        if keyword not in made or made[keyword].is_empty:
            yield f"{keyword} has no value"
    for keyword in f"{PRESENT} {maker.present}".split():
        if keyword not in made:
            yield f"{keyword} is missing"


def _identity(made: Dataset, analysis: Analysis) -> Iterator[str]:
    header = analysis.header
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        if str(made.get(keyword) or "") != str(header.get(keyword) or ""):
            yield f"{keyword} is not the source's"
    if made.SeriesInstanceUID == header.get("SeriesInstanceUID"):
        yield "it lies in the source's own series"
    # Not the study's: that is the source's, and not ours to correct.
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        if not UID(made[keyword].value).is_valid:
            yield f"{keyword} is no valid UID"
    if made.file_meta.MediaStorageSOPInstanceUID != made.SOPInstanceUID:
        yield "the file header names another instance"
    if made.file_meta.MediaStorageSOPClassUID != made.SOPClassUID:
        yield "the file header names another SOP class"
    purposes = [
        item.PurposeOfReferenceCodeSequence[0].CodeValue for item in made.get("ContributingEquipmentSequence", [])
    ]
    if "109102" not in purposes:
        yield "it does not say what made it"


def _geometry(made: Dataset, volume: Volume) -> Iterator[str]:
    """A segmentation lies on the source's grid, each frame on the slice that it names."""
    if made.FrameOfReferenceUID != volume.frame_of_reference_uid:
        yield "its frame of reference is not the source's"
    if (made.Rows, made.Columns) != volume.hu.shape[1:]:
        yield f"its frames have {made.Rows} x {made.Columns} pixels, the source {volume.hu.shape[1:]}"
    first, shared = made.PerFrameFunctionalGroupsSequence[0], made.SharedFunctionalGroupsSequence[0]
    axes = (volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)).T.ravel()
    if not np.allclose(
        _floats(_macro(first, shared, "PlaneOrientationSequence").ImageOrientationPatient), axes, atol=_EXACT
    ):
        yield "its orientation is not the source's"
    if not np.allclose(
        _floats(_macro(first, shared, "PixelMeasuresSequence").PixelSpacing), volume.spacing[1:], rtol=_EXACT
    ):
        yield "its pixel spacing is not the source's"
    named = {item.ReferencedSOPInstanceUID for item in made.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    if named != {source.sop_instance_uid for source in volume.sources}:
        yield "its referenced series is not the source's instances"


def _segments(made: Dataset, volume: Volume, found: Segmentation) -> Iterator[str]:
    """Numbers without gaps, no empty segment, no frame in the wrong place, every voxel that was found and no other."""
    numbers = [int(item.SegmentNumber) for item in made.SegmentSequence]
    if numbers != [segment.number for segment in found.segments] or numbers != list(range(1, len(numbers) + 1)):
        yield f"its segments are numbered {numbers}, not from 1 without a gap"
        return
    place = {(source.sop_instance_uid, source.frame): k for k, source in enumerate(volume.sources)}
    wanted = found.labels
    painted = np.zeros(len(numbers) + 1, np.int64)
    frames = _frames(made)
    shared = made.SharedFunctionalGroupsSequence[0]
    for group in made.PerFrameFunctionalGroupsSequence:
        frame = next(frames)
        (source,) = _macro(group, shared, "DerivationImageSequence").SourceImageSequence
        number = source.get("ReferencedFrameNumber")
        k = place.get((source.ReferencedSOPInstanceUID, None if number is None else int(number)))
        if k is None:
            yield "a frame names a slice that is not of the source"
            return
        position = _floats(_macro(group, shared, "PlanePositionSequence").ImagePositionPatient)
        if not np.allclose(position, volume.sources[k].position, atol=_EXACT):
            yield "a frame does not lie on the slice that it names"
            return
        if made.SOPClassUID == LABELMAP_STORAGE:
            here = wanted[k]
            painted += [np.count_nonzero(here == number) for number in range(len(painted))]
        else:
            number = int(_macro(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            here = wanted[k] == number
            painted[number] += np.count_nonzero(here)
        if not np.array_equal(frame, here):
            yield "a frame differs from what was found on its slice"
            return
    for number in numbers:
        there = sum(np.count_nonzero(plane == number) for plane in wanted)
        if there == 0:
            yield f"segment {number} is empty"
        elif painted[number] != there:
            yield f"segment {number} lacks {there - painted[number]} voxels"


def _macro(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """A functional group macro of a frame: its own, or what all frames share (PS3.3 C.7.6.16)."""
    item: Dataset = (frame.get(keyword) or shared[keyword].value)[0]
    return item


def _frames(made: Dataset) -> Iterator[NDArray[Any]]:
    """Frames of a BINARY (PS3.5 8.1.1: bits, the first lowest, frames not padded) or LABELMAP segmentation."""
    shape, size = (made.Rows, made.Columns), made.Rows * made.Columns
    stored = np.frombuffer(made.PixelData, np.uint8)
    for n in range(int(made.NumberOfFrames)):
        if made.BitsAllocated == 8:
            yield stored[n * size : (n + 1) * size].reshape(shape)
        else:
            first = n * size // 8
            bits = np.unpackbits(stored[first : -(-(n + 1) * size // 8)], bitorder="little")
            yield bits[n * size - 8 * first :][:size].reshape(shape).astype(bool)


def _references(made: Dataset, analysis: Analysis) -> Iterator[str]:
    """Everything that a report refers to is among its evidence, and all sources are."""
    evidence = {
        item.ReferencedSOPInstanceUID
        for study in made.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    if not {source.sop_instance_uid for source in analysis.instances} <= evidence:
        yield "its evidence lacks instances of the source"
    used = {
        reference.ReferencedSOPInstanceUID
        for item in _walk(made)
        if item.get("ValueType") == "IMAGE"
        for reference in item.ReferencedSOPSequence
    }
    if not used <= evidence:
        yield "it refers to an instance that is not among its evidence"


def _groups(made: Dataset, volume: Volume) -> Iterator[str]:
    """Every measurement group is tracked, measured, and outlined on a source slice (OHIF stops at one that is not)."""
    sources = {source.sop_instance_uid for source in volume.sources}
    rows, columns = volume.hu.shape[1:]
    for group in _walk(made):
        if group.get("ValueType") != "CONTAINER" or _concept(group) != "125007":  # Measurement Group
            continue
        children = list(group.get("ContentSequence", []))
        kinds = [child.ValueType for child in children]
        if "SCOORD" not in kinds or "NUM" not in kinds:
            yield "a measurement group has no outline or no measurement"
        if not {"112039", "112040"} <= {_concept(child) for child in children}:  # Tracking Identifier and UID
            yield "a measurement group has no tracking identifier"
        for child in children:
            if child.ValueType == "NUM" and not math.isfinite(
                float(child.MeasuredValueSequence[0].NumericValue if child.MeasuredValueSequence else "nan")
            ):
                yield "a measurement is no number"
            if child.ValueType == "SCOORD":
                points = np.reshape(_floats(child.GraphicData), (-1, 2))
                inside = (points >= 0).all() and (points <= (columns, rows)).all()
                if not inside or len(points) < 4 or not np.array_equal(points[0], points[-1]):
                    yield "an outline is not closed, or leaves its slice"
                (image,) = child.ContentSequence
                if image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID not in sources:
                    yield "an outline lies on an image that is not of the source"


def _walk(item: Dataset) -> Iterator[Dataset]:
    yield item
    for child in item.get("ContentSequence", []):
        yield from _walk(child)


def _concept(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence")
    return str(names[0].CodeValue) if names else ""


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]
