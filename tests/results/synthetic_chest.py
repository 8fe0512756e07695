"""A chest of ellipsoids as CT files, with findings that are known exactly: what the tests of the results build on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy import ndimage

from models.labels import LEFT, RIGHT
from models.registry import ModelIdentity
from models.rules.statement import state
from node.images.orientation import Orientation
from node.images.volume import SourceSlice, Volume
from node.methods.outcome import Outcome
from node.methods.pneumonia.findings import Findings, Lesion, Region
from node.methods.pneumonia.outcome import SEGMENTATIONS, outcome_of
from node.results.capture.drawing import PatientView
from node.results.forms import kinds_of

#: Kinds of object of the pneumonia method.
KINDS = kinds_of(SEGMENTATIONS)

MOMENT = datetime(2026, 3, 5, 14, 30, 15, 250_000)
MODELS = (ModelIdentity("lungs", "1.2.0", "a1" * 32), ModelIdentity("infection", "2.0.1", "b2" * 32))

#: Direction cosines (row, column) by patient position, as scanners store axial slices.
SUPINE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
FEET_FIRST = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)

#: Ball in the right upper lung at the back, patient mm (LPS): x < 0 is right, y > 0 back, z > 0 head.
RIGHT_UPPER_POSTERIOR = ((-75.0, 45.0, 55.0), 18.0)


@dataclass(frozen=True)
class Chest:
    """Volume, findings and source headers of one synthetic series."""

    volume: Volume
    findings: Findings
    headers: list[Dataset]

    @property
    def outcome(self) -> Outcome:
        """The findings as the parts that objects are made of."""
        return outcome_of(self.volume, self.findings)

    @property
    def view(self) -> PatientView:
        """What the pages draw."""
        return PatientView.of(self.volume, self.outcome.pictures)


@dataclass(frozen=True)
class Shape:
    """How the series is stored."""

    slices: int = 24
    rows: int = 64
    columns: int = 64
    #: Extent of the grid, mm: along the slices, down, across.
    extent: tuple[float, float, float] = (240.0, 300.0, 360.0)
    orientation: Sequence[float] = SUPINE
    patient_position: str = "HFS"
    #: Attributes set over the defaults; None removes one.
    attributes: dict[str, Any] = field(default_factory=dict)


def make_chest(
    folder: Path,
    shape: Shape = Shape(),
    lesions: Sequence[tuple[tuple[float, float, float], float]] = (RIGHT_UPPER_POSTERIOR,),
) -> Chest:
    """Write CT files below `folder` and give what an analysis that sees everything would find.

    The chest's middle is the origin of the patient coordinates; lungs are ellipsoids at x = ±75 mm.
    """
    affine = _affine(shape)
    size = shape.slices, shape.rows, shape.columns
    lungs, labels, hu = np.zeros(size, np.uint8), np.zeros(size, np.uint16), np.zeros(size, np.int16)
    rows, columns = np.indices(size[1:])
    random = np.random.default_rng(7)
    # Slice by slice: a long series does not fit into memory as coordinates.
    for k in range(shape.slices):
        x, y, z = (row[0] * columns + row[1] * rows + row[2] * k + row[3] for row in affine[:3])
        for value, middle in ((RIGHT, -75.0), (LEFT, 75.0)):
            lungs[k][((x - middle) / 55) ** 2 + (y / 85) ** 2 + (z / 105) ** 2 <= 1] = value
        for number, ((cx, cy, cz), radius) in enumerate(lesions, 1):
            labels[k][((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 <= radius**2) & (lungs[k] > 0)] = number
        body = (x / 165) ** 2 + (y / 120) ** 2 <= 1
        plain = np.where(body, 40, -1000)
        plain[lungs[k] > 0] = -850
        plain[labels[k] > 0] = -300
        hu[k] = (plain + random.normal(0, 20, x.shape)).round()
    headers, sources = _write(folder, shape, affine, hu)
    volume = Volume(hu, affine, sources, "1.2.826.0.1.9.1", "1.2.826.0.1.9.2", "1.2.826.0.1.9.3")
    return Chest(volume, findings_of(volume, lungs, labels, len(lesions)), headers)


def _affine(shape: Shape) -> NDArray[np.float64]:
    slice_mm, row_mm, column_mm = (
        extent / size for extent, size in zip(shape.extent, (shape.slices, shape.rows, shape.columns), strict=True)
    )
    row, column = np.array(shape.orientation[:3]), np.array(shape.orientation[3:])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * column_mm, column * row_mm, np.cross(row, column) * slice_mm], axis=1)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([shape.columns, shape.rows, shape.slices]) - 1) / 2)
    return affine


def _write(
    folder: Path, shape: Shape, affine: NDArray[np.float64], hu: NDArray[np.int16]
) -> tuple[list[Dataset], tuple[SourceSlice, ...]]:
    folder.mkdir(parents=True, exist_ok=True)
    headers, sources = [], []
    for k in range(shape.slices):
        position = affine[:3, :3] @ (0, 0, k) + affine[:3, 3]
        image = _header(shape, affine, k, position)
        path = folder / f"{k:04d}.dcm"
        headers.append(image)
        whole = Dataset(image)
        whole.file_meta = FileMetaDataset()
        whole.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        whole.PixelData = (hu[k].astype(np.int32) + 1024).clip(0, 4095).astype("<u2").tobytes()
        if len(whole.PixelData) % 2:
            whole.PixelData += b"\0"
        whole.save_as(path, enforce_file_format=True)
        x, y, z = (float(value) for value in image.ImagePositionPatient)
        sources.append(SourceSlice(path, str(image.SOPClassUID), str(image.SOPInstanceUID), None, (x, y, z)))
    return headers, tuple(sources)


def _header(shape: Shape, affine: NDArray[np.float64], k: int, position: NDArray[np.float64]) -> Dataset:
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"1.2.826.0.1.9.2.{k + 1}"
    image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.826.0.1.9.1", "1.2.826.0.1.9.2"
    image.FrameOfReferenceUID, image.PositionReferenceIndicator = "1.2.826.0.1.9.3", ""
    image.PatientName, image.PatientID = "Synthetic^Thorax", "LUNG-1"
    image.PatientBirthDate, image.PatientSex, image.PatientAge = "19600101", "O", "066Y"
    image.StudyDate = image.SeriesDate = image.AcquisitionDate = image.ContentDate = "20260305"
    image.StudyTime = image.SeriesTime = image.AcquisitionTime = image.ContentTime = "093000"
    image.StudyID, image.AccessionNumber, image.ReferringPhysicianName = "1", "A1", ""
    image.StudyDescription, image.SeriesDescription = "CT Thorax", "Thorax 1.0"
    image.Modality, image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = "CT", 4, k + 1, 1
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.Manufacturer, image.ManufacturerModelName = "Phantoms", "Ellipsoid"
    image.BodyPartExamined, image.PatientPosition = "CHEST", shape.patient_position
    image.ImagePositionPatient = [round(float(value), 6) + 0.0 for value in position]
    image.ImageOrientationPatient = list(shape.orientation)
    column_mm, row_mm, slice_mm = np.linalg.norm(affine[:3, :3], axis=0)
    image.PixelSpacing, image.SliceThickness = [round(float(row_mm), 8), round(float(column_mm), 8)], float(slice_mm)
    image.KVP, image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "120", "-1024", "1", "HU"
    image.Rows, image.Columns, image.SamplesPerPixel, image.PhotometricInterpretation = (
        shape.rows,
        shape.columns,
        1,
        "MONOCHROME2",
    )
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    for keyword, value in shape.attributes.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    return image


def findings_of(volume: Volume, lungs: NDArray[np.uint8], labels: NDArray[np.uint16], count: int) -> Findings:
    """What an analysis would say of these masks; lesions are labelled 1 to `count`."""
    order = sorted(range(1, count + 1), key=lambda label: -int((labels == label).sum()))
    ranked = np.zeros_like(labels)
    for rank, label in enumerate(order, 1):
        ranked[labels == label] = rank
    orientation = Orientation.of(volume.affine)
    listed = tuple(_lesion(volume, lungs, ranked == rank, rank) for rank in range(1, count + 1))
    return Findings(
        lungs=lungs,
        lesions=ranked,
        right=region(volume, lungs == RIGHT, ranked > 0),
        left=region(volume, lungs == LEFT, ranked > 0),
        both=region(volume, lungs > 0, ranked > 0),
        lesion_list=listed,
        scan=state(
            orientation.canonical(lungs),
            orientation.canonical(ranked),
            orientation.canonical(volume.hu),
            [lesion.probability for lesion in listed],
            orientation.spacing(volume.spacing),
        ),
        models=MODELS,
        timings={},
    )


def region(volume: Volume, part: NDArray[np.bool_], infected: NDArray[np.bool_]) -> Region:
    """Measurements of one part, straight from the definition."""
    inside = part & infected
    return Region(
        volume_ml=float(part.sum() * volume.voxel_ml),
        infected_ml=float(inside.sum() * volume.voxel_ml),
        mean_hu=float(volume.hu[part].mean()) if part.any() else float("nan"),
        infected_mean_hu=float(volume.hu[inside].mean()) if inside.any() else float("nan"),
    )


def _lesion(volume: Volume, lungs: NDArray[np.uint8], mask: NDArray[np.bool_], label: int) -> Lesion:
    k, j, i = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    sides = np.bincount(lungs[mask], minlength=3)
    return Lesion(
        label=label,
        side="right" if sides[RIGHT] >= sides[LEFT] else "left",
        probability=0.9 - 0.01 * label,
        volume_ml=float(mask.sum() * volume.voxel_ml),
        mean_hu=float(volume.hu[mask].mean()),
        box=(int(k[0]), int(k[-1]) + 1, int(j[0]), int(j[-1]) + 1, int(i[0]), int(i[-1]) + 1),
        key_slice=int(mask.sum(axis=(1, 2)).argmax()),
    )


def crude_findings(volume: Volume) -> Findings:
    """Findings of a real volume by thresholds, good enough to have the shape of real ones; a lesion in each lung."""
    inside = ndimage.binary_fill_holes((volume.hu[volume.hu.shape[0] // 2] > -500).astype(bool))
    air = (volume.hu < -600) & inside
    lungs = np.where(air, np.where(np.arange(volume.hu.shape[2]) < volume.hu.shape[2] // 2, RIGHT, LEFT), 0)
    labels = np.where((volume.hu > -750) & air, lungs, 0).astype(np.uint16)
    return findings_of(volume, lungs.astype(np.uint8), labels, 2)
