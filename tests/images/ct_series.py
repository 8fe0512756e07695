"""Synthetic CT series on disk, every header and pixel known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PATIENT = "Roe^Nobody"


def axial_positions(count: int, spacing: float = 2.0, first: float = -50.0) -> list[tuple[float, float, float]]:
    return [(-10.0, -20.0, first + spacing * n) for n in range(count)]


def write_series(
    folder: Path,
    positions: Sequence[tuple[float, float, float]],
    stored: NDArray[np.integer] | None = None,
    *,
    orientation: Sequence[float] = AXIAL,
    pixel_spacing: tuple[float, float] = (0.8, 0.7),
    bits_stored: int = 12,
    signed: bool = False,
    change: Callable[[Dataset, int], None] = lambda dataset, n: None,
) -> list[Path]:
    """Write one CT image a position; files, instance numbers and positions in unrelated orders."""
    folder = _new_folder(folder)
    if stored is None:
        stored = np.arange(len(positions) * 6).reshape(-1, 2, 3)
    study, series, frame_of_reference = generate_uid(), generate_uid(), generate_uid()
    shuffled = random.Random(7).sample(range(len(positions)), len(positions))
    paths = []
    for n, position in enumerate(positions):
        dataset = _image(stored[n], bits_stored=bits_stored, signed=signed)
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID = study
        dataset.SeriesInstanceUID = series
        dataset.FrameOfReferenceUID = frame_of_reference
        dataset.InstanceNumber = shuffled[n] + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.ImagePositionPatient = [f"{value:.8g}" for value in position]
        dataset.ImageOrientationPatient = [f"{value:.8g}" for value in orientation]
        dataset.PixelSpacing = list(pixel_spacing)
        dataset.SliceThickness = 2
        dataset.RescaleSlope = 1
        dataset.RescaleIntercept = -1024
        change(dataset, n)
        paths.append(_save(dataset, folder / f"{shuffled[n]}.dcm"))
    return paths[::-1]


def write_enhanced(
    folder: Path,
    positions: Sequence[tuple[float, float, float]],
    stored: NDArray[np.integer],
    intercepts: Sequence[float],
    change: Callable[[Dataset], None] = lambda dataset: None,
) -> Path:
    """Write one enhanced CT of these frames, geometry split over shared and per-frame functional groups."""
    dataset = _image(stored, bits_stored=12, signed=False)
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.NumberOfFrames = len(positions)
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.7], 2
    plane.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for position, intercept in zip(positions, intercepts, strict=True):
        place, transformation, groups = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = list(position)
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, intercept
        groups.PlanePositionSequence, groups.PixelValueTransformationSequence = [place], [transformation]
        frames.append(groups)
    dataset.PerFrameFunctionalGroupsSequence = frames
    change(dataset)
    return _save(dataset, _new_folder(folder) / "enhanced.dcm")


def _image(stored: NDArray[np.integer], *, bits_stored: int, signed: bool) -> Dataset:
    dataset = Dataset()
    dataset.PatientName = PATIENT
    dataset.Modality = "CT"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated = 16
    dataset.BitsStored = bits_stored
    dataset.HighBit = bits_stored - 1
    dataset.PixelRepresentation = int(signed)
    dataset.add_new("PixelData", "OW", np.ascontiguousarray(stored).astype("<u2").tobytes())
    return dataset


def _save(dataset: Dataset, path: Path) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def _new_folder(parent: Path) -> Path:
    folder = parent / str(len(list(parent.iterdir())))
    folder.mkdir()
    return folder
