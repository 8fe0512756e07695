"""Encapsulated PDF: the summary as a printed page, for archives and letters; Modality DOC.

The text is text, so that it can be searched and copied, and the typeface is embedded. No patient attributes are
printed: those are in the object's header, where an archive can correct them.
"""

from __future__ import annotations

import io

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
from node.identity import MODEL_NAME
from node.methods.outcome import Table as Numbers
from node.methods.outcome import cell
from node.results.capture.drawing import PatientView, axial, projection
from node.results.capture.typesetting import MEDIUM, REGULAR, font_file, typographic
from node.results.coverage import coverage
from node.results.forms import Profile
from node.results.making import Making, Naming
from node.results.provenance import NOT_FOR_DIAGNOSIS, code_item, describe
from node.results.references import sources
from node.results.trend import rows

#: Pictures as bytes, not as text of five letters for four bytes: a fifth smaller, and encoded in no time.
rl_config.useA85 = 0

#: Dark grey for what matters less, and a dark orange that warns and still reads on white paper.
_DIM, _WARN, _RULE = HexColor(0x555B63), HexColor(0x9A4B00), HexColor(0xC4C8CD)

#: Between the margins, less what the frame keeps free inside them.
_WIDTH = A4[0] - 36 * mm - 12


def build(making: Making, naming: Naming, _profile: Profile) -> Dataset:
    """Document of the outcome; made whether or not something was found."""
    pdf, analysis = _pdf(making), making.analysis
    document = Dataset()
    document.ConversionType = "WSD"
    document.AcquisitionDateTime = None
    document.BurnedInAnnotation = "NO"
    document.SourceInstanceSequence = Items(sources(analysis))
    document.DocumentTitle = making.outcome.title
    document.ConceptNameCodeSequence = Items([code_item(Code("18748-4", "LN", "Diagnostic imaging report"))])
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocumentLength = len(pdf)
    document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    describe(
        document,
        analysis,
        kind=naming.kind,
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        series_offset=naming.offset,
        series_description="AI summary (PDF)",
        variant=naming.variant,
    )
    return document


def _pdf(making: Making) -> bytes:
    outcome = making.outcome
    for weight in (REGULAR, MEDIUM):
        if weight not in pdfmetrics.getRegisteredFontNames():
            pdfmetrics.registerFont(TTFont(weight, font_file(weight)))
    text = ParagraphStyle("text", fontName=REGULAR, fontSize=9.5, leading=13)
    strong = ParagraphStyle("strong", text, fontName=MEDIUM, fontSize=11.5, leading=16)
    small = ParagraphStyle("small", text, fontSize=8, leading=11, textColor=_DIM)
    warning = ParagraphStyle("warning", text, fontName=MEDIUM, textColor=_WARN)
    title = ParagraphStyle("title", strong, fontSize=17, leading=22)
    told: list[Flowable] = [
        _paragraph(outcome.title, title),
        _paragraph(NOT_FOR_DIAGNOSIS, warning),
        Spacer(0, 3 * mm),
        _paragraph(outcome.headline, strong),
        Spacer(0, 2 * mm),
        _table(outcome.table, text),
        Spacer(0, 3 * mm),
    ]
    for one in rows(outcome, making.earlier):
        told.append(_paragraph(f"{one.name}: {one.verdict}", text))
        told.append(_paragraph(f"{one.inputs}; {one.limits}", small))
    told += [_paragraph(f"Note: {note}", warning) for note in outcome.notes]
    told += [Spacer(0, 4 * mm), _pictures(making.view, small), Spacer(0, 4 * mm)]
    shown = " ".join(coverage(making.volume, outcome, making.analysis.header))
    told += [_paragraph(shown, small), Spacer(0, 1 * mm)]
    told.append(_paragraph(outcome.limits, small))
    models = "; ".join(f"{model.name} {model.version} (sha256 {model.sha256[:12]}…)" for model in outcome.models)
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
        title=outcome.title,
        author=f"{MODEL_NAME} {__version__}",
        subject=NOT_FOR_DIAGNOSIS,
        lang="en",
        invariant=1,
    ).build(told)
    return made.getvalue()


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    escaped = typographic(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Paragraph(escaped, style)


def _table(table: Numbers, style: ParagraphStyle) -> Table:
    cells = [["", *(column.heading for column in table.columns)]]
    for row in table.rows:
        numbers = (cell(column, value) for column, value in zip(table.columns, row.values, strict=True))
        cells.append([row.name, *(typographic(number) for number in numbers)])
    others = 0.75 / len(table.columns)
    return Table(
        cells,
        hAlign="LEFT",
        colWidths=[_WIDTH * share for share in (0.25, *(others for _ in table.columns))],
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
    tinted, words = bool(view.tinted.any()), view.pictures
    plane = int(view.tinted_area.argmax()) if tinted else int(view.planes[view.planes.size // 2])
    which = words.most if tinted else words.middle
    # Three pixels a point, 216 an inch: as fine as the slices are.
    side = _WIDTH / 3 - 2 * mm
    pixels = round(side * 3)
    pictures = [projection(view, "front", pixels, pixels), projection(view, "below", pixels, pixels)]
    pictures.append(axial(view, plane, pixels, pixels))
    captions = ("From the front, all slices", "From below, all slices", f"{which}, z {view.heights[plane]:.1f} mm")
    return Table(
        [
            [_picture(picture, side) for picture in pictures],
            [_paragraph(caption, style) for caption in captions],
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
