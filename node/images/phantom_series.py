"""The procedural phantom as a DICOM CT series, for the demo, for tests and for trying a connection to a PACS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from models.phantom.draw import Phantom
from node import __version__
from node.identity import uid_of


def write_series(phantom: Phantom, folder: Path, seed: int, acquisition: int = 1) -> list[Path]:
    """Write a phantom as axial CT slices, head first supine, one file each, superior slice first.

    The UIDs follow from `seed`, `acquisition` and the version alone, so writing twice gives the same series.

    Parameters
    ----------
    phantom
        Axes inferior → superior, anterior → posterior, right → left; HU.
    folder
        Made when missing.
    acquisition
        Acquisition Number. Several of one seed are of one series.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slices, rows, columns = phantom.hu.shape
    dz, dy, dx = phantom.spacing
    paths = []
    for n in range(slices):
        k = slices - 1 - n
        ds = _common(seed)
        ds.SOPInstanceUID = _uid(seed, f"instance {n}" if acquisition == 1 else f"instance {n} of {acquisition}")
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.InstanceNumber, ds.AcquisitionNumber = n + 1, acquisition
        ds.ImagePositionPatient = [round(v, 4) for v in (-columns * dx / 2, -rows * dy / 2, k * dz)]
        ds.SliceLocation = ds.ImagePositionPatient[2]
        ds.PixelSpacing = [round(dy, 5), round(dx, 5)]
        ds.SliceThickness = round(dz, 4)
        ds.Rows, ds.Columns = rows, columns
        stored = np.clip(phantom.hu[k].astype(np.int32) + 1024, 0, 4095)
        ds.PixelData = stored.astype("<u2").tobytes()
        path = folder / (f"{n + 1:04d}.dcm" if acquisition == 1 else f"{acquisition}-{n + 1:04d}.dcm")
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _uid(seed: int, what: str) -> UID:
    return UID(uid_of("phantom", __version__, str(seed), what))


def _common(seed: int) -> Dataset:
    """What all slices share: patient, study, series, equipment, pixel format."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName, ds.PatientID = f"Phantom^Seed {seed}", f"PHANTOM-{seed}"
    ds.PatientBirthDate, ds.PatientSex = "", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = _uid(seed, "study"), _uid(seed, "series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = _uid(seed, "frame of reference"), ""
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", ""
    ds.StudyDescription, ds.SeriesDescription = "Procedural phantom", "Thorax phantom"
    ds.SeriesNumber = 1
    ds.Modality, ds.BodyPartExamined, ds.PatientPosition = "CT", "CHEST", "HFS"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Manufacturer, ds.ManufacturerModelName, ds.SoftwareVersions = "lungnode", "phantom", __version__
    ds.KVP, ds.ConvolutionKernel = "120", "PHANTOM"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "-600", "1500"
    return ds
