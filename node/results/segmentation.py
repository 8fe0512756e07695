"""DICOM SEG of what a method found, on the grid of the source slices.

The form is the one that viewers were measured to paint exactly: BINARY, one instance a series, empty frames left
out, segment numbers without gaps, every frame naming its source slice, every segment with a colour.
"""

from __future__ import annotations

from typing import cast

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage
from pydicom.valuerep import DSfloat

from node import __version__
from node.identity import MANUFACTURER, MODEL_NAME, uid_of
from node.images.volume import Volume
from node.methods.outcome import Segment
from node.results.forms import Profile, SegForm
from node.results.making import Making, Naming
from node.results.provenance import (
    NOT_FOR_DIAGNOSIS,
    Analysis,
    describe,
    set_body_part,
)
from node.results.references import reference, sources

#: SOP class of LABELMAP segmentations (PS3.4 B.5), younger than pydicom's names.
LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"


def sop_class_uid(form: SegForm) -> str:
    """SOP Class UID of a segmentation in this form."""
    return LABELMAP_STORAGE if form == "labelmap" else str(SegmentationStorage)


def build(making: Making, naming: Naming, profile: Profile) -> Dataset | None:
    """SEG of one kind; None where it would be empty."""
    found, analysis, form = making.segmentation(naming.kind), making.analysis, profile.seg
    if not found.segments:
        return None
    labelmap = form == "labelmap"
    seg = hd.seg.Segmentation(
        source_images=_grid(making.volume, analysis),
        pixel_array=found.labels,
        segmentation_type=hd.seg.SegmentationTypeValues.LABELMAP if labelmap else hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe_segment(segment, analysis) for segment in found.segments],
        series_instance_uid=analysis.uid(naming.kind, naming.variant, "series"),
        series_number=naming.offset,
        sop_instance_uid=analysis.uid(naming.kind, naming.variant, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=__version__,
        device_serial_number=analysis.serial_number,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label=found.content_label,
        content_description=NOT_FOR_DIAGNOSIS,
        omit_empty_frames=form != "binary-all-frames",
    )
    if labelmap:
        # highdicom describes the background as a segment 0, which shifts the colours in OHIF. Pixel Padding Value
        # says that 0 is none (PS3.3 C.8.20.2).
        seg["SegmentSequence"].value = Items(item for item in seg.SegmentSequence if item.SegmentNumber != 0)
    _name_sources(seg, analysis)
    _fix_dimensions(seg, analysis.uid(naming.kind, naming.variant, "dimensions"))
    describe(
        seg,
        analysis,
        kind=naming.kind,
        sop_class_uid=sop_class_uid(form),
        modality="SEG",
        series_offset=naming.offset,
        series_description=found.description,
        variant=naming.variant,
    )
    set_body_part(seg, analysis.subject)
    return cast("Dataset", seg)


def _describe_segment(segment: Segment, analysis: Analysis) -> hd.seg.SegmentDescription:
    model = segment.model
    return hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.label,
        segmented_property_category=segment.category,
        segmented_property_type=segment.type,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=model.name,
            version=model.version,
            family=codes.DCM.ArtificialIntelligence,
            source=MANUFACTURER,
            parameters={"sha256": model.sha256},
        ),
        tracking_uid=analysis.uid("tracking", segment.name),
        tracking_id=segment.label,
        anatomic_regions=list(segment.regions) or None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.colour),
    )


def _grid(volume: Volume, analysis: Analysis) -> list[Dataset]:
    """Stand-ins for the source slices: the volume's geometry under made-up UIDs, and no patient.

    They let highdicom treat single- and multi-frame sources alike, take one orientation for all slices where files
    differ in the last digit, and keep it from writing a patient's name into its log.
    """
    rows, columns = volume.hu.shape[1:]
    slice_spacing, row_spacing, column_spacing = volume.spacing
    header = analysis.header
    thickness = header.get("SliceThickness") or _ds(slice_spacing)
    axes = volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)
    common = Dataset()
    common.SOPClassUID = CTImageStorage
    common.StudyInstanceUID, common.SeriesInstanceUID = volume.study_instance_uid, volume.series_instance_uid
    common.FrameOfReferenceUID = volume.frame_of_reference_uid or analysis.uid("frame of reference")
    common.PositionReferenceIndicator = header.get("PositionReferenceIndicator", "")
    common.Modality, common.Rows, common.Columns = "CT", rows, columns
    common.ImageOrientationPatient = [_ds(cosine) for cosine in axes.T.ravel()]
    common.PixelSpacing = [_ds(row_spacing), _ds(column_spacing)]
    common.SliceThickness, common.SpacingBetweenSlices = thickness, _ds(slice_spacing)
    common.PatientID = common.PatientName = common.PatientBirthDate = common.PatientSex = ""
    common.StudyID = common.StudyDate = common.StudyTime = common.AccessionNumber = ""
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if keyword in header:
            common[keyword] = header[keyword]
    grid = []
    for number, source in enumerate(volume.sources):
        image = Dataset(dict(common.items()))  # shares the elements, which nobody changes
        image.SOPInstanceUID = _stand_in(number)
        image.ImagePositionPatient = [_ds(coordinate) for coordinate in source.position]
        grid.append(image)
    return grid


def _name_sources(seg: Dataset, analysis: Analysis) -> None:
    """Put the real instances, and frames of multi-frame ones, where the stand-ins of `_grid` are named."""
    references = sources(analysis)
    seg.SourceImageSequence = Items(references)
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = Items(references)
    real = {_stand_in(number): source for number, source in enumerate(analysis.instances)}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        for item in frame.DerivationImageSequence[0].SourceImageSequence:
            # Segments share the items of a slice, so one may be done already.
            if item.ReferencedSOPInstanceUID not in real:
                continue
            item.update(reference(real[item.ReferencedSOPInstanceUID]))


def _stand_in(number: int) -> str:
    """SOP Instance UID of the stand-in for slice `number`."""
    return uid_of("stand-in", str(number))


def _fix_dimensions(seg: Dataset, uid: str) -> None:
    """Replace the random Dimension Organization UID, so that the same content gives the same bytes."""
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = uid


def _ds(value: float) -> DSfloat:
    # Ten decimals are far below any scanner's accuracy and keep 0.7 from becoming 0.70000000000001.
    return DSfloat(round(float(value), 10) + 0.0, auto_format=True)
