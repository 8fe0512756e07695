"""Encapsulated PDF: the summary as a printed page, for archives and letters; Modality DOC.

The text is text, so that it can be searched and copied, and the typeface is embedded. No patient attributes are
printed: those are in the object's header, where an archive can correct them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image as Picture
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import EncapsulatedPDFStorage
from reportlab import rl_config
from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import Flowable, Image, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from node import __version__
from node.images.volume import Volume
from node.methods.pneumonia.findings import Findings
from node.results.capture.drawing import PatientView, axial, projection
from node.results.capture.maker import references
from node.results.capture.typesetting import MEDIUM, REGULAR, font_file, typographic
from node.results.provenance import MODEL_NAME, NOT_FOR_DIAGNOSIS, Analysis, code_item, describe
from node.results.trend import Earlier, course
from node.results.wording import LIMITS, coverage, rules, summary

#: Pictures as bytes, not as text of five letters for four bytes: a fifth smaller, and encoded in no time.
rl_config.useA85 = 0

_TITLE = "Chest CT: lungs and pneumonia infection"

#: Dark grey for what matters less, and a dark orange that warns and still reads on white paper.
_DIM, _WARN, _RULE = HexColor(0x555B63), HexColor(0x9A4B00), HexColor(0xC4C8CD)

#: Between the margins, less what the frame keeps free inside them.
_WIDTH = A4[0] - 36 * mm - 12


def build(
    volume: Volume, view: PatientView, findings: Findings, analysis: Analysis, earlier: Sequence[Earlier] = ()
) -> Dataset:
    """Document of `findings`; made whether or not something is infected."""
    pdf = _pdf(volume, view, findings, analysis, earlier)
    document = Dataset()
    document.ConversionType = "WSD"
    document.AcquisitionDateTime = None
    document.BurnedInAnnotation = "NO"
    document.SourceInstanceSequence = Items(references(analysis))
    document.DocumentTitle = _TITLE
    document.ConceptNameCodeSequence = Items([code_item(Code("18748-4", "LN", "Diagnostic imaging report"))])
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocumentLength = len(pdf)
    document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    describe(
        document,
        analysis,
        kind="pdf",
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        series_offset=95,
        series_description="AI summary (PDF)",
    )
    return document


def _pdf(
    volume: Volume, view: PatientView, findings: Findings, analysis: Analysis, earlier: Sequence[Earlier]
) -> bytes:
    for weight in (REGULAR, MEDIUM):
        if weight not in pdfmetrics.getRegisteredFontNames():
            pdfmetrics.registerFont(TTFont(weight, font_file(weight)))
    text = ParagraphStyle("text", fontName=REGULAR, fontSize=9.5, leading=13)
    strong = ParagraphStyle("strong", text, fontName=MEDIUM, fontSize=11.5, leading=16)
    small = ParagraphStyle("small", text, fontSize=8, leading=11, textColor=_DIM)
    warning = ParagraphStyle("warning", text, fontName=MEDIUM, textColor=_WARN)
    title = ParagraphStyle("title", strong, fontSize=17, leading=22)
    told: list[Flowable] = [
        _paragraph(_TITLE, title),
        _paragraph(NOT_FOR_DIAGNOSIS, warning),
        Spacer(0, 3 * mm),
        _paragraph(summary(findings), strong),
        Spacer(0, 2 * mm),
        _regions(findings, text),
        Spacer(0, 3 * mm),
    ]
    for rule in (*rules(findings), *course(earlier, findings)):
        told.append(_paragraph(f"{rule.name}: {rule.outcome}", text))
        told.append(_paragraph(f"{rule.inputs}; {rule.limit}", small))
    told += [_paragraph(f"Note: {note}", warning) for note in findings.notes]
    told += [Spacer(0, 4 * mm), _pictures(view, small), Spacer(0, 4 * mm)]
    told += [_paragraph(" ".join(coverage(volume, findings, analysis.header)), small), Spacer(0, 1 * mm)]
    told.append(_paragraph(LIMITS, small))
    models = "; ".join(f"{model.name} {model.version} (sha256 {model.sha256[:12]}…)" for model in findings.models)
    told.append(_paragraph(f"Made by {MODEL_NAME} {__version__} with the models {models}.", small))
    made = io.BytesIO()
    # invariant: no date of making and no random identifier, so that the same findings give the same bytes.
    SimpleDocTemplate(
        made,
        pagesize=A4,
        leftMargin=18 * mm,
        rightMargin=18 * mm,
        topMargin=15 * mm,
        bottomMargin=15 * mm,
        title=_TITLE,
        author=f"{MODEL_NAME} {__version__}",
        subject=NOT_FOR_DIAGNOSIS,
        lang="en",
        invariant=1,
    ).build(told)
    return made.getvalue()


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    escaped = typographic(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Paragraph(escaped, style)


def _regions(findings: Findings, style: ParagraphStyle) -> Table:
    rows = [["", "Lung, ml", "Infected, ml", "Infected, %", "Lung, HU", "Infected, HU"]]
    for name, region in (("Right lung", findings.right), ("Left lung", findings.left), ("Both lungs", findings.both)):
        numbers = (
            (region.volume_ml, 0),
            (region.infected_ml, 1),
            (100 * region.infected_share, 1),
            (region.mean_hu, 0),
            (region.infected_mean_hu, 0),
        )
        # nan, the mean of nothing, is the one number that differs from itself.
        cells = ("–" if value != value else typographic(f"{value:.{decimals}f}") for value, decimals in numbers)
        rows.append([name, *cells])
    return Table(
        rows,
        hAlign="LEFT",
        colWidths=[_WIDTH * share for share in (0.25, 0.15, 0.15, 0.15, 0.15, 0.15)],
        style=TableStyle(
            [
                ("FONT", (0, 0), (-1, -1), REGULAR, style.fontSize),
                ("TEXTCOLOR", (0, 0), (-1, 0), _DIM),
                ("ALIGN", (1, 0), (-1, -1), "RIGHT"),
                ("LINEBELOW", (0, 0), (-1, 0), 0.5, _RULE),
                ("LINEBELOW", (0, -1), (-1, -1), 0.5, _RULE),
                ("LEFTPADDING", (0, 0), (0, -1), 0),
                ("RIGHTPADDING", (-1, 0), (-1, -1), 0),
            ]
        ),
    )


def _pictures(view: PatientView, style: ParagraphStyle) -> Table:
    """Three pictures beside each other, each with its caption."""
    infected = bool(view.infection.any())
    plane = int(view.infected_area.argmax()) if infected else int(view.lung_planes[view.lung_planes.size // 2])
    which = "most infected slice" if infected else "middle of the lungs"
    # Three pixels a point, 216 an inch: as fine as the slices are.
    side = _WIDTH / 3 - 2 * mm
    pixels = round(side * 3)
    pictures = [projection(view, "front", pixels, pixels), projection(view, "below", pixels, pixels)]
    pictures.append(axial(view, plane, pixels, pixels))
    captions = ("From the front, all slices", "From below, all slices", f"{which}, z {view.heights[plane]:.1f} mm")
    return Table(
        [
            [_picture(picture, side) for picture in pictures],
            [_paragraph(caption[0].upper() + caption[1:], style) for caption in captions],
        ],
        hAlign="LEFT",
        colWidths=[_WIDTH / 3] * 3,
        style=TableStyle([("LEFTPADDING", (0, 0), (-1, -1), 0), ("RIGHTPADDING", (0, 0), (-1, -1), 0)]),
    )


def _picture(picture: Picture.Image, side: float) -> Image:
    file = io.BytesIO()
    picture.save(file, "PNG")
    file.seek(0)
    return Image(file, side, side, hAlign="LEFT")
