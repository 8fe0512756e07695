"""The table of the kinds of result object: how each is made, numbered, and checked before it is sent."""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset

from node.results import not_analysed_report, pdf, preflight, report, segmentation
from node.results.capture import maker as capture
from node.results.forms import Profile, is_segmentation
from node.results.making import Maker, Making, Naming

#: The kind of a rejection note, which no peer asks for by its name.
REJECTION_NOTE = "rejection-note"


def maker_of(kind: str) -> Maker:
    """The maker of a kind of object, whichever method's."""
    return _MAKERS["seg" if is_segmentation(kind) else kind]


def offset_of(kind: str, segmentations: Sequence[str]) -> int:
    """Of the Series Number: a method's segmentations are numbered on."""
    return maker_of(kind).offset + (segmentations.index(kind) if is_segmentation(kind) else 0)


def _report(making: Making, naming: Naming, profile: Profile) -> Dataset | None:
    """The measurements; a measurement needs an outline, so where there is none, the reason as text."""
    made = report.build(making, naming, profile)
    return made or not_analysed_report.not_analysed(making.outcome.if_no_group, making.analysis, naming.offset)


def _nothing(_making: Making, _naming: Naming, _profile: Profile) -> None:
    return None


_MAKERS = {
    "seg": Maker(
        offset=91,
        form=lambda profile, _: profile.seg_form(),
        build=segmentation.build,
        required="ContentDate ContentTime ImageType LossyImageCompression Rows Columns SamplesPerPixel "
        "PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation NumberOfFrames ContentLabel "
        "Manufacturer ManufacturerModelName DeviceSerialNumber SoftwareVersions SegmentationType SegmentSequence "
        "SharedFunctionalGroupsSequence DimensionOrganizationSequence FrameOfReferenceUID PixelData",
        present="ContentDescription",
        check=preflight.segmentation,
    ),
    "sr": Maker(
        offset=93,
        form=Profile.sr_form,
        build=_report,
        required="ContentDate ContentTime CompletionFlag VerificationFlag ValueType ContinuityOfContent "
        "ConceptNameCodeSequence ContentSequence CurrentRequestedProcedureEvidenceSequence",
        present="ReferencedPerformedProcedureStepSequence PerformedProcedureCodeSequence",
        check=preflight.report,
    ),
    "capture": Maker(
        offset=94,
        form=lambda profile, _: profile.capture_form(),
        build=capture.build,
        required="BurnedInAnnotation ConversionType Rows Columns SamplesPerPixel PhotometricInterpretation "
        "BitsAllocated BitsStored HighBit PixelRepresentation NumberOfFrames PixelData",
        present="PatientOrientation",
        check=preflight.capture,
    ),
    "pdf": Maker(
        offset=95,
        form=lambda _, __: "",
        build=pdf.build,
        required="BurnedInAnnotation ConversionType MIMETypeOfEncapsulatedDocument EncapsulatedDocument",
        present="AcquisitionDateTime ContentDate ContentTime DocumentTitle ConceptNameCodeSequence",
        check=preflight.pdf,
    ),
    REJECTION_NOTE: Maker(
        offset=99,
        form=lambda _, __: "",
        build=_nothing,  # it is made of what it names, not of an analysis
        required="ContentDate ContentTime ValueType ConceptNameCodeSequence ContentSequence",
        present="ReferencedPerformedProcedureStepSequence",
        check=lambda *_: iter(()),
    ),
}
