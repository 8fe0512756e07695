"""Structured report (TID 1500) of the measurements and of the statement about the scan.

Its form is what viewers were measured to open: a closed SCOORD outline on one source slice in every measurement
group (OHIF stops at a group without one), source slices given as evidence only, and, since OHIF shows of a
measurement no more than name, value and unit, one measurement in each group whose name says what the group is.

The groups are the right lung, the left lung, the infection as a whole, and its `LARGEST_LESIONS` largest lesions.
A volume names the segments that it was measured on, where the peer has them (as source of measurement, since TID 1411
takes an outline or a segment, never both); the tracking UIDs of the lungs are those of the segments.
What the scan-level rules say stands, as numbers and codes, in the infection's group (in the first lung's, where
nothing is infected) and, as sentences with their inputs and thresholds, under Qualitative Evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import highdicom as hd
import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage

from node import __version__
from node.images.volume import Volume
from node.methods.pneumonia.findings import LEFT, RIGHT, Findings, Lesion, Region
from node.results.contour import outer_contour
from node.results.forms import SEGMENTATIONS, Profile
from node.results.provenance import MANUFACTURER, MODEL_NAME, NOT_FOR_DIAGNOSIS, Analysis, describe, uid_of
from node.results.segmentation import LEFT_LUNG, PNEUMONIA, RIGHT_LUNG, segments, sop_class_uid
from node.results.wording import LIMITS, coverage, sentences

#: Lesions that get a measurement group, largest first; the others count in the sums only. A viewer lists a row for
#: each, and more than ten hide the lungs' own.
LARGEST_LESIONS = 10

#: Coding scheme of the codes below; described in each report's Coding Scheme Identification Sequence.
PRIVATE_SCHEME = "99LUNGNODE"

#: The private codes: what no standard scheme has a code for. A value keeps its meaning for ever.
PRIVATE_CODES = {
    "101": "Right lung infected share",
    "102": "Right lung infected volume",
    "103": "Left lung infected share",
    "104": "Left lung infected volume",
    "105": "Infected share of both lungs",
    "106": "Lesion infection probability",
    "107": "Lesion share of its lung",
    "201": "Slices with infection",
    "202": "Longest run of slices with infection",
    "203": "Length of longest run of slices with infection",
    "204": "Lesion boxes per lung area",
    "205": "Lesion boxes",
    "206": "Scan infection probability (Noisy-OR)",
    "211": "Consecutive slices rule",
    "212": "Intensity rule",
    "221": "Alarming",
    "222": "Not COVID-19-like",
    "231": "Image quality and coverage",
}


def build(volume: Volume, findings: Findings, analysis: Analysis, profile: Profile) -> Dataset | None:
    """Report of `findings`; None where no lung was found, as a group needs an outline on a slice."""
    sources = _Segments(findings, analysis, profile)
    groups = list(_groups(findings, analysis, sources))
    if not groups:
        return None
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=_device(analysis)),
        procedure_reported=Code("169069000", "SCT", "CT of chest"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    root = report[0]
    root.ContentSequence.append(_evaluations(volume, findings, analysis))
    comprehensive = profile.sr == "comprehensive"
    variant = profile.form("sr")
    document = (hd.sr.ComprehensiveSR if comprehensive else hd.sr.Comprehensive3DSR)(
        evidence=[*_evidence(analysis), *sources.evidence()],
        content=root,
        series_instance_uid=analysis.uid("sr", variant, "series"),
        series_number=93,
        sop_instance_uid=analysis.uid("sr", variant, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        coding_schemes=[
            CodingSchemeIdentificationItem(
                designator=PRIVATE_SCHEME,
                name="Private codes of lungnode",
                uid=uid_of("coding scheme"),
                responsible_organization=MANUFACTURER,
            )
        ],
    )
    _separate(document)
    describe(
        document,
        analysis,
        kind="sr",
        sop_class_uid=ComprehensiveSRStorage if comprehensive else Comprehensive3DSRStorage,
        modality="SR",
        series_offset=93,
        series_description="AI measurements (SR)",
        variant=variant,
    )
    return cast("Dataset", document)


class _Segments:
    """The segments that a peer gets with the report, as sources of its measurements."""

    def __init__(self, findings: Findings, analysis: Analysis, profile: Profile) -> None:
        self._analysis = analysis
        self._sop_class_uid = sop_class_uid(profile.seg)
        self._variant = {kind: profile.form(kind) for kind in SEGMENTATIONS if kind in profile.kinds}
        self._segments = {kind: segments(kind, findings) for kind in self._variant}

    def source(self, measurement: hd.sr.Measurement | None, kind: str, *sides: int) -> hd.sr.Measurement | None:
        """`measurement` with the segments of these sides as its source (TID 320, INFERRED FROM)."""
        numbers = [segment.number for segment in self._segments.get(kind, ()) if segment.side in sides]
        if measurement is not None and numbers:
            image = hd.sr.ImageContentItem(
                name=Code("121112", "DCM", "Source of Measurement"),
                referenced_sop_class_uid=self._sop_class_uid,
                referenced_sop_instance_uid=self._analysis.uid(kind, self._variant[kind], "instance"),
                referenced_segment_numbers=numbers,
                relationship_type=hd.sr.RelationshipTypeValues.INFERRED_FROM,
            )
            (item,) = measurement
            item.ContentSequence = hd.sr.ContentSequence([*item.get("ContentSequence", []), image])
        return measurement

    def evidence(self) -> Iterator[Dataset]:
        """Names of the segmentations that are referred to."""
        for kind, variant in self._variant.items():
            if self._segments[kind]:
                uids = (self._analysis.uid(kind, variant, what) for what in ("instance", "series"))
                yield _named(self._analysis, self._sop_class_uid, *uids)


#: UCUM units (PS3.16 CID 82). OHIF shows the code, so shares and probabilities are % and not the bare '1'.
_ML = Code("ml", "UCUM", "ml")
_PERCENT = Code("%", "UCUM", "%")
_HU = Code("[hnsf'U]", "UCUM", "HU")
_MM = Code("mm", "UCUM", "mm")
_SLICES = Code("{slices}", "UCUM", "slices")
_BOXES = Code("{boxes}", "UCUM", "boxes")

_MEAN_HU = Code("112181", "DCM", "Mean Attenuation Coefficient")
#: Concept of the sentences on quality and coverage; no standard scheme has one for CT.
_QUALITY = Code("231", PRIVATE_SCHEME, PRIVATE_CODES["231"])
_POSITIVE, _NEGATIVE = Code("10828004", "SCT", "Positive"), Code("260385009", "SCT", "Negative")


def _private(value: str) -> Code:
    return Code(value, PRIVATE_SCHEME, PRIVATE_CODES[value])


def _groups(
    findings: Findings, analysis: Analysis, sources: _Segments
) -> Iterator[hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations]:
    infection = _largest_outline((plane > 0 for plane in findings.lesions), analysis)
    # The statement about the scan goes with the infection, and without one with the first lung.
    pending = None if infection else _scan_level(findings)
    for value, name, region, code in (
        (RIGHT, "Right lung", findings.right, RIGHT_LUNG),
        (LEFT, "Left lung", findings.left, LEFT_LUNG),
    ):
        outline = _largest_outline((plane == value for plane in findings.lungs), analysis)
        if outline:
            yield _group(
                analysis,
                f"{name.lower().replace(' ', '-')}",
                name,
                code,
                _site(name.split()[0]),
                outline,
                _lung_measurements(region, name, value, sources),
                pending,
            )
            pending = None
    if infection:
        yield _group(
            analysis,
            "infection",
            "Infection, both lungs",
            PNEUMONIA,
            hd.sr.FindingSite(anatomic_location=codes.SCT.Lung),
            infection,
            [
                _measure(_private("105"), 100 * findings.both.infected_share, _PERCENT, 2),
                sources.source(
                    _measure(codes.SCT.Volume, findings.both.infected_ml, _ML, 2), "infection-seg", RIGHT, LEFT
                ),
                _measure(_MEAN_HU, findings.both.infected_mean_hu, _HU, 1),
            ],
            _scan_level(findings),
        )
    for lesion in findings.lesion_list[:LARGEST_LESIONS]:
        yield _lesion_group(findings, lesion, analysis, sources)


def _lesion_group(
    findings: Findings, lesion: Lesion, analysis: Analysis, sources: _Segments
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    plane = findings.lesions[lesion.key_slice] == lesion.label
    box = tuple(slice(*lesion.box[n : n + 2]) for n in (0, 2, 4))
    # A lesion may reach across where the lungs touch, and then lies in the segments of both.
    sides = np.unique(findings.lungs[box][findings.lesions[box] == lesion.label]).tolist()
    lung = (findings.left if lesion.side == "left" else findings.right).volume_ml
    return _group(
        analysis,
        f"lesion-{lesion.label}",
        f"Lesion {lesion.label}, {lesion.side} lung",
        PNEUMONIA,
        _site(lesion.side.capitalize()),
        _outline(plane, lesion.key_slice, analysis),
        [
            _measure(_private("106"), 100 * lesion.probability, _PERCENT, 1),
            sources.source(_measure(codes.SCT.Volume, lesion.volume_ml, _ML, 2), "infection-seg", *sides),
            _measure(_private("107"), 100 * lesion.volume_ml / lung if lung else float("nan"), _PERCENT, 2),
            _measure(_MEAN_HU, lesion.mean_hu, _HU, 1),
        ],
        None,
    )


def _group(
    analysis: Analysis,
    name: str,
    label: str,
    finding: Code,
    site: hd.sr.FindingSite,
    region: hd.sr.ImageRegion,
    measurements: list[hd.sr.Measurement | None],
    scan_level: tuple[list[hd.sr.Measurement | None], list[hd.sr.QualitativeEvaluation]] | None,
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    numbers, evaluations = scan_level or ([], [])
    model = analysis.models[0 if name.endswith("-lung") else -1]
    tracking_uid = analysis.uid("tracking", name)
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        # The UIDs of the lungs are those of the segments, which ties the two objects together.
        tracking_identifier=hd.sr.TrackingIdentifier(uid=tracking_uid, identifier=label),
        referenced_regions=[region],
        finding_type=finding,
        finding_sites=[site],
        algorithm_id=hd.sr.AlgorithmIdentification(
            name=model.name,
            version=model.version,
            parameters=[f"sha256={model.sha256}"],
            family=codes.DCM.ArtificialIntelligence,
            manufacturer=MANUFACTURER,
        ),
        measurements=[each for each in (*measurements, *numbers) if each is not None],
        qualitative_evaluations=evaluations,
    )


def _lung_measurements(region: Region, name: str, side: int, sources: _Segments) -> list[hd.sr.Measurement | None]:
    share, infected = ("101", "102") if name == "Right lung" else ("103", "104")
    return [
        _measure(_private(share), 100 * region.infected_share, _PERCENT, 2),
        sources.source(_measure(_private(infected), region.infected_ml, _ML, 2), "infection-seg", side),
        # The whole lung: its segment and, where it is infected, the infection's.
        sources.source(
            sources.source(_measure(codes.SCT.Volume, region.volume_ml, _ML, 1), "lung-seg", side),
            "infection-seg",
            side,
        ),
        _measure(_MEAN_HU, region.mean_hu, _HU, 1),
    ]


def _scan_level(
    findings: Findings,
) -> tuple[list[hd.sr.Measurement | None], list[hd.sr.QualitativeEvaluation]]:
    """Inputs and outcomes of the rules, as numbers and as codes."""
    consecutive, intensity, noisy_or = findings.scan.consecutive, findings.scan.intensity, findings.scan.noisy_or
    grades = {"Alarming": _private("221"), "Mild": codes.SCT.Mild, "not COVID-19-like": _private("222")}
    numbers = [
        _measure(_private("201"), consecutive.positive_slices, _SLICES, 0),
        _measure(_private("202"), consecutive.longest_run, _SLICES, 0),
        _measure(_private("203"), consecutive.longest_run_mm, _MM, 1),
        _measure(_private("204"), 100 * intensity.ratio, _PERCENT, 2),
        _measure(_private("205"), intensity.boxes, _BOXES, 0),
        _measure(_private("206"), 100 * noisy_or.probability, _PERCENT, 2),
    ]
    evaluations = [
        hd.sr.QualitativeEvaluation(_private("211"), _POSITIVE if consecutive.positive else _NEGATIVE),
        hd.sr.QualitativeEvaluation(_private("212"), grades[intensity.grade]),
    ]
    return numbers, evaluations


def _measure(name: Code, value: float, unit: Code, decimals: int) -> hd.sr.Measurement | None:
    """A measurement; None where there is no number to give, such as the mean HU of nothing."""
    if not np.isfinite(value):
        return None
    return hd.sr.Measurement(name=name, value=round(float(value), decimals) if decimals else round(value), unit=unit)


def _site(side: str) -> hd.sr.FindingSite:
    laterality = codes.SCT.Right if side == "Right" else codes.SCT.Left
    return hd.sr.FindingSite(anatomic_location=codes.SCT.Lung, laterality=laterality)


def _largest_outline(planes: Iterable[NDArray[np.bool_]], analysis: Analysis) -> hd.sr.ImageRegion | None:
    """Outline on the plane that shows most, the first of equal ones; None where none shows anything."""
    most, largest = 0, None
    for index, plane in enumerate(planes):
        if (area := int(np.count_nonzero(plane))) > most:
            most, largest = area, (plane, index)
    return _outline(*largest, analysis) if largest else None


def _outline(plane: NDArray[np.bool_], index: int, analysis: Analysis) -> hd.sr.ImageRegion:
    source = analysis.instances[index]
    return hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=outer_contour(plane),
        source_image=hd.sr.SourceImageForRegion(
            source.sop_class_uid,
            source.sop_instance_uid,
            None if source.frame is None else [source.frame],
        ),
    )


def _evaluations(volume: Volume, findings: Findings, analysis: Analysis) -> hd.sr.ContainerContentItem:
    """Qualitative Evaluations of the whole scan, as sentences (TID 1500 rows 12 to 14)."""
    container = hd.sr.ContainerContentItem(
        name=Code("C0034375", "UMLS", "Qualitative Evaluations"),
        relationship_type=hd.sr.RelationshipTypeValues.CONTAINS,
    )
    models = "; ".join(f"{model.name} {model.version} (sha256 {model.sha256})" for model in analysis.models)
    texts = [(codes.DCM.Summary, sentence) for sentence in sentences(findings)]
    if len(findings.lesion_list) > LARGEST_LESIONS:
        listed = f"Listed one by one: the {LARGEST_LESIONS} largest of {len(findings.lesion_list)} lesions."
        texts.insert(1, (codes.DCM.Summary, listed))
    texts += [(_QUALITY, sentence) for sentence in coverage(volume, findings, analysis.header)]
    texts += [
        (codes.DCM.Comment, f"{NOT_FOR_DIAGNOSIS}. {LIMITS}"),
        (codes.DCM.Comment, f"Made by {MODEL_NAME} {__version__} with the models {models}."),
    ]
    container.ContentSequence = hd.sr.ContentSequence(
        [
            hd.sr.TextContentItem(name, text, relationship_type=hd.sr.RelationshipTypeValues.CONTAINS)
            for name, text in texts
        ]
    )
    return container


def _device(analysis: Analysis) -> hd.sr.ObserverContext:
    """Device observer (TID 1004); agrees with the equipment of the document, as IHE AI Results asks."""
    return hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=analysis.device_uid,
            name=MODEL_NAME,
            manufacturer_name=MANUFACTURER,
            model_name=MODEL_NAME,
            serial_number=analysis.serial_number,
        ),
    )


def _evidence(analysis: Analysis) -> Iterator[Dataset]:
    """Names of the source instances."""
    for source in analysis.unique_instances():
        yield _named(analysis, source.sop_class_uid, source.sop_instance_uid, analysis.header.SeriesInstanceUID)


def _named(analysis: Analysis, sop_class_uid: str, sop_instance_uid: str, series_instance_uid: str) -> Dataset:
    """An instance of the study as evidence; patient attributes come later, in `describe`."""
    item = Dataset()
    item.SOPClassUID, item.SOPInstanceUID = sop_class_uid, sop_instance_uid
    item.StudyInstanceUID, item.SeriesInstanceUID = analysis.header.StudyInstanceUID, series_instance_uid
    item.PatientID = item.PatientName = item.PatientBirthDate = item.PatientSex = ""
    item.StudyID = item.StudyDate = item.StudyTime = item.AccessionNumber = ""
    return item


def _separate(item: Dataset) -> None:
    """Containers as SEPARATE items: text viewers run CONTINUOUS ones together into one paragraph."""
    if item.get("ValueType") == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    children: Sequence[Dataset] = item.get("ContentSequence", [])
    for child in children:
        _separate(child)
