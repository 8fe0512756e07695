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

from node import __version__
from node.images.volume import Volume
from node.methods.pneumonia.findings import LEFT, RIGHT, Findings
from node.results.forms import Profile, SegForm
from node.results.provenance import MANUFACTURER, MODEL_NAME, NOT_FOR_DIAGNOSIS, Analysis, describe, uid_of

#: SOP class of LABELMAP segmentations (PS3.4 B.5), younger than pydicom's names.
LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"

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


@dataclass(frozen=True)
class Segment:
    """One segment of a segmentation, as it is numbered there."""

    number: int
    #: Value of its voxels in `Findings.lungs`.
    side: int
    name: str
    label: str


def segments(kind: str, findings: Findings) -> list[Segment]:
    """The segments of a segmentation, numbered from 1; empty where it has nothing to show.

    The lungs' are what is left beside the infection, so that no voxel lies in two segments, of either series.
    """
    part, label = ("infection", "Infection, {} lung") if kind == "infection-seg" else ("lung", "{} lung, not infected")
    sides = []
    for side, word, region in ((RIGHT, "right", findings.right), (LEFT, "left", findings.left)):
        # Both are a number of voxels times the same factor, so they are equal where the whole lung is infected.
        if region.infected_ml > 0 if part == "infection" else region.volume_ml > region.infected_ml:
            text = label.format(word)
            sides.append((side, f"{word}-{part}", text[0].upper() + text[1:]))
    # An absent side shifts the numbers: a gap in them loses the last segment in OHIF.
    return [Segment(number, *named) for number, named in enumerate(sides, 1)]


def sop_class_uid(form: SegForm) -> str:
    """SOP Class UID of a segmentation in this form."""
    return LABELMAP_STORAGE if form == "labelmap" else str(SegmentationStorage)


def build(volume: Volume, findings: Findings, analysis: Analysis, kind: str, form: SegForm) -> Dataset | None:
    """SEG of one kind; None where it would be empty."""
    present = segments(kind, findings)
    if not present:
        return None
    labelmap = form == "labelmap"
    variant = Profile(seg=form).form(kind)
    offset, series_description, label = _SERIES[kind]
    seg = hd.seg.Segmentation(
        source_images=_grid(volume, analysis),
        pixel_array=labels(kind, findings),
        segmentation_type=hd.seg.SegmentationTypeValues.LABELMAP if labelmap else hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe_segment(segment, analysis) for segment in present],
        series_instance_uid=analysis.uid(kind, variant, "series"),
        series_number=offset,
        sop_instance_uid=analysis.uid(kind, variant, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=__version__,
        device_serial_number=analysis.serial_number,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label=label,
        content_description=NOT_FOR_DIAGNOSIS,
        omit_empty_frames=form != "binary-all-frames",
    )
    if labelmap:
        # highdicom describes the background as a segment 0, which shifts the colours in OHIF. Pixel Padding Value
        # says that 0 is none (PS3.3 C.8.20.2).
        seg["SegmentSequence"].value = Items(item for item in seg.SegmentSequence if item.SegmentNumber != 0)
    _name_sources(seg, analysis)
    _fix_dimensions(seg, analysis.uid(kind, variant, "dimensions"))
    describe(
        seg,
        analysis,
        kind=kind,
        sop_class_uid=sop_class_uid(form),
        modality="SEG",
        series_offset=offset,
        series_description=series_description,
        variant=variant,
    )
    seg.BodyPartExamined = "CHEST"
    return cast("Dataset", seg)


def labels(kind: str, findings: Findings) -> NDArray[np.uint8]:
    """Segment number of every voxel, 0 for none, by `segments`."""
    present = segments(kind, findings)
    values = np.zeros(findings.lungs.shape, np.uint8)
    # Slice by slice: whole arrays in between would cost three times the memory, and the time to fetch it.
    for lungs, lesions, plane in zip(findings.lungs, findings.lesions, values, strict=True):
        here = lesions > 0 if kind == "infection-seg" else lesions == 0
        if not here.any():
            continue
        for segment in present:
            plane += np.uint8(segment.number) * (here & (lungs == segment.side))
    return values


#: Kind → offset of the series number, series description, content label.
_SERIES = {
    "infection-seg": (91, "AI infection (SEG)", "AI_INFECTION"),
    "lung-seg": (92, "AI lungs (SEG)", "AI_LUNGS"),
}


def _describe_segment(segment: Segment, analysis: Analysis) -> hd.seg.SegmentDescription:
    lung = RIGHT_LUNG if segment.side == RIGHT else LEFT_LUNG
    infected = segment.name.endswith("infection")
    model = analysis.models[-1 if infected else 0]
    return hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.label,
        segmented_property_category=(
            codes.SCT.MorphologicallyAbnormalStructure if infected else codes.SCT.AnatomicalStructure
        ),
        segmented_property_type=PNEUMONIA if infected else lung,
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
        anatomic_regions=[lung] if infected else None,
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
