"""A ledger that owes small objects, without an analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from sqlalchemy import select

from node.config import Peer
from node.delivery.outbox import Outbox
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Delivery, Object


def write_object(path: Path, sop_class_uid: str, study_uid: str, side: int = 16) -> Dataset:
    """A small image with the given SOP class; what a peer's database needs to file it is there."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class_uid
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = study_uid, generate_uid(), "P"
    ds.PatientName = ds.PatientBirthDate = ds.PatientSex = ds.StudyID = ds.AccessionNumber = ""
    ds.StudyDate, ds.StudyTime, ds.Modality = "20260101", "120000", "OT"
    ds.Rows = ds.Columns = side
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 12, 11, 0, 1
    ds.PhotometricInterpretation, ds.InstanceNumber = "MONOCHROME2", 1
    ds.PixelData = np.zeros((side, side), np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return ds


def owe(
    ledger: Ledger,
    results: Path,
    *peers: str,
    classes: tuple[str, ...] = (CTImageStorage,),
    side: int = 16,
    **row: bool,
) -> list[str]:
    """Owe a study with an object of each of `classes` to `peers`; gives the objects' UIDs in order."""
    study, series = generate_uid(), generate_uid()
    uids = []
    with ledger() as session:
        of = ledger.add_series(
            session,
            series,
            study,
            [series],
            calling_ae="CT",
            instances=[],
            complete=True,
            closed_because="",
            verdict="",
        )
        assert of is not None
        analysis = AnalysisJob(series_id=of.id, route="r", destinations={}, state="done", **row)
        session.add(analysis)
        session.flush()
        for n, sop_class_uid in enumerate(classes):
            name = f"{series}/{n}.dcm"
            ds = write_object(results / name, sop_class_uid, study, side)
            uids.append(str(ds.SOPInstanceUID))
            made = Object(
                analysis_id=analysis.id,
                kind=f"object-{n}",
                sop_class_uid=sop_class_uid,
                sop_instance_uid=ds.SOPInstanceUID,
                series_instance_uid=ds.SeriesInstanceUID,
                path=name,
            )
            made.deliveries = [Delivery(peer=peer) for peer in peers]
            session.add(made)
    return uids


def states(ledger: Ledger, peer: str = "pacs") -> list[str]:
    """States of all deliveries to a peer, in order."""
    with ledger() as session:
        rows = session.scalars(select(Delivery).where(Delivery.peer == peer).order_by(Delivery.id))
        return [row.state for row in rows]


def outbox(ledger: Ledger, results: Path, peer: Peer | None, name: str = "pacs") -> Outbox:
    return Outbox(ledger, results, name, peer, "LUNGNODE")
