from __future__ import annotations

import random
import re
import tracemalloc

import numpy as np
import pydicom
import pytest
from ct_series import PATIENT, axial_positions, write_enhanced, write_series
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    generate_uid,
)

from node.images import frames
from node.images.volume import FileError, VolumeError, read_volume


def changed(n, **attributes):
    """A change of these attributes in the n-th dataset of a series, in all where n is None."""

    def change(dataset: Dataset, index: int) -> None:
        if n is None or index == n:
            for keyword, value in attributes.items():
                if value is None:
                    delattr(dataset, keyword)
                else:
                    setattr(dataset, keyword, value)

    return change


def refusal(paths) -> str:
    """The message with which a series is refused; it names no patient and no file."""
    with pytest.raises(VolumeError) as caught:
        read_volume(paths)
    message = str(caught.value)
    assert PATIENT.split("^")[0] not in message
    assert str(paths[0].parent) not in message
    return message


# Geometry


def test_affine_and_order_follow_positions_not_files(tmp_path):
    row, column = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.0, -1.0])
    normal = np.cross(row, column)
    positions = [tuple(np.array([7.0, -3.0, 50.0]) + 1.25 * n * normal) for n in range(9)]
    paths = write_series(tmp_path, positions, orientation=(*row, *column), pixel_spacing=(0.8, 0.5))
    random.Random(3).shuffle(paths)
    volume = read_volume(paths)

    assert volume.hu.shape == (9, 2, 3)
    assert volume.hu.dtype == np.int16
    assert volume.spacing == pytest.approx((1.25, 0.8, 0.5))
    assert volume.voxel_ml == pytest.approx(1.25 * 0.8 * 0.5 / 1000)
    for k, source in enumerate(volume.sources):
        dataset = pydicom.dcmread(source.path)
        assert dataset.SOPInstanceUID == source.sop_instance_uid
        assert (volume.hu[k] == dataset.pixel_array.astype(int) - 1024).all()
        position = np.array([float(value) for value in dataset.ImagePositionPatient])
        assert source.position == pytest.approx(tuple(position))
        # PS3.3 C.7.6.2.1.1 written out: position + X * column spacing * i + Y * row spacing * j
        for j, i in ((0, 0), (1, 2)):
            expected = position + row * 0.5 * i + column * 0.8 * j
            assert (volume.affine @ (i, j, k, 1))[:3] == pytest.approx(expected, abs=1e-5)
    assert volume.study_instance_uid == dataset.StudyInstanceUID
    assert volume.series_instance_uid == dataset.SeriesInstanceUID
    assert volume.frame_of_reference_uid == dataset.FrameOfReferenceUID


def test_slices_run_along_the_normal_also_where_it_points_to_the_feet(tmp_path):
    positions = [(0.0, 0.0, z) for z in (4.0, 2.0, 0.0)]
    volume = read_volume(write_series(tmp_path, positions, orientation=(-1, 0, 0, 0, 1, 0)))
    assert [source.position[2] for source in volume.sources] == [4, 2, 0]
    assert np.linalg.det(volume.affine[:3, :3]) > 0


def test_single_slice_and_two_slices(tmp_path):
    assert read_volume(write_series(tmp_path, axial_positions(1))).spacing[0] == 2.0
    assert read_volume(write_series(tmp_path, axial_positions(2, spacing=3))).spacing[0] == 3.0
    paths = write_series(tmp_path, axial_positions(1), change=changed(None, SliceThickness=None))
    assert "its spacing is unknown" in refusal(paths)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([(0.0, 0.0, z) for z in (0, 2, 4, 8)], "gap at z = 4.00 mm: 4.00 mm between slices, expected 2.00"),
        ([(0.0, 0.0, z) for z in (0, 2, 4, 6.9, 8.9)], "uneven spacing: slices are 2.00 to 2.90 mm apart"),
        ([(0.0, 0.0, z) for z in (0, 2, 2, 4)], "two slices at z = 2.00 mm"),
        ([(0.0, 0.5 * z, z) for z in (0, 2, 4, 6)], "gantry tilt of 26.6°"),
    ],
)
def test_irregular_positions_are_refused(tmp_path, positions, message):
    assert message in refusal(write_series(tmp_path, positions))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.98, 0.199]}, "more than one Image Orientation"),
        ({"PixelSpacing": [0.8, 0.71]}, "more than one pixel spacing: 0.8000 to 0.8000 mm between rows, 0.7000"),
        ({"FrameOfReferenceUID": generate_uid()}, "2 frames of reference in one series: 1.2.826"),
        ({"SeriesInstanceUID": generate_uid()}, "2 series in one series"),
        ({"StudyInstanceUID": generate_uid()}, "2 studies in one series"),
        ({"Rows": 3, "Columns": 2}, "2 matrix sizes in one series: 2 x 3, 3 x 2"),
        ({"SOPClassUID": PositronEmissionTomographyImageStorage}, "is not a CT image"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer is not part of a volume"),
        ({"SamplesPerPixel": 3}, "3 samples per pixel"),
        ({"HighBit": 15}, "High Bit is not Bits Stored - 1"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
        ({"PixelSpacing": None}, "PixelSpacing is missing"),
        ({"PixelSpacing": [0.8, 0]}, "PixelSpacing or RescaleSlope is not usable"),
        ({"ImagePositionPatient": [1, 2]}, "ImagePositionPatient is not usable"),
        ({"FrameOfReferenceUID": None}, "2 frames of reference in one series: , 1.2.826"),
        ({"RescaleSlope": None}, "RescaleSlope is missing"),
        ({"RescaleIntercept": None}, "RescaleIntercept is missing"),
        ({"Rows": None}, "Rows is missing"),
        ({"PixelData": None}, "no Pixel Data"),
        ({"PixelData": b"\0\0\0\0"}, "cannot be decoded"),
        ({"BitsAllocated": None}, "cannot be decoded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_slice_that_does_not_belong_refuses_the_series(tmp_path, attributes, message):
    paths = write_series(tmp_path, axial_positions(4), change=changed(2, **attributes))
    refused = refusal(paths)
    assert message in refused
    if "in one series" not in message and "more than one" not in message:
        named = re.search(r"SOP instance ([0-9.]+): ", refused)
        assert named, refused
        assert named[1] in {str(pydicom.dcmread(path).SOPInstanceUID) for path in paths}


def test_a_series_without_frame_of_reference_is_refused(tmp_path):
    paths = write_series(tmp_path, axial_positions(4), change=changed(None, FrameOfReferenceUID=None))
    assert "no Frame of Reference UID" in refusal(paths)


def test_cosines_that_are_not_orthogonal_are_refused(tmp_path):
    paths = write_series(tmp_path, axial_positions(4), orientation=(1, 0, 0, 0.1, 0.995, 0))
    assert "not orthogonal" in refusal(paths)


def test_files_that_are_no_dicom(tmp_path):
    paths = write_series(tmp_path, axial_positions(3))
    other = tmp_path / "Roe.txt"
    other.write_text("no DICOM")
    assert "not a DICOM file" in refusal([*paths, other])
    with pytest.raises(FileError, match=r"^missing\.dcm cannot be read \(no such file or directory\)$"):
        read_volume([tmp_path / "missing.dcm"])
    paths[1].unlink()
    paths[1].symlink_to("/proc/self/mem")  # EIO, as of a bad sector
    with pytest.raises(FileError, match=rf"^{paths[1].name} cannot be read \(input/output error\)$"):
        read_volume(paths)
    with pytest.raises(VolumeError, match="no files"):
        read_volume([])


def test_pixels_that_cannot_be_read_are_no_short_file(tmp_path):
    (path,) = write_series(tmp_path, axial_positions(1))
    read = frames.read_frames(path)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        next(frames.decode_frames(path, read))


def test_memory_stays_near_that_of_the_array(tmp_path):
    paths = write_series(tmp_path, axial_positions(64), np.zeros((64, 256, 256), np.uint16))
    tracemalloc.start()
    try:
        volume = read_volume(paths)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one_slice = volume.hu[0].nbytes
    assert peak < volume.hu.nbytes + 16 * one_slice


# Attenuation


def test_every_slice_has_its_own_rescale(tmp_path):
    def change(dataset, n):
        dataset.RescaleSlope, dataset.RescaleIntercept = n + 1, -1000 - n

    stored = np.arange(18).reshape(3, 2, 3)
    volume = read_volume(write_series(tmp_path, axial_positions(3), stored, change=change))
    assert volume.hu.tolist() == [(stored[n] * (n + 1) - 1000 - n).tolist() for n in range(3)]


def test_fractional_rescale_is_rounded_and_clipped_to_int16(tmp_path):
    stored = np.tile([[0, 1, 2], [3, 100, 4095]], (3, 1, 1))
    change = changed(None, RescaleSlope="20.0244", RescaleIntercept="-1024.5")
    volume = read_volume(write_series(tmp_path, axial_positions(3), stored, change=change))
    assert volume.hu[0].tolist() == [[-1024, -1004, -984], [-964, 978, 32767]]


def test_lowest_stored_value_with_a_negative_intercept_is_clipped_not_wrapped(tmp_path):
    stored = np.full((3, 2, 3), -32768)
    volume = read_volume(write_series(tmp_path, axial_positions(3), stored, bits_stored=16, signed=True))
    assert (volume.hu == -32768).all()


@pytest.mark.parametrize("signed", [False, True])
def test_unused_high_bits_are_ignored_and_the_sign_is_extended(tmp_path, signed):
    # 12 bits stored; the upper four carry an old-style overlay.
    stored = np.tile([[0x0005, 0xF005, 0x07FF], [0x0FFF, 0xAFFF, 0x5800]], (3, 1, 1))
    volume = read_volume(write_series(tmp_path, axial_positions(3), stored, signed=signed))
    expected = [[5, 5, 2047], [-1, -1, -2048]] if signed else [[5, 5, 2047], [4095, 4095, 2048]]
    assert (volume.hu[1] + 1024).tolist() == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, [-2000, -1999, -1500, 0, 1, 63]),
        ({"PixelPaddingValue": -2000}, [0, -1999, -1500, 0, 1, 63]),
        ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}, [0, 0, 0, 0, 1, 63]),
        ({"PixelPaddingValue": -1500, "PixelPaddingRangeLimit": -2000}, [0, 0, 0, 0, 1, 63]),
    ],
)
def test_declared_padding_becomes_air(tmp_path, attributes, expected):
    stored = np.tile([-2000, -1999, -1500, 0, 1, 63], (3, 1)).reshape(3, 2, 3)
    paths = write_series(
        tmp_path, axial_positions(3), stored, bits_stored=16, signed=True, change=changed(None, **attributes)
    )
    assert (read_volume(paths).hu[0].ravel() + 1024).tolist() == expected


@pytest.mark.parametrize(
    ("vr", "padding", "signed", "stored"), [("US", 63536, True, -2000), ("SS", -2000, False, 63536)]
)
def test_padding_written_in_the_other_signedness(tmp_path, vr, padding, signed, stored):
    def change(dataset, n):
        dataset.add_new("PixelPaddingValue", vr, padding)

    pixels = np.tile([stored, 5, 6], (3, 2, 1))
    paths = write_series(tmp_path, axial_positions(3), pixels, bits_stored=16, signed=signed, change=change)
    assert read_volume(paths).hu[0, 0].tolist() == [-1024, -1019, -1018]


def test_polarity_does_not_change_attenuation(tmp_path):
    one = read_volume(write_series(tmp_path, axial_positions(3)))
    paths = write_series(tmp_path, axial_positions(3), change=changed(None, PhotometricInterpretation="MONOCHROME1"))
    assert (read_volume(paths).hu == one.hu).all()


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda uid: uid.name,
)
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_transfer_syntaxes_change_nothing(tmp_path, syntax, signed):
    stored = np.random.default_rng(1).integers(-2048 if signed else 0, 2048 if signed else 4096, (3, 64, 48))
    paths = write_series(tmp_path, axial_positions(3), stored, signed=signed)
    expected = read_volume(paths).hu
    assert sorted(expected[:, 0, 0].tolist()) == sorted((stored[:, 0, 0] - 1024).tolist())
    for path in paths:
        dataset = pydicom.dcmread(path)
        if syntax.is_encapsulated:
            dataset.compress(syntax, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset.decode()
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(path, dataset, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    assert (read_volume(paths).hu == expected).all()


def test_a_broken_code_stream_names_its_instance(tmp_path):
    paths = write_series(tmp_path, axial_positions(3), np.zeros((3, 32, 32), int))
    dataset = pydicom.dcmread(paths[1])
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.PixelData = dataset.PixelData[:40] + b"\0" * (len(dataset.PixelData) - 40)
    dataset.save_as(paths[1])
    message = refusal(paths)
    assert f"SOP instance {dataset.SOPInstanceUID}: Pixel Data in JPEG 2000" in message


# Enhanced multi-frame


def test_enhanced_frames_are_sorted_and_rescaled_one_by_one(tmp_path):
    positions = [(0.0, 0.0, z) for z in (6.0, 2.0, 4.0)]
    stored = np.arange(18).reshape(3, 2, 3)
    path = write_enhanced(tmp_path, positions, stored, (-1000, -1001, -1002))
    volume = read_volume([path])
    assert [source.frame for source in volume.sources] == [2, 3, 1]
    assert len({source.sop_instance_uid for source in volume.sources}) == 1
    assert [plane[0, 0] for plane in volume.hu] == [6 - 1001, 12 - 1002, 0 - 1000]
    assert volume.spacing == pytest.approx((2.0, 0.8, 0.7))
    assert volume.affine[:3, 3].tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "as many functional groups as frames"),
        (
            lambda d: d.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence"),
            "PixelMeasuresSequence is missing",
        ),
        (lambda d: d.pop("PerFrameFunctionalGroupsSequence"), "PerFrameFunctionalGroupsSequence is missing"),
        (lambda d: setattr(d, "PixelData", d.PixelData[:24]), "cannot be decoded"),
    ],
)
def test_incomplete_enhanced_instances_are_refused(tmp_path, change, message):
    path = write_enhanced(
        tmp_path, [(0.0, 0.0, z) for z in (6.0, 2.0, 4.0)], np.zeros((3, 2, 3), int), (0, 0, 0), change
    )
    assert message in refusal([path])


def test_a_file_cut_off_within_its_pixels_is_refused(tmp_path):
    paths = write_series(tmp_path, axial_positions(3))
    paths[1].write_bytes(paths[1].read_bytes()[:-2])
    uid = pydicom.dcmread(paths[1], stop_before_pixels=True).SOPInstanceUID
    with pytest.raises(VolumeError, match=f"SOP instance {uid}: "):
        read_volume(paths)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("padding", [None, -2000, 63536])
def test_pixels_as_they_lie_are_what_the_decoder_gives(tmp_path, monkeypatch, syntax, signed, padding):
    stored = np.random.default_rng(0).integers(0, 1 << 12, (4, 5, 7)) - 2048 * signed

    def change(dataset, _):
        if padding is not None and signed == (padding < 0):
            dataset.PixelPaddingValue = padding

    paths = write_series(tmp_path, axial_positions(4), stored, signed=signed, change=change)
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    quick = read_volume(paths).hu
    assert frames.read_frames(paths[0])[0].words is not None
    monkeypatch.setattr(frames, "_NATIVE", ())
    assert np.array_equal(quick, read_volume(paths).hu)
