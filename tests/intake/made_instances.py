"""Headers and encoded instances, made to measure for the intake tests, and a sender of just these bytes."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE

from node.intake.header import InstanceHeader
from node.intake.series import Host

STUDY = "1.2.826.0.1.3680043.8.498.1"
SERIES = f"{STUDY}.2"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def header(n: int, *, series: str = SERIES, z: float | None = None, **changes: Any) -> InstanceHeader:
    """Slice `n` of an axial chest CT, at z = n mm unless said otherwise."""
    values: dict[str, Any] = {
        "study_instance_uid": STUDY,
        "series_instance_uid": series,
        "sop_class_uid": CTImageStorage,
        "sop_instance_uid": f"{series}.{n + 1}",
        "modality": "CT",
        "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
        "body_part": "CHEST",
        "instance_number": n + 1,
        "rows": 512,
        "columns": 512,
        "pixel_spacing": (0.7, 0.7),
        "slice_thickness": 1.0,
        "orientation": AXIAL,
        "positions": ((-180.0, -180.0, float(n) if z is None else z),),
    }
    return InstanceHeader(**{**values, **changes})


def host(**methods: Callable[..., Any]) -> Host:
    """What an assembly needs, with these methods in place of those that keep nothing."""
    made = Host()
    for name, method in methods.items():
        assert hasattr(Host, name), name
        setattr(made, name, method)
    return made


def dataset(n: int, *, series: str = SERIES, size: int = 32) -> Dataset:
    """Slice `n` as a data set with pixels."""
    ds = Dataset()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{series}.{n + 1}"
    ds.Modality, ds.PatientName, ds.BodyPartExamined, ds.SliceThickness = "CT", "SECRET^PATIENT", "CHEST", "1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = STUDY, series, n + 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-180, -180, n], list(AXIAL)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", size, size
    ds.PixelSpacing = [0.7, 0.7]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = bytes([n % 251, 0]) * (size * size)
    ds["PixelData"].VR = "OW"
    return ds


def encoded(ds: Dataset, transfer_syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """The bytes of a data set, without File Meta Information."""
    file = BytesIO()
    _write(file, ds, transfer_syntax)
    return dataset_bytes(file.getvalue())


def dataset_bytes(file: bytes) -> bytes:
    """What follows preamble, prefix and the File Meta Information, by its group length."""
    assert file[128:140] == b"DICM\2\0\0\0UL\4\0"
    return file[144 + int.from_bytes(file[140:144], "little") :]


def save(ds: Dataset, path: Path, transfer_syntax: UID = ExplicitVRLittleEndian) -> Path:
    """A Part 10 file."""
    with path.open("wb") as file:
        _write(file, ds, transfer_syntax)
    return path


def send_raw(association: Association, raw: bytes, request: dict[str, str], context_id: int | None = None) -> None:
    """A C-STORE request with just these bytes; pynetdicom's own sender would check and encode them anew."""
    message = C_STORE()
    message.MessageID, message.Priority, message.DataSet = 1, 2, BytesIO(raw)
    for keyword, value in request.items():
        setattr(message, keyword, value)
    association.dimse.send_msg(message, context_id or association.accepted_contexts[0].context_id)


def _write(file: Any, ds: Dataset, transfer_syntax: UID) -> None:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = transfer_syntax
    dcmwrite(file, ds, enforce_file_format=True)
