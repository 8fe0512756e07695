"""DICOM SEG of the lungs and of the infection, on the grid of the source slices.

The form is the one that viewers were measured to paint exactly: BINARY, one instance a series, empty frames left
out, segment numbers without gaps, every frame naming its source slice, every segment with a colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage
from pydicom.valuerep import DSfloat

from models.registry import ModelIdentity
from node import __version__
from node.analysis.findings import LEFT, RIGHT, Findings
from node.analysis.volume import Volume
from node.results.identity import MANUFACTURER, MODEL_NAME, NOT_FOR_DIAGNOSIS, Analysis, describe, uid_of

RIGHT_LUNG = Code("3341006", "SCT", "Right lung")
LEFT_LUNG = Code("44029006", "SCT", "Left lung")
PNEUMONIA = Code("233604007", "SCT", "Pneumonia")

#: sRGB of each segment; of the palette of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = {
    "right-lung": (86, 180, 233),
    "left-lung": (0, 158, 115),
    "right-infection": (230, 159, 0),
    "left-infection": (213, 94, 0),
}


def lungs(volume: Volume, findings: Findings, analysis: Analysis) -> Dataset | None:
    """SEG of the right and the left lung, each with its infected part; None where there is no lung."""
    anatomical = codes.SCT.AnatomicalStructure
    return _segmentation(
        volume,
        analysis,
        "lung-seg",
        findings.lungs,
        [
            _Segment(RIGHT, "right-lung", "Right lung", anatomical, RIGHT_LUNG, None),
            _Segment(LEFT, "left-lung", "Left lung", anatomical, LEFT_LUNG, None),
        ],
        analysis.models[0],
    )


def infection(volume: Volume, findings: Findings, analysis: Analysis) -> Dataset | None:
    """SEG of the infection in the right and in the left lung; None where nothing is infected."""
    abnormal = codes.SCT.MorphologicallyAbnormalStructure
    return _segmentation(
        volume,
        analysis,
        "infection-seg",
        np.where(findings.lesions > 0, findings.lungs, np.uint8(0)),
        [
            _Segment(RIGHT, "right-infection", "Infection, right lung", abnormal, PNEUMONIA, RIGHT_LUNG),
            _Segment(LEFT, "left-infection", "Infection, left lung", abnormal, PNEUMONIA, LEFT_LUNG),
        ],
        analysis.models[-1],
    )


@dataclass(frozen=True)
class _Segment:
    value: int
    name: str
    label: str
    category: Code
    type: Code
    region: Code | None


#: Kind → offset of the series number, series description, content label.
_SERIES = {
    "infection-seg": (91, "AI infection (SEG)", "AI_INFECTION"),
    "lung-seg": (92, "AI lungs (SEG)", "AI_LUNGS"),
}


def _segmentation(
    volume: Volume,
    analysis: Analysis,
    kind: str,
    values: NDArray[np.uint8],
    segments: list[_Segment],
    model: ModelIdentity,
) -> Dataset | None:
    sizes = np.bincount(values.ravel(), minlength=256)
    present = [segment for segment in segments if sizes[segment.value]]
    if not present:
        return None
    # An absent side shifts the numbers: a gap in them loses the last segment in OHIF.
    numbers = np.zeros(256, np.uint8)
    for number, segment in enumerate(present, 1):
        numbers[segment.value] = number
    offset, series_description, label = _SERIES[kind]
    seg = hd.seg.Segmentation(
        source_images=_grid(volume, analysis),
        pixel_array=numbers[values],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe_segment(number, segment, analysis, model) for number, segment in enumerate(present, 1)
        ],
        series_instance_uid=analysis.uid(kind, "", "series"),
        series_number=offset,
        sop_instance_uid=analysis.uid(kind, "", "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=__version__,
        device_serial_number=analysis.serial_number,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label=label,
        content_description=NOT_FOR_DIAGNOSIS,
        omit_empty_frames=True,
    )
    _name_sources(seg, analysis)
    _fix_dimensions(seg, analysis.uid(kind, "", "dimensions"))
    describe(
        seg,
        analysis,
        kind=kind,
        sop_class_uid=SegmentationStorage,
        modality="SEG",
        series_offset=offset,
        series_description=series_description,
    )
    seg.BodyPartExamined = "CHEST"
    return cast("Dataset", seg)


def _describe_segment(
    number: int, segment: _Segment, analysis: Analysis, model: ModelIdentity
) -> hd.seg.SegmentDescription:
    return hd.seg.SegmentDescription(
        segment_number=number,
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
        anatomic_regions=None if segment.region is None else [segment.region],
        display_color=hd.color.CIELabColor.from_rgb(*COLOURS[segment.name]),
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
    grid = []
    for number, source in enumerate(volume.sources):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, _stand_in(number)
        image.StudyInstanceUID, image.SeriesInstanceUID = volume.study_instance_uid, volume.series_instance_uid
        image.FrameOfReferenceUID = volume.frame_of_reference_uid or analysis.uid("frame of reference")
        image.PositionReferenceIndicator = header.get("PositionReferenceIndicator", "")
        image.Modality, image.Rows, image.Columns = "CT", rows, columns
        image.ImageOrientationPatient = [_ds(cosine) for cosine in axes.T.ravel()]
        image.ImagePositionPatient = [_ds(coordinate) for coordinate in source.position]
        image.PixelSpacing = [_ds(row_spacing), _ds(column_spacing)]
        image.SliceThickness, image.SpacingBetweenSlices = thickness, _ds(slice_spacing)
        image.PatientID = image.PatientName = image.PatientBirthDate = image.PatientSex = ""
        image.StudyID = image.StudyDate = image.StudyTime = image.AccessionNumber = ""
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if keyword in header:
                image[keyword] = header[keyword]
        grid.append(image)
    return grid


def _name_sources(seg: Dataset, analysis: Analysis) -> None:
    """Put the real instances, and frames of multi-frame ones, where the stand-ins of `_grid` are named."""
    references = []
    for source in analysis.unique_instances():
        reference = Dataset()
        reference.ReferencedSOPClassUID = source.sop_class_uid
        reference.ReferencedSOPInstanceUID = source.sop_instance_uid
        references.append(reference)
    seg.SourceImageSequence = Items(references)
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = Items(references)
    real = {_stand_in(number): source for number, source in enumerate(analysis.instances)}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        for item in frame.DerivationImageSequence[0].SourceImageSequence:
            # Segments share the items of a slice, so one may be done already.
            if item.ReferencedSOPInstanceUID not in real:
                continue
            source = real[item.ReferencedSOPInstanceUID]
            item.ReferencedSOPClassUID = source.sop_class_uid
            item.ReferencedSOPInstanceUID = source.sop_instance_uid
            if source.frame is not None:
                item.ReferencedFrameNumber = source.frame


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
