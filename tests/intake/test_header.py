"""The header walk, against pydicom on whole data sets and against itself on broken ones."""

from __future__ import annotations

import math
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_instances import AXIAL, SERIES, STUDY, dataset, encoded
from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from node import text
from node.images import elements
from node.images.elements import HeaderError
from node.intake import header as header_module
from node.intake.header import InstanceHeader, read_header

NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


@st.composite
def nested(draw: st.DrawFn, depth: int = 3) -> Dataset:
    """A data set with private elements and sequences within sequences, of defined and undefined length."""
    ds = Dataset()
    ds.add_new(0x00091001, "LO", draw(st.text("ABC^ ", max_size=9)))
    ds.add_new(0x00091002, "OB", draw(st.binary(max_size=5).map(lambda b: b + bytes(len(b) % 2))))
    if depth and draw(st.booleans()):
        ds.ReferencedImageSequence = Sequence(draw(st.lists(nested(depth - 1), max_size=2)))
        ds["ReferencedImageSequence"].is_undefined_length = draw(st.booleans())
        for item in ds.ReferencedImageSequence:
            item.is_undefined_length_sequence_item = draw(st.booleans())
    return ds


@given(
    nested(),
    st.sampled_from(NATIVE),
    st.lists(st.floats(-999, 999).map(lambda x: round(x, 3)), min_size=3, max_size=3),
    st.integers(1, 60_000),
)
def test_reads_what_pydicom_wrote(around: Dataset, transfer_syntax: UID, position: list[float], rows: int) -> None:
    ds = dataset(4)
    ds.update(around)
    ds.ImagePositionPatient, ds.Rows = position, rows
    assert read_header(encoded(ds, transfer_syntax), transfer_syntax) == InstanceHeader(
        study_instance_uid=STUDY,
        series_instance_uid=SERIES,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"{SERIES}.5",
        modality="CT",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        body_part="CHEST",
        instance_number=5,
        rows=rows,
        columns=32,
        pixel_spacing=(0.7, 0.7),
        slice_thickness=1.0,
        orientation=AXIAL,
        positions=(tuple(position),),  # type: ignore[arg-type]
    )


@given(st.data(), st.sampled_from(NATIVE))
def test_broken_bytes_raise_nothing_but_header_errors_without_patient_data(data: st.DataObject, ts: UID) -> None:
    whole = bytearray(encoded(dataset(0), ts))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 700)))] = data.draw(st.integers(0, 255))
    said = ""
    try:
        read_header(whole[: data.draw(st.integers(0, len(whole)))], ts)
    except HeaderError as error:
        said = str(error)
    assert "SECRET" not in said


@given(st.data(), nested(), st.sampled_from(NATIVE))
def test_first_bytes_say_what_the_whole_says_or_nothing(data: st.DataObject, around: Dataset, ts: UID) -> None:
    ds = dataset(0)
    ds.update(around)
    whole = bytearray(encoded(ds, ts))
    for _ in range(data.draw(st.integers(0, 2))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for _ in range(20):
        first = whole[: data.draw(st.integers(0, len(whole)))]
        try:
            found = read_header(first, ts, size=len(whole))
        except HeaderError:
            continue
        assert found == read_header(whole, ts)


@pytest.mark.parametrize("transfer_syntax", NATIVE[:3])
def test_first_bytes_up_to_the_pixels_are_enough(transfer_syntax: UID) -> None:
    whole = encoded(dataset(0, size=64), transfer_syntax)
    assert read_header(whole[:-8000], transfer_syntax, size=len(whole)) == read_header(whole, transfer_syntax)
    with pytest.raises(HeaderError, match="ends within its pixel data"):
        read_header(whole[:-8000], transfer_syntax, size=len(whole) - 1)


@given(st.binary(max_size=400), st.sampled_from(NATIVE))
def test_bytes_that_are_no_dicom_are_refused(junk: bytes, transfer_syntax: UID) -> None:
    with pytest.raises(HeaderError):
        read_header(junk, transfer_syntax)


@pytest.mark.parametrize("transfer_syntax", NATIVE[:3])
def test_a_data_set_cut_within_its_pixels_is_refused(transfer_syntax: UID) -> None:
    whole = encoded(dataset(0), transfer_syntax)
    with pytest.raises(HeaderError, match="ends within its pixel data"):
        read_header(whole[:-1], transfer_syntax)


def test_deep_nesting_costs_no_stack() -> None:
    item, sequence = b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
    with pytest.raises(HeaderError, match="within a sequence"):
        read_header((sequence + item) * 100_000, ExplicitVRLittleEndian)


def test_a_deflate_bomb_is_inflated_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "INFLATE_LIMIT", 1 << 20)
    ds = dataset(0)
    ds.PixelData = bytes(8 << 20)
    packed = encoded(ds, DeflatedExplicitVRLittleEndian)
    assert len(packed) < 20_000
    assert read_header(packed, DeflatedExplicitVRLittleEndian).sop_instance_uid == ds.SOPInstanceUID
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    with pytest.raises(HeaderError):
        read_header(deflate.compress(bytes(8 << 20)) + deflate.flush(), DeflatedExplicitVRLittleEndian)


@pytest.mark.parametrize("ts", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("undefined", [False, True])
def test_an_enhanced_image_has_the_place_of_each_frame(ts: UID, undefined: bool) -> None:
    ds = dataset(0)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "PixelSpacing"):
        delattr(ds, keyword)
    ds.NumberOfFrames, shared, frames = 3, Dataset(), []
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.6], 2.5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    for n in range(3):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, 2.5 * n]
        frame.PlanePositionSequence = Sequence([place])
        frame.is_undefined_length_sequence_item = undefined
        frames.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(frames)
    ds["PerFrameFunctionalGroupsSequence"].is_undefined_length = undefined
    found = read_header(encoded(ds, ts), ts)
    assert found.positions == ((0, 0, 0), (0, 0, 2.5), (0, 0, 5))
    assert (found.orientation, found.pixel_spacing, found.slice_thickness) == (AXIAL, (0.5, 0.6), 2.5)


@pytest.mark.parametrize("limit", ["MOST_FRAMES", "BYTES_A_FRAME"])
def test_places_of_more_frames_than_any_image_has_are_not_kept(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """They stay in memory while the series is open, and take more than they took to send."""
    ds = dataset(0)
    place = Dataset()
    place.PlanePositionSequence = Sequence([Dataset()])
    place.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
    ds.NumberOfFrames, ds.PerFrameFunctionalGroupsSequence = 40, Sequence([place] * 40)
    ds.PixelData = bytes(40 * header_module.BYTES_A_FRAME)
    raw = encoded(ds)
    assert len(read_header(raw, ExplicitVRLittleEndian).positions) == 40
    monkeypatch.setattr(header_module, limit, {"MOST_FRAMES": 39, "BYTES_A_FRAME": len(raw)}[limit])
    assert read_header(raw, ExplicitVRLittleEndian).positions == ()


def test_few_values_of_the_image_type_are_kept() -> None:
    ds = dataset(0)
    ds.ImageType = ["A"] * 500
    assert len(read_header(encoded(ds), ExplicitVRLittleEndian).image_type) == 16


def part_10_files(folder: Path) -> Iterator[tuple[Path, Dataset, bytes, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.open("rb").read(132)[128:] == b"DICM":
            meta = read_file_meta_info(path)
            if "TransferSyntaxUID" in meta:
                raw = path.read_bytes()
                with BytesIO(raw) as file:
                    ds = dcmread(file, stop_before_pixels=True)
                start = 144 + meta.get("FileMetaInformationGroupLength", -144)
                if start:
                    yield path, ds, raw[start:], str(meta.TransferSyntaxUID)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_pydicom_on_every_kind_of_object(data_dir: Path) -> None:
    agreed = 0
    for path, ds, raw, transfer_syntax in part_10_files(data_dir / "dicom-zoo"):
        uids = [str(ds.get(k, "")) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")]
        if not all(map(text.UID.match, uids)) or "truncated" in path.name:
            with pytest.raises(HeaderError):
                read_header(raw, transfer_syntax)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read_header(raw, transfer_syntax)
        theirs = [*uids, ds.get("Modality") or "", ds.get("Rows"), ds.get("Columns"), ds.get("BodyPartExamined") or ""]
        ours = [found.study_instance_uid, found.series_instance_uid, found.sop_class_uid, found.sop_instance_uid]
        assert [*ours, found.modality, found.rows, found.columns, found.body_part] == theirs, path
        if found.number_of_frames == 1 and ds.get("ImagePositionPatient"):
            assert all(map(math.isclose, found.positions[0], ds.ImagePositionPatient)), path
        agreed += 1
    assert agreed > 240


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({"AcquisitionDateTime": "00010102000001.5+0100", "AcquisitionTime": "230000"}, 2 * 86400 + 1.5),
        ({"AcquisitionDate": "00010101", "AcquisitionTime": "235959.25"}, 2 * 86400 - 0.75),
        ({"AcquisitionDate": "00010102", "AcquisitionTime": "0000"}, 2 * 86400),
        ({"AcquisitionTime": "01"}, 86400 + 3600),
        ({"AcquisitionDate": "00010101"}, None),
        ({"AcquisitionDate": "20261399", "AcquisitionTime": "120000"}, None),
        ({}, None),
    ],
)
def test_when_an_image_was_acquired(values: dict[str, str], seconds: float | None) -> None:
    ds = dataset(1)
    with warnings.catch_warnings(action="ignore"):  # one is no date
        for keyword, value in values.items():
            setattr(ds, keyword, value)
        raw = encoded(ds)
    assert read_header(raw, ExplicitVRLittleEndian).acquired_at == seconds


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("size", [0, 2_000, 5_000_000])
def test_texts_of_a_header_are_printable_and_no_longer_than_their_vr(transfer_syntax: UID, size: int) -> None:
    ds = dataset(1)
    hostile = "\x1b[2K\r\n\x7f" + "A" * size
    for keyword in (
        "Modality",
        "BodyPartExamined",
        "ImageType",
        "ConvolutionKernel",
        "InstanceNumber",
        "GantryDetectorTilt",
    ):
        # UT: the VR that holds any length; the walk goes by the tag.
        ds.add_new(keyword, "UT", hostile)
    found = read_header(encoded(ds, transfer_syntax), transfer_syntax)
    # What is longer than any text counts as absent.
    assert found.modality == {0: "?[2K???", 2_000: "?[2K???AAAAAA..."}.get(size, "")
    for value, most in ((found.body_part, 64), ("".join(found.image_type), 1024), (found.kernel, 1024)):
        assert value.isprintable()
        assert (len(value) == 0) == (size > 2_000)
        assert len(value) <= most
    assert (found.instance_number, found.gantry_tilt) == (None, None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, as it writes them
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize("value", ["1.2.x", "../../etc", "1" * 65, "1.2\x1b[2K", "1..2"])
def test_what_becomes_an_identity_is_a_uid(keyword: str, value: str) -> None:
    ds = dataset(1)
    ds.add_new(keyword, "UT", value)
    with pytest.raises(HeaderError, match="a UID is not digits and dots") as caught:
        read_header(encoded(ds), ExplicitVRLittleEndian)
    assert value not in str(caught.value)


@pytest.mark.parametrize(("number", "read"), [("2147483647", 2147483647), ("1e300", None), ("1" * 40, None)])
def test_an_integer_has_32_bits(number: str, read: int | None) -> None:
    ds = dataset(1)
    ds.add_new("InstanceNumber", "UT", number)
    assert read_header(encoded(ds), ExplicitVRLittleEndian).instance_number == read


def frame_groups(n: int, elements: int, undefined: bool) -> bytes:
    """The functional groups of frame `n`: its place, and so many elements in sequences of five beside it."""

    def sequence(tag: int, inner: bytes) -> bytes:
        group, element = tag >> 16, tag & 0xFFFF
        if not undefined:
            item = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
            return struct.pack("<HH2sHL", group, element, b"SQ", 0, len(item)) + item
        item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
        start = struct.pack("<HH2sHL", group, element, b"SQ", 0, 0xFFFFFFFF)
        return start + item + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)

    place = f"0\\0\\{n}".encode().ljust(12)
    plane = sequence(0x00209113, struct.pack("<HH2sH", 0x20, 0x32, b"DS", len(place)) + place)
    five = b"".join(struct.pack("<HH2sH", 0x21, 0x1000 + k, b"SH", 8) + b"12345678" for k in range(5))
    inner = plane + sequence(0x00211010, five) * (elements // 7)
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("ts", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_an_enhanced_image_of_very_many_frames_is_read_whole(ts: UID, undefined: bool) -> None:
    ds, frames = dataset(0), 2500
    ds.NumberOfFrames = frames
    del ds.PixelData
    groups = b"".join(frame_groups(n, 100, undefined) for n in range(frames))
    start = struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, len(groups))
    # Little more than half of an image of 64 x 64 is left when it is deflated.
    noise = np.random.default_rng(1).bytes(frames * 4096)
    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, 2 * len(noise)) + noise + bytes(len(noise))
    raw = encoded(ds) + start + groups + pixels
    if ts == DeflatedExplicitVRLittleEndian:
        stream = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
        raw = stream.compress(raw) + stream.flush()
    found = read_header(raw, ts)
    assert found.number_of_frames == frames
    assert [z for _, _, z in found.positions] == list(range(frames))


@pytest.mark.parametrize("ts", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("what", ["items", "places", "tiny", "nested", "text"])
def test_a_header_costs_no_more_time_than_its_bytes_are_worth(
    ts: UID, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elements, "MOST_ELEMENTS", 30_000)
    ds, size = dataset(0), 24 << 20
    del ds.PixelData
    one = {
        "items": struct.pack("<HHL", 0xFFFE, 0xE000, 0),
        "places": frame_groups(0, 0, False),
        "tiny": struct.pack("<HH2sH", 0x5201, 0x1010, b"LO", 0),
        "nested": struct.pack("<HH2sHLHHL", 0x5201, 0x1010, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF),
        "text": b" " * 16,
    }[what]
    ds.NumberOfFrames = size // len(one)
    start = {
        "items": struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, size // len(one) * len(one)),
        "places": struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, size // len(one) * len(one)),
        "text": struct.pack("<HH2sHL", 0x0018, 0x1210, b"UT", 0, size),
    }.get(what, b"")
    raw = encoded(ds) + start + one * (size // len(one))
    if ts == DeflatedExplicitVRLittleEndian:
        stream = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
        raw = stream.compress(raw) + stream.flush()
        assert len(raw) < 200_000
    visited: list[elements.Walk] = []
    made = elements.Walk.__init__

    def remembered(walk: elements.Walk, *arguments: Any) -> None:
        made(walk, *arguments)
        visited.append(walk)

    monkeypatch.setattr(elements.Walk, "__init__", remembered)
    tracemalloc.start()
    try:
        if what in ("tiny", "nested"):
            with pytest.raises(HeaderError, match="than are read of any"):
                read_header(raw, ts)
        else:
            found = read_header(raw, ts)
            assert (found.positions, found.kernel) == ((), "")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert visited[0].left >= -1
    assert peak < 8 << 20


def test_a_small_deflated_data_set_may_have_few_elements_and_a_large_one_many() -> None:
    few, many = (elements.Walk(memoryview(b""), "little", True, 0, sent).left for sent in (200_000, 60 << 20))
    assert few < 160_000
    assert many > 4_000_000
