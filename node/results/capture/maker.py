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

from node.methods.outcome import Outcome
from node.results.capture.drawing import PatientView
from node.results.capture.pages import SIDE, key_planes, not_analysed_page, planes_of, slice_page, summary_page, tile
from node.results.forms import Profile
from node.results.making import Making, Naming
from node.results.provenance import NOT_FOR_DIAGNOSIS, Analysis, describe, set_body_part
from node.results.references import sources


def build(making: Making, naming: Naming, profile: Profile) -> Dataset:
    """Capture of the outcome; made whether or not something was found."""
    view, outcome = making.view, making.outcome
    planes = planes_of(view, profile.capture)
    labels = ["Summary", *(f"z {view.heights[plane]:.1f} mm" for plane in planes)]

    def pages() -> Iterable[Image.Image]:
        yield summary_page(view, outcome, making.earlier)
        for plane in planes:
            yield slice_page(view, outcome, plane)

    return _capture(pages(), labels, making.analysis, "AI overview (colour)", naming)


def not_analysed(reason: str, analysis: Analysis, offset: int) -> Dataset:
    """Capture of one page that says why the series was not analysed; `offset` as of `describe`."""
    page = not_analysed_page(reason, analysis.subject)
    return _capture([page], ["Not analysed"], analysis, "AI: not analysed", Naming("capture", offset, reason))


def overlay_png(view: PatientView, outcome: Outcome, path: Path) -> None:
    """Write a PNG montage: the summary page, and beside it twelve slices from the head down."""
    width, height = SIDE * 5 // 12, SIDE // 3
    montage = Image.new("RGB", (SIDE + 4 * width, SIDE))
    montage.paste(summary_page(view, outcome), (0, 0))
    for number, plane in enumerate(key_planes(view, 12)):
        montage.paste(tile(view, plane, width, height), (SIDE + number % 4 * width, number // 4 * height))
    montage.save(path)


def _capture(
    pages: Iterable[Image.Image], labels: Sequence[str], analysis: Analysis, series_description: str, naming: Naming
) -> Dataset:
    capture = Dataset()
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ConversionType = "WSD"
    set_body_part(capture, analysis.subject)
    capture.PatientOrientation = None
    # No text on the pages says who the patient is (PS3.3 C.7.6.1.1).
    capture.BurnedInAnnotation = "NO"
    capture.LossyImageCompression = "00"
    capture.DerivationDescription = NOT_FOR_DIAGNOSIS
    capture.SourceImageSequence = Items(sources(analysis))
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
        kind=naming.kind,
        sop_class_uid=MultiFrameTrueColorSecondaryCaptureImageStorage,
        modality="OT",
        series_offset=naming.offset,
        series_description=series_description,
        variant=naming.variant,
    )
    return capture
