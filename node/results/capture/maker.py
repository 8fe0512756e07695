"""Colour capture: the result as pictures, for the many viewers that show neither SEG nor SR.

One Multi-frame True Color Secondary Capture, uncompressed: the first frame is a summary, the others are slices from
the head down: key images, every slice, or one every so many mm, as the peer asks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import MultiFrameTrueColorSecondaryCaptureImageStorage

from node.methods.pneumonia.findings import Findings
from node.results.capture.drawing import PatientView
from node.results.capture.pages import SIDE, key_planes, not_analysed_page, planes_of, slice_page, summary_page, tile
from node.results.forms import Profile
from node.results.provenance import NOT_FOR_DIAGNOSIS, Analysis, describe
from node.results.trend import Earlier

#: Series Number is 100 times the source's plus this.
_SERIES_OFFSET = 94


def build(
    view: PatientView, findings: Findings, analysis: Analysis, profile: Profile, earlier: Sequence[Earlier] = ()
) -> Dataset:
    """Capture of `findings`; made whether or not something is infected."""
    planes = planes_of(view, profile.capture)
    labels = ["Summary", *(f"z {view.heights[plane]:.1f} mm" for plane in planes)]

    def pages() -> Iterable[Image.Image]:
        yield summary_page(view, findings, earlier)
        for plane in planes:
            yield slice_page(view, findings, plane)

    return _capture(pages(), labels, analysis, "AI overview (colour)", profile.form("capture"))


def not_analysed(reason: str, analysis: Analysis) -> Dataset:
    """Capture of one page that says why the series was not analysed."""
    return _capture([not_analysed_page(reason)], ["Not analysed"], analysis, "AI: not analysed", reason)


def overlay_png(view: PatientView, findings: Findings, path: Path) -> None:
    """Write a PNG montage: the summary page, and beside it twelve slices from the head down."""
    width, height = SIDE * 5 // 12, SIDE // 3
    montage = Image.new("RGB", (SIDE + 4 * width, SIDE))
    montage.paste(summary_page(view, findings), (0, 0))
    for number, plane in enumerate(key_planes(view, 12)):
        montage.paste(tile(view, plane, width, height), (SIDE + number % 4 * width, number // 4 * height))
    montage.save(path)


def _capture(
    pages: Iterable[Image.Image], labels: Sequence[str], analysis: Analysis, series_description: str, variant: str
) -> Dataset:
    capture = Dataset()
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ConversionType = "WSD"
    capture.BodyPartExamined = "CHEST"
    capture.PatientOrientation = None
    # No text on the pages says who the patient is (PS3.3 C.7.6.1.1).
    capture.BurnedInAnnotation = "NO"
    capture.LossyImageCompression = "00"
    capture.DerivationDescription = NOT_FOR_DIAGNOSIS
    capture.SourceImageSequence = Items(references(analysis))
    capture.SamplesPerPixel, capture.PhotometricInterpretation, capture.PlanarConfiguration = 3, "RGB", 0
    capture.Rows = capture.Columns = SIDE
    capture.BitsAllocated, capture.BitsStored, capture.HighBit, capture.PixelRepresentation = 8, 8, 7, 0
    capture.NumberOfFrames = len(labels)
    if len(labels) > 1:  # the two may not be there for one frame (PS3.3 C.8.6.3)
        capture.FrameIncrementPointer = tag_for_keyword("FrameLabelVector")
        capture.FrameLabelVector = list(labels)
    # On disk until the object is written: a capture of every slice is larger than the series.
    frames = tempfile.TemporaryFile()  # noqa: SIM115 - the data set reads it when it is written
    for page in pages:
        frames.write(np.asarray(page).tobytes())
    frames.seek(0)
    capture.PixelData = frames
    capture["PixelData"].VR = "OB"
    describe(
        capture,
        analysis,
        kind="capture",
        sop_class_uid=MultiFrameTrueColorSecondaryCaptureImageStorage,
        modality="OT",
        series_offset=_SERIES_OFFSET,
        series_description=series_description,
        variant=variant,
    )
    return capture


def references(analysis: Analysis) -> list[Dataset]:
    """The source instances, as items of Source Image and Source Instance Sequence."""
    items = []
    for source in analysis.unique_instances():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, source.sop_instance_uid
        items.append(item)
    return items
