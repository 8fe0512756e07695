"""One CT frame at a time: its header as plain values, its stored pixels as HU.

A frame is a whole instance of CT Image Storage, or one frame of an enhanced (multi-frame) instance, whose attributes
come from the shared and the per-frame functional groups (PS3.3 C.7.6.16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    LegacyConvertedEnhancedCTImageStorage,
)

from node.images.elements import HeaderError
from node.images.geometry import VolumeError
from node.images.received import ReceivedFile
from node.text import uid as uid_text

#: HU given to pixels that are declared as padding (PS3.3 C.7.5.1.1.2): the lowest value of an ordinary CT, as air.
PADDING_HU = -1024

_SINGLE_FRAME = (CTImageStorage,)
_MULTI_FRAME = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

# 12-bit JPEG: pydicom has a decoder for none of these without a GPL plugin; GDCM's own reader has. The last two
# (JPEG Spectral Selection 6 & 8, Full Progression 10 & 12) are retired and still lie in archives.
_TWELVE_BIT_JPEG = (JPEGExtended12Bit, UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55"))

# Pixels as they are (PS3.5 A.1, A.2), and the tag of Pixel Data in both.
_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
_PIXEL_DATA = b"\xe0\x7f\x10\x00"

_PIXEL_KEYWORDS = [
    "SOPInstanceUID",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
]
_HEADER_KEYWORDS = [
    *_PIXEL_KEYWORDS[:-2],
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ImageType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


@dataclass(frozen=True)
class Words:
    """Where 16-bit pixels lie in a file as they are, and what their bits mean."""

    #: Of the first pixel, bytes from the start of the file.
    offset: int
    signed: bool
    #: High bits of each word that are no part of the value.
    unused: int
    #: Lowest and highest stored value that is padding, inclusive, or None.
    padding: tuple[int, int] | None


@dataclass(frozen=True)
class Frame:
    """What the headers say about one frame; no pixels."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    #: 1-based frame number in a multi-frame instance, else None.
    number: int | None
    study_instance_uid: str
    series_instance_uid: str
    #: Empty where the instance lacks it.
    frame_of_reference_uid: str
    #: Rows, columns.
    matrix: tuple[int, int]
    #: Image Position (Patient), mm, LPS.
    position: tuple[float, float, float]
    #: Image Orientation (Patient): row cosines, column cosines.
    orientation: tuple[float, ...]
    #: Pixel Spacing, mm: between rows, between columns.
    pixel_spacing: tuple[float, float]
    #: Slice Thickness, mm, where it is given.
    thickness: float | None
    #: HU = slope * stored value + intercept.
    slope: float
    intercept: float
    #: How to read the pixels without parsing the file again; None where they must be decoded.
    words: Words | None = None


def read_frames(path: Path) -> list[Frame]:
    """Read the header of one file.

    Parameters
    ----------
    path
        A DICOM file of CT Image Storage, Enhanced or Legacy Converted Enhanced CT Image Storage.

    Returns
    -------
    list of Frame
        One, or one for each frame of a multi-frame instance, in the order of the file.

    Raises
    ------
    VolumeError
        Not a DICOM file, not a CT image, or without the attributes that place it in space and in HU.
    OSError
        The file cannot be opened.
    """
    with _received(path) as file:
        dataset = file.header(_HEADER_KEYWORDS)
        element = b"" if file.pixels_at is None else file.read(file.pixels_at, 12)
        offset = (file.pixels_at or 0) + len(element)
    uid = uid_text(dataset.get("SOPInstanceUID", ""))
    try:
        frames = _frames(path, dataset)
        if len(frames) == 1 and (words := _words(dataset, element, offset)):
            frames = [replace(frames[0], words=words)]
        return frames
    except VolumeError as error:
        raise VolumeError(f"SOP instance {uid}: {error}") from error.__cause__
    except Exception as error:
        # Whatever a malformed element makes the parser raise, its text may quote the element's value.
        raise VolumeError(f"SOP instance {uid}: unreadable header ({type(error).__name__})") from error


def decode_frames(path: Path, frames: Sequence[Frame]) -> Iterator[NDArray[np.int16]]:
    """Decode the pixels of one file to HU.

    Parameters
    ----------
    path
        The file.
    frames
        What `read_frames` returned for it.

    Yields
    ------
    ndarray
        int16 (rows, columns), clipped to the range of int16, declared padding as `PADDING_HU`; one a frame.

    Raises
    ------
    VolumeError
        Pixel Data missing, short, or undecodable.
    OSError
        The file cannot be read.
    """
    uid = uid_text(frames[0].sop_instance_uid)
    if words := frames[0].words:
        try:
            stored = _stored_words(path, frames[0].matrix, words)
        except ValueError as error:
            raise VolumeError(f"SOP instance {uid}: {error}") from None
        yield _to_hu(stored, frames[0], words.padding)
        return
    with _received(path) as file:
        dataset = file.header(_PIXEL_KEYWORDS)
        syntax = UID(file.transfer_syntax)
        try:
            dataset.update(file.pixels(dataset))
        except HeaderError as error:
            raise VolumeError(f"SOP instance {uid}: {error}") from error
    if not dataset.get("PixelData"):
        raise VolumeError(f"SOP instance {uid}: no Pixel Data")
    try:
        padding = _padding(dataset)
        for frame, stored in zip(frames, _stored_values(path, dataset, syntax), strict=True):
            if stored.shape != frame.matrix:
                raise ValueError("another matrix size in the pixel data")
            yield _to_hu(stored, frame, padding)
    except Exception as error:
        raise VolumeError(
            f"SOP instance {uid}: Pixel Data in {_named(syntax)} cannot be decoded ({type(error).__name__})"
        ) from error


@contextmanager
def _received(path: Path) -> Iterator[ReceivedFile]:
    try:
        with ReceivedFile(path) as file:
            yield file
    except InvalidDicomError as error:
        raise VolumeError("one of the files is not a DICOM file") from error
    except HeaderError as error:
        raise VolumeError(f"one of the files cannot be parsed as DICOM ({error})") from error


def _frames(path: Path, dataset: Dataset) -> list[Frame]:
    sop_class = UID(dataset.get("SOPClassUID", ""))
    if sop_class not in (*_SINGLE_FRAME, *_MULTI_FRAME):
        raise VolumeError(f"{_named(sop_class) if sop_class else 'no SOP class'} is not a CT image")
    if "LOCALIZER" in (dataset.get("ImageType") or []):
        raise VolumeError("a localizer is not part of a volume")
    if (samples := int(_require(dataset, "SamplesPerPixel"))) != 1:
        raise VolumeError(f"{samples} samples per pixel: not a grey-scale image")
    if _require(dataset, "HighBit") != _require(dataset, "BitsStored") - 1:
        raise VolumeError("High Bit is not Bits Stored - 1 (PS3.5 8.1.1)")

    if sop_class in _SINGLE_FRAME:
        return [_frame(path, dataset, None)]
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    per_frame = _require(dataset, "PerFrameFunctionalGroupsSequence")
    if len(per_frame) != int(dataset.get("NumberOfFrames") or 1):
        raise VolumeError("as many functional groups as frames are needed")
    return [_frame(path, dataset, number, groups, shared) for number, groups in enumerate(per_frame, 1)]


def _named(uid: UID) -> str:
    """The standard's name of a UID, else the UID itself."""
    return uid.name if uid.name != uid else uid_text(uid)


def _frame(path: Path, dataset: Dataset, number: int | None, *groups: Dataset) -> Frame:
    def macro(name: str) -> Dataset:
        """The item with this frame's attributes: per frame, else shared, else the dataset of a single frame."""
        if number is None:
            return dataset
        for group in groups:
            if sequence := group.get(name):
                return sequence[0]  # type: ignore[no-any-return]
        raise VolumeError(f"{name} is missing")

    measures, transformation = macro("PixelMeasuresSequence"), macro("PixelValueTransformationSequence")
    x, y, z = _numbers(macro("PlanePositionSequence"), "ImagePositionPatient", 3)
    between_rows, between_columns = _numbers(measures, "PixelSpacing", 2)
    (slope,) = _numbers(transformation, "RescaleSlope", 1)
    (intercept,) = _numbers(transformation, "RescaleIntercept", 1)
    if min(between_rows, between_columns) <= 0 or slope == 0:
        raise VolumeError("PixelSpacing or RescaleSlope is not usable")
    return Frame(
        path=path,
        sop_class_uid=str(dataset.SOPClassUID),
        sop_instance_uid=str(_require(dataset, "SOPInstanceUID")),
        number=number,
        study_instance_uid=str(_require(dataset, "StudyInstanceUID")),
        series_instance_uid=str(_require(dataset, "SeriesInstanceUID")),
        frame_of_reference_uid=str(dataset.get("FrameOfReferenceUID") or ""),
        matrix=(int(_require(dataset, "Rows")), int(_require(dataset, "Columns"))),
        position=(x, y, z),
        orientation=_numbers(macro("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        pixel_spacing=(between_rows, between_columns),
        thickness=_numbers(measures, "SliceThickness", 1)[0] if measures.get("SliceThickness") else None,
        slope=slope,
        intercept=intercept,
    )


def _require(dataset: Dataset, keyword: str) -> Any:
    value = dataset.get(keyword)
    if value is None or value == "":
        raise VolumeError(f"{keyword} is missing")
    return value


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """Finite numbers of a DS element, as many as the attribute has."""
    numbers = tuple(float(value) for value in np.atleast_1d(_require(dataset, keyword)))
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeError(f"{keyword} is not usable")
    return numbers


def _stored_values(path: Path, dataset: Dataset, syntax: UID) -> Iterator[NDArray[Any]]:
    """Stored values of each frame: unused bits dropped, sign extended."""
    if syntax in _TWELVE_BIT_JPEG:
        yield from _stored_values_by_gdcm(path, dataset)
        return
    # By index: without, pydicom 3.0 corrects the sign of JPEG-LS pixels in a read-only array, and fails.
    frames = range(int(dataset.get("NumberOfFrames") or 1))
    for stored, _ in get_decoder(syntax).iter_array(dataset, indices=frames, raw=True):
        yield stored


def _words(dataset: Dataset, element: bytes, end: int) -> Words | None:
    """Where the pixels of a single frame lie.

    Parameters
    ----------
    dataset
        The header.
    element
        The 12 bytes after the header: of Pixel Data, tag, VR and length with explicit VR, else tag, length and pixels
        (PS3.5 7.1).
    end
        Where they end in the file.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax not in _NATIVE or dataset.get("BitsAllocated") != 16 or element[:4] != _PIXEL_DATA:
        return None
    length, offset = (element[8:], end) if syntax == ExplicitVRLittleEndian else (element[4:8], end - 4)
    if int.from_bytes(length, "little") < 2 * int(dataset.Rows) * int(dataset.Columns):
        return None
    return Words(offset, dataset.PixelRepresentation == 1, 16 - int(dataset.BitsStored), _padding(dataset))


def _stored_words(path: Path, matrix: tuple[int, int], words: Words) -> NDArray[Any]:
    count = matrix[0] * matrix[1]
    values = np.empty(count, "<i2" if words.signed else "<u2")
    # Not by np.fromfile, to which a bad sector is the end of the file.
    with path.open("rb", buffering=0) as file:
        file.seek(words.offset)
        if file.readinto(values.data) < values.nbytes:
            raise ValueError("the file ends within its Pixel Data")
    if words.unused:
        # The shift back fills with zeros, or with the sign.
        values = (values << words.unused) >> words.unused
    return values.reshape(matrix)


def _stored_values_by_gdcm(path: Path, dataset: Dataset) -> NDArray[Any]:
    gdcm.Trace.WarningOff()  # it writes to standard error by itself, and may quote values
    gdcm.Trace.ErrorOff()
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        raise ValueError("GDCM cannot read the image")
    image = reader.GetImage()
    kind = "i" if image.GetPixelFormat().GetPixelRepresentation() else "u"
    depth = image.GetPixelFormat().GetBitsAllocated() // 8
    # GDCM hands bytes out as a str.
    values = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), f"{kind}{depth}")
    return values.reshape(-1, dataset.Rows, dataset.Columns)


def _padding(dataset: Dataset) -> tuple[int, int] | None:
    """Lowest and highest stored value that is padding, inclusive, or None."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    ends = [_as_stored(int(value), dataset) for value in (first, first if last is None else last)]
    return min(ends), max(ends)


def _as_stored(value: int, dataset: Dataset) -> int:
    """Padding in the signedness of the pixels; some scanners write -2000 as 63536."""
    span = 1 << int(dataset.BitsAllocated)
    value %= span
    return value - span if dataset.PixelRepresentation == 1 and value >= span // 2 else value


def _to_hu(stored: NDArray[Any], frame: Frame, padding: tuple[int, int] | None) -> NDArray[np.int16]:
    # MONOCHROME1 needs nothing: rescale comes before, and polarity only after, the value that is HU.
    limits = np.iinfo(np.int16)
    if frame.slope == 1 and frame.intercept.is_integer():
        low, high = int(stored.min()) + frame.intercept, int(stored.max()) + frame.intercept
        if limits.min <= low and high <= limits.max:
            # Both the values and what is added may pass 16 bits; their sum, which does not, wraps to what it is.
            hu: NDArray[np.int16] = stored.astype(np.int16)
            hu += np.int64(frame.intercept).astype(np.int16)
        else:
            hu = np.clip(stored.astype(np.int32) + int(frame.intercept), limits.min, limits.max).astype(np.int16)
    else:
        hu = np.clip(np.rint(stored * frame.slope + frame.intercept), limits.min, limits.max).astype(np.int16)
    if padding is not None:
        first, last = padding
        hu[(stored >= first) & (stored <= last)] = PADDING_HU
    return hu
