"""Structured report (TID 1500) of a method's measurements and statements.

Its form is what viewers were measured to open: a closed SCOORD outline on one source slice in every measurement
group (OHIF stops at a group without one), source slices given as evidence only, and, since OHIF shows of a
measurement no more than name, value and unit, one measurement in each group whose name says what the group is.

A measurement names the segments that it was made on, where the peer has them (as source of measurement, since TID 1411
takes an outline or a segment, never both). Statements stand, as sentences with their inputs and limits, under
Qualitative Evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import highdicom as hd
import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage

from node import __version__
from node.identity import MANUFACTURER, MODEL_NAME, uid_of
from node.methods.codes import PRIVATE_SCHEME, QUALITY
from node.methods.outcome import CodingScheme, Measurement, MeasurementGroup, Outline
from node.results.contour import outer_contour
from node.results.coverage import coverage
from node.results.forms import Profile
from node.results.making import Making, Naming
from node.results.provenance import (
    NOT_FOR_DIAGNOSIS,
    Analysis,
    SourceInstance,
    describe,
)
from node.results.references import named
from node.results.segmentation import sop_class_uid

#: The node's own coding scheme; methods may bring further ones.
_OWN_SCHEME = CodingScheme(PRIVATE_SCHEME, "Private codes of lungnode", uid_of("coding scheme"), MANUFACTURER)


def build(making: Making, naming: Naming, profile: Profile) -> Dataset | None:
    """Report of the outcome; None where it has no group, as a report of measurements needs one."""
    outcome, analysis, variant = making.outcome, making.analysis, naming.variant
    segments = _Segments(making, profile)
    groups = [_group(group, analysis, segments) for group in outcome.groups]
    if not groups:
        return None
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=_device(analysis)),
        procedure_reported=outcome.subject.procedure,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    root = report[0]
    root.ContentSequence.append(_evaluations(making))
    comprehensive = profile.sr == "comprehensive"
    document = (hd.sr.ComprehensiveSR if comprehensive else hd.sr.Comprehensive3DSR)(
        evidence=[*_evidence(analysis), *segments.evidence()],
        content=root,
        series_instance_uid=analysis.uid(naming.kind, variant, "series"),
        series_number=naming.offset,
        sop_instance_uid=analysis.uid(naming.kind, variant, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        coding_schemes=[
            CodingSchemeIdentificationItem(
                designator=scheme.designator,
                name=scheme.name,
                uid=scheme.uid,
                responsible_organization=scheme.organization,
            )
            for scheme in (_OWN_SCHEME, *outcome.schemes)
        ],
    )
    _separate(document)
    describe(
        document,
        analysis,
        kind=naming.kind,
        sop_class_uid=ComprehensiveSRStorage if comprehensive else Comprehensive3DSRStorage,
        modality="SR",
        series_offset=naming.offset,
        series_description="AI measurements (SR)",
        variant=variant,
    )
    return cast("Dataset", document)


class _Segments:
    """The segments that a peer gets with the report, as sources of its measurements."""

    def __init__(self, making: Making, profile: Profile) -> None:
        self._analysis = making.analysis
        self._variant = profile.seg_form()
        self._sop_class_uid = sop_class_uid(profile.seg)
        self._there = [one.kind for one in making.outcome.segmentations if one.segments and profile.takes(one.kind)]

    def name(self, item: Dataset, sources: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Give a measurement the segments that it was made on (TID 320, INFERRED FROM)."""
        for kind, numbers in sources:
            if kind in self._there and numbers:
                image = hd.sr.ImageContentItem(
                    name=Code("121112", "DCM", "Source of Measurement"),
                    referenced_sop_class_uid=self._sop_class_uid,
                    referenced_sop_instance_uid=self._uid(kind, "instance"),
                    referenced_segment_numbers=list(numbers),
                    relationship_type=hd.sr.RelationshipTypeValues.INFERRED_FROM,
                )
                item.ContentSequence = hd.sr.ContentSequence([*item.get("ContentSequence", []), image])

    def evidence(self) -> Iterator[Dataset]:
        """Names of the segmentations that are referred to."""
        for kind in self._there:
            instance = SourceInstance(self._sop_class_uid, self._uid(kind, "instance"))
            yield named(self._analysis, instance, self._uid(kind, "series"))

    def _uid(self, kind: str, what: str) -> str:
        return self._analysis.uid(kind, self._variant, what)


def _group(
    group: MeasurementGroup, analysis: Analysis, segments: _Segments
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    model, measured = group.model, [_measure(one, segments) for one in group.measurements]
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        # Of a segment of the same name it is the same, which ties the two objects together.
        tracking_identifier=hd.sr.TrackingIdentifier(uid=analysis.uid("tracking", group.name), identifier=group.label),
        referenced_regions=[_region(group.outline, analysis)],
        finding_type=group.finding,
        finding_sites=[hd.sr.FindingSite(anatomic_location=group.site, laterality=group.laterality)],
        algorithm_id=hd.sr.AlgorithmIdentification(
            name=model.name,
            version=model.version,
            parameters=[f"sha256={model.sha256}"],
            family=codes.DCM.ArtificialIntelligence,
            manufacturer=MANUFACTURER,
        ),
        measurements=[one for one in measured if one is not None],
        qualitative_evaluations=[hd.sr.QualitativeEvaluation(name, value) for name, value in group.evaluations],
    )


def _measure(measurement: Measurement, segments: _Segments) -> hd.sr.Measurement | None:
    """A measurement; None where there is no number to give, such as the mean HU of nothing."""
    value, decimals = measurement.value, measurement.decimals
    if not np.isfinite(value):
        return None
    number = round(float(value), decimals) if decimals else round(value)
    made = hd.sr.Measurement(name=measurement.name, value=number, unit=measurement.unit)
    (item,) = made
    segments.name(item, measurement.sources)
    return made


def _region(outline: Outline, analysis: Analysis) -> hd.sr.ImageRegion:
    source = analysis.instances[outline.slice]
    return hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=outer_contour(outline.mask),
        source_image=hd.sr.SourceImageForRegion(
            source.sop_class_uid,
            source.sop_instance_uid,
            None if source.frame is None else [source.frame],
        ),
    )


def _evaluations(making: Making) -> hd.sr.ContainerContentItem:
    """Qualitative Evaluations of the whole scan, as sentences (TID 1500 rows 12 to 14)."""
    outcome, analysis = making.outcome, making.analysis
    container = hd.sr.ContainerContentItem(
        name=Code("C0034375", "UMLS", "Qualitative Evaluations"),
        relationship_type=hd.sr.RelationshipTypeValues.CONTAINS,
    )
    models = "; ".join(f"{model.name} {model.version} (sha256 {model.sha256})" for model in analysis.models)
    sentences = [outcome.headline, *outcome.details, *(one.sentence for one in outcome.statements), *outcome.notes]
    texts = [(codes.DCM.Summary, sentence) for sentence in sentences]
    texts += [(QUALITY, sentence) for sentence in coverage(making.volume, outcome, analysis.header)]
    texts += [
        (codes.DCM.Comment, f"{NOT_FOR_DIAGNOSIS}. {outcome.limits}"),
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
        yield named(analysis, source, analysis.header.SeriesInstanceUID)


def _separate(item: Dataset) -> None:
    """Containers as SEPARATE items: text viewers run CONTINUOUS ones together into one paragraph."""
    if item.get("ValueType") == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    children: Sequence[Dataset] = item.get("ContentSequence", [])
    for child in children:
        _separate(child)
