"""Colour capture: the result as pictures, for the many viewers that show neither SEG nor SR.

One Multi-frame True Color Secondary Capture, uncompressed: the first frame is a summary, the others are key slices
from the head down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import MultiFrameTrueColorSecondaryCaptureImageStorage

from node.analysis.findings import Findings
from node.analysis.volume import Volume
from node.results.drawing import PatientView
from node.results.identity import NOT_FOR_DIAGNOSIS, Analysis, describe
from node.results.pages import SIDE, key_page, key_planes, not_analysed_page, summary_page, tile

#: Key slices after the summary: about one every 15 mm of an adult's lungs, and with the summary 37 MB.
KEY_SLICES = 20

#: Series Number is 100 times the source's plus this.
_SERIES_OFFSET = 94


def build(volume: Volume, findings: Findings, analysis: Analysis) -> Dataset:
    """Capture of `findings`; made whether or not something is infected."""
    view = PatientView.of(volume, findings)
    planes = key_planes(view, KEY_SLICES)
    pages = [summary_page(view, findings), *(key_page(view, findings, plane) for plane in planes)]
    labels = ["Summary", *(f"z {view.heights[plane]:.1f} mm" for plane in planes)]
    return _capture(pages, labels, analysis, "AI overview (colour)", "")


def not_analysed(reason: str, analysis: Analysis) -> Dataset:
    """Capture of one page that says why the series was not analysed."""
    return _capture([not_analysed_page(reason)], ["Not analysed"], analysis, "AI: not analysed", reason)


def overlay_png(volume: Volume, findings: Findings, path: Path) -> None:
    """Write a PNG montage: the summary page, and beside it twelve slices from the head down."""
    view = PatientView.of(volume, findings)
    width, height = SIDE * 5 // 12, SIDE // 3
    montage = Image.new("RGB", (SIDE + 4 * width, SIDE))
    montage.paste(summary_page(view, findings), (0, 0))
    for number, plane in enumerate(key_planes(view, 12)):
        montage.paste(tile(view, plane, width, height), (SIDE + number % 4 * width, number // 4 * height))
    montage.save(path)


def _capture(
    pages: Sequence[Image.Image], labels: Sequence[str], analysis: Analysis, series_description: str, variant: str
) -> Dataset:
    capture = Dataset()
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ConversionType = "WSD"
    capture.BodyPartExamined = "CHEST"
    capture.PatientOrientation = None
    capture.BurnedInAnnotation = "YES"
    capture.LossyImageCompression = "00"
    capture.DerivationDescription = NOT_FOR_DIAGNOSIS
    capture.SourceImageSequence = Items(_references(analysis))
    capture.SamplesPerPixel, capture.PhotometricInterpretation, capture.PlanarConfiguration = 3, "RGB", 0
    capture.Rows = capture.Columns = SIDE
    capture.BitsAllocated, capture.BitsStored, capture.HighBit, capture.PixelRepresentation = 8, 8, 7, 0
    capture.NumberOfFrames = len(pages)
    if len(pages) > 1:  # the two may not be there for one frame (PS3.3 C.8.6.3)
        capture.FrameIncrementPointer = tag_for_keyword("FrameLabelVector")
        capture.FrameLabelVector = list(labels)
    pixels = b"".join(np.asarray(page).tobytes() for page in pages)
    capture.PixelData = pixels + b"\0" * (len(pixels) % 2)
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


def _references(analysis: Analysis) -> list[Dataset]:
    items = []
    for source in analysis.unique_instances():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, source.sop_instance_uid
        items.append(item)
    return items
