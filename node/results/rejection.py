"""Key Object Selection that takes earlier objects out of use: a rejection note of IHE IOCM (RAD TF-3, 4.66).

Its title is (113001, DCM, "Rejected for Quality Reasons"): the objects were true of the slices that had come by then,
but not of the whole series. No patient is endangered by an archive that still shows them to those who ask, so it is not
(113037, DCM, "Rejected for Patient Safety Reasons").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import EncapsulatedPDFStorage, KeyObjectSelectionDocumentStorage

from node.identity import MANUFACTURER, MODEL_NAME
from node.results.provenance import Analysis, SourceInstance, describe
from node.results.references import named

#: (SOP class UID, SOP instance UID, series instance UID) of an object that is taken out of use.
Outdated = tuple[str, str, str]

#: Our SOP classes that are no images; the content tree refers to them as COMPOSITE (PS3.3 C.18.3, C.18.4).
_SR = "1.2.840.10008.5.1.4.1.1.88."
_NO_IMAGES = (_SR, EncapsulatedPDFStorage)


def note(outdated: Sequence[Outdated], analysis: Analysis, offset: int) -> Dataset:
    """Rejection note for `outdated` objects of the study of `analysis`, by TID 2010; `offset` as of `describe`."""
    objects = [_named(analysis, *one) for one in outdated]
    document = hd.ko.KeyObjectSelectionDocument(
        evidence=objects,
        content=hd.ko.KeyObjectSelection(
            document_title=Code("113001", "DCM", "Rejected for Quality Reasons"),
            referenced_objects=objects,
            description=f"More slices of the series came; {MODEL_NAME} has made new objects from all of them.",
        ),
        # `describe` gives it its UIDs, patient and study.
        series_instance_uid=analysis.uid("rejection-note", "series"),
        series_number=1,
        sop_instance_uid=analysis.uid("rejection-note", "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
    )
    document.ContinuityOfContent = "SEPARATE"  # text viewers run CONTINUOUS items together into one paragraph
    describe(
        document,
        analysis,
        kind="rejection-note",
        sop_class_uid=KeyObjectSelectionDocumentStorage,
        modality="KO",
        series_offset=offset,
        series_description="AI: earlier results outdated",
        variant="\n".join(sorted(sop_instance_uid for _, sop_instance_uid, _ in outdated)),
    )
    return cast("Dataset", document)


def _named(analysis: Analysis, sop_class_uid: str, sop_instance_uid: str, series_instance_uid: str) -> Dataset:
    """An outdated object as highdicom wants it; one with rows and columns becomes an IMAGE reference."""
    item = named(analysis, SourceInstance(sop_class_uid, sop_instance_uid), series_instance_uid)
    if not sop_class_uid.startswith(_NO_IMAGES):
        item.Rows = item.Columns = 1
    return item
