"""Basic Text SR that says in plain words why a series has no result.

Basic Text, as every viewer with any SR at all shows it.
"""

from __future__ import annotations

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage

from node import __version__
from node.identity import MODEL_NAME
from node.results.provenance import NOT_FOR_DIAGNOSIS, Analysis, code_item, describe
from node.results.references import hierarchy


def not_analysed(reason: str, analysis: Analysis, offset: int) -> Dataset:
    """Document with the reason, which is ASCII; `offset` as of `describe`."""
    document = Dataset()
    document.CompletionFlag, document.VerificationFlag, document.PreliminaryFlag = (
        "COMPLETE",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    document.ReferencedPerformedProcedureStepSequence = Items()
    document.PerformedProcedureCodeSequence = Items()
    evidence = hierarchy(analysis, [(analysis.header.SeriesInstanceUID, analysis.unique_instances())])
    document.CurrentRequestedProcedureEvidenceSequence = Items([evidence])
    document.ValueType, document.ContinuityOfContent = "CONTAINER", "SEPARATE"
    document.ConceptNameCodeSequence = Items([code_item(Code("18748-4", "LN", "Diagnostic imaging report"))])
    findings = Dataset()
    findings.RelationshipType, findings.ValueType, findings.ContinuityOfContent = "CONTAINS", "CONTAINER", "SEPARATE"
    findings.ConceptNameCodeSequence = Items([code_item(Code("121070", "DCM", "Findings"))])
    findings.ContentSequence = Items(
        [
            _text(Code("121071", "DCM", "Finding"), f"Not analysed: {reason}"),
            _text(
                Code("121106", "DCM", "Comment"),
                "No statement is made about this series. The absence of marked findings does not mean that there "
                f"are none. {MODEL_NAME} {__version__}, {NOT_FOR_DIAGNOSIS}.",
            ),
        ]
    )
    document.ContentSequence = Items([findings])
    describe(
        document,
        analysis,
        kind="sr",
        sop_class_uid=BasicTextSRStorage,
        modality="SR",
        series_offset=offset,
        series_description="AI: not analysed (SR)",
        variant=reason,
    )
    return document


def _text(name: Code, text: str) -> Dataset:
    item = Dataset()
    item.RelationshipType, item.ValueType, item.TextValue = "CONTAINS", "TEXT", text
    item.ConceptNameCodeSequence = Items([code_item(name)])
    return item
