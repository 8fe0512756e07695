"""Headers of received files: as pydicom reads them, and under limits whatever the file holds."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import pytest
from made_instances import dataset, encoded, save
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from node.cli.folder import closed_folder
from node.images import elements, received
from node.images import volume as volume_module
from node.images.elements import HeaderError, TooLargeError
from node.images.frames import decode_frames, read_frames
from node.images.headers import first_header
from node.images.received import ReceivedFile, read_received
from node.images.volume import VolumeError, read_volume
from node.intake.file_meta import file_meta

MB = 1 << 20
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def sequence(depth: int) -> Sequence:
    inner = Dataset()
    inner.CodeMeaning = "innermost"
    for _ in range(depth - 1):
        outer = Dataset()
        outer.ContentSequence = Sequence([inner])
        inner = outer
    return Sequence([inner])


def written(path: Path, raw: bytes, syntax: UID = ExplicitVRLittleEndian) -> Path:
    meta = file_meta("1.2.840.10008.5.1.4.1.1.2", "1.2.3", syntax, "CT1", "LUNGNODE")
    path.write_bytes(meta + raw)
    return path


def deflated(raw: bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(raw) + stream.flush()


def image(rows: int = 32, frames: int = 1, **changes: object) -> Dataset:
    """A CT image that an analysis would read."""
    ds = dataset(0, size=rows)
    ds.RescaleSlope, ds.RescaleIntercept, ds.FrameOfReferenceUID = "1", "-1024", "1.2.9"
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_read_is_what_pydicom_reads_without_the_large(tmp_path: Path, syntax: UID) -> None:
    ds = dataset(0)
    ds.ContentSequence, ds.RequestAttributesSequence = sequence(200), sequence(5)
    ds["RequestAttributesSequence"].is_undefined_length = True
    ds.add_new(0x00091010, "OB", bytes(MB))
    ds.ReferencedImageSequence = Sequence([Dataset()] * 60_000)
    path = save(ds, tmp_path / "1.dcm", syntax)
    found, theirs = read_received(path), dcmread(path, stop_before_pixels=True)
    assert theirs.keys() - found.keys() == {0x00091010, 0x00081140, 0x0040A730}
    assert all(one == theirs[one.tag] for one in found)
    assert found.file_meta == theirs.file_meta
    assert read_received(path, ["PatientName"]).keys() == {0x00100010}


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_real_headers_are_read_as_by_pydicom(data_dir: Path) -> None:
    agreed = 0
    for path in sorted((data_dir / "dicom-zoo").rglob("*")):
        if path.is_file() and path.open("rb").read(132)[128:] == b"DICM" and "truncated" not in path.name:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs, found = dcmread(path, stop_before_pixels=True), read_received(path)
                left_out = {tag for tag in theirs.keys() - found.keys() if tag >> 16 != 2}
                assert left_out <= {0x52009229, 0x52009230}, path
                assert all(one == theirs[one.tag] for one in found), path
            agreed += 1
    assert agreed > 240


@pytest.mark.parametrize("what", ["private", "zeros", "items", "text"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_large_file_costs_no_more_memory_than_a_header(tmp_path: Path, what: str, packed: bool) -> None:
    head, size = encoded(image()), 200 * MB
    head = head[: head.rindex(struct.pack("<HH", 0x7FE0, 0x10))]
    tag, vr = {"private": (0x52011010, b"OB"), "zeros": (0x7FE00010, b"OW"), "items": (0x52011010, b"SQ")}.get(
        what, (0x00080060, b"UT")
    )
    start = struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, size)
    if what == "text":  # where the modality should be
        at = head.index(struct.pack("<HH", 0x0008, 0x0060))
        head, tail = head[:at], head[at + 10 :]
    else:
        tail = b""
    path = tmp_path / "1.dcm"
    if packed:
        stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        block = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * (MB // 8) if what == "items" else bytes(MB)
        pieces = [stream.compress(head + start), *(stream.compress(block) for _ in range(200)), stream.compress(tail)]
        written(path, b"".join(pieces) + stream.flush(), DeflatedExplicitVRLittleEndian)
    else:
        written(path, head + start)
        with path.open("r+b") as file:  # a hole, which reads as zeros
            file.seek(0, os.SEEK_END)
            file.truncate(file.tell() + size)
            file.seek(0, os.SEEK_END)
            file.write(tail)
    tracemalloc.start()
    try:
        header = first_header([path])
        assert packed or header.StudyInstanceUID
        closed_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 16 * MB  # what is inflated is mapped, and bounded by itself
    finally:
        tracemalloc.stop()


def test_no_more_is_inflated_than_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = []
    inflate = elements.inflate
    monkeypatch.setattr(received, "inflate", lambda *a: [made := inflate(*a), sizes.append(len(made[0]))][0])
    path = written(tmp_path / "1.dcm", deflated(encoded(image()) + bytes(100 * MB)), DeflatedExplicitVRLittleEndian)
    read_received(path)
    assert sizes == [MB]


def test_functional_groups_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "MOST_GROUP_ELEMENTS", 1000)
    ds = image()
    for count, refused in ((400, False), (1100, True)):
        ds.PerFrameFunctionalGroupsSequence = Sequence([Dataset()] * count)
        path = save(ds, tmp_path / "1.dcm")
        with ReceivedFile(path) as file:
            if refused:
                with pytest.raises(TooLargeError, match="functional groups"):
                    file.header(["PerFrameFunctionalGroupsSequence"])
            else:
                assert len(file.header(["PerFrameFunctionalGroupsSequence"])[0x52009230].value) == count
        assert 0x52009230 not in read_received(path)


@pytest.mark.parametrize("syntax", SYNTAXES[:2] + SYNTAXES[3:])
@pytest.mark.parametrize("allocated", [8, 16])
def test_pixels_are_read_as_far_as_the_header_accounts_for_them(tmp_path: Path, syntax: UID, allocated: int) -> None:
    ds = image(rows=64)
    ds.BitsAllocated = allocated
    ds.BitsStored, ds.HighBit = (8, 7) if allocated == 8 else (12, 11)
    ds.PixelData = bytes(64 * 64 * allocated // 8)
    path = save(ds, tmp_path / "1.dcm", syntax)
    (frame,) = read_frames(path)
    (hu,) = decode_frames(path, [frame])
    assert hu.shape == (64, 64)
    ds.PixelData = bytes(4 * MB)
    path = save(ds, tmp_path / "2.dcm", syntax)
    (frame,) = read_frames(path)
    if frame.words is None:  # else it is read by its offset, and no more than is wanted
        with pytest.raises(VolumeError, match="its pixel data takes 4 MB, and its header accounts for 1 MB at most"):
            list(decode_frames(path, [frame]))


def many_items(count: int) -> bytes:
    """The value of a sequence of undefined length with empty items."""
    return struct.pack("<HHL", 0xFFFE, 0xE000, 0) * count + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


def explicit(tag: int, vr: bytes, length: int, value: bytes = b"") -> bytes:
    """An element with a length of 32 bits."""
    return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, length) + value


#: A sequence that pydicom finds at the place of another element's length: the bytes before it are a tag.
HIDDEN = b"SQ\0\0\xff\xff\xff\xff" + many_items(5000)


@pytest.mark.parametrize(
    "element",
    [
        # A VR of none of ours has a length of 32 bits (PS3.5 7.1.2); pydicom takes 16.
        explicit(0x00210011, b"ZZ", len(HIDDEN), HIDDEN),
        # No VR but a length, which is 0xFF41; pydicom takes a VR, and a length of 0.
        struct.pack("<HH2sH", 0x0021, 0x0011, b"A\xff", 0) + (b"\x21\0\x13\0" + HIDDEN).ljust(0xFF41, b"\0"),
    ],
)
def test_pydicom_gets_no_further_than_was_counted(tmp_path: Path, element: bytes) -> None:
    """A value may look like one element here, and like thousands of items there."""
    path = written(tmp_path / "1.dcm", encoded(dataset(0))[: -len(pixel_data())] + element + pixel_data())
    with pytest.raises(TooLargeError, match="more elements than were counted"):
        read_received(path)


def pixel_data() -> bytes:
    """The last element of a `dataset`, encoded."""
    raw = encoded(dataset(0))
    return raw[raw.rindex(struct.pack("<HH", 0x7FE0, 0x0010)) :]


@pytest.mark.parametrize("vr", [b"SQ", b"UN"])
def test_pixel_data_is_no_sequence(tmp_path: Path, vr: bytes) -> None:
    ds = image(rows=512)
    raw = encoded(ds)
    raw = raw[: raw.rindex(struct.pack("<HH", 0x7FE0, 0x0010))]
    items = explicit(0x7FE00010, vr, 0xFFFFFFFF, many_items(5000))
    path = written(tmp_path / "1.dcm", raw + items)
    with ReceivedFile(path) as file, pytest.raises(TooLargeError, match="more elements than were counted"):
        file.pixels(file.header())


def test_what_follows_the_pixels_is_not_inflated(tmp_path: Path) -> None:
    path = written(tmp_path / "1.dcm", deflated(encoded(image()) + bytes(300 * MB)), DeflatedExplicitVRLittleEndian)
    (frame,) = read_frames(path)
    (hu,) = decode_frames(path, [frame])
    assert hu.max() == -1024


def test_a_volume_larger_than_any_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for n in range(3):
        ds = image(rows=16, SOPInstanceUID=f"1.2.{n}", ImagePositionPatient=[0, 0, n])
        paths.append(save(ds, tmp_path / f"{n}.dcm"))
    assert read_volume(paths).hu.shape == (3, 16, 16)
    monkeypatch.setattr(volume_module, "MOST_VOXELS", 3 * 16 * 16 - 1)
    with pytest.raises(VolumeError, match="3 slices of 16 x 16 pixels are more than any volume"):
        read_volume(paths)


def test_what_is_no_file_or_no_dicom_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(OSError, match=r"regular|No such|directory"):
            read_received(tmp_path / name)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x" * 1000)
    for name in ("empty", "text"):
        with pytest.raises(InvalidDicomError):
            read_received(tmp_path / name)
    endless = struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    with pytest.raises(HeaderError):
        read_received(written(tmp_path / "deep", endless * 200_000))
