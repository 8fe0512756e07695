"""Key Object Selection that takes earlier objects out of use: a rejection note of IHE IOCM (RAD TF-3, 4.66).

Its title is (113001, DCM, "Rejected for Quality Reasons"): the objects were true of the slices that had come by then,
but not of the whole series. No patient is endangered by an archive that still shows them to those who ask, so it is not
(113037, DCM, "Rejected for Patient Safety Reasons").
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import KeyObjectSelectionDocumentStorage

from node.results.provenance import MODEL_NAME, Analysis, SourceInstance, code_item, describe
from node.results.references import hierarchy, reference

#: (SOP class UID, SOP instance UID, series instance UID) of an object that is taken out of use.
Outdated = tuple[str, str, str]

#: SOP classes without pixels are referred to as documents (PS3.3 C.18.3, C.18.4).
_SR = "1.2.840.10008.5.1.4.1.1.88."


def note(outdated: Sequence[Outdated], analysis: Analysis, offset: int) -> Dataset:
    """Rejection note for `outdated` objects of the study of `analysis`, by TID 2010; `offset` as of `describe`."""
    document = Dataset()
    document.ReferencedPerformedProcedureStepSequence = Items()
    by_series: dict[str, list[SourceInstance]] = {}
    for sop_class_uid, sop_instance_uid, series_uid in outdated:
        by_series.setdefault(series_uid, []).append(SourceInstance(sop_class_uid, sop_instance_uid))
    document.CurrentRequestedProcedureEvidenceSequence = Items([hierarchy(analysis, by_series.items())])
    document.ValueType, document.ContinuityOfContent = "CONTAINER", "SEPARATE"
    document.ConceptNameCodeSequence = Items([code_item(Code("113001", "DCM", "Rejected for Quality Reasons"))])
    template = Dataset()
    template.MappingResource, template.TemplateIdentifier = "DCMR", "2010"
    document.ContentTemplateSequence = Items([template])
    why = Dataset()
    why.RelationshipType, why.ValueType = "CONTAINS", "TEXT"
    why.ConceptNameCodeSequence = Items([code_item(Code("113012", "DCM", "Key Object Description"))])
    why.TextValue = f"More slices of the series came; {MODEL_NAME} has made new objects from all of them."
    document.ContentSequence = Items([why, *(_item(*one[:2]) for one in outdated)])
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
    return document


def _item(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "COMPOSITE" if sop_class_uid.startswith(_SR) else "IMAGE"
    item.ReferencedSOPSequence = Items([reference(SourceInstance(sop_class_uid, sop_instance_uid))])
    return item
