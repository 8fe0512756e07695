"""Who made a result and what it belongs to: UIDs, patient, study, series, equipment, SOP common.

Every result object passes through `describe`, so that all of them carry the same modules in the same way: the
patient and the study exactly as the source has them, the equipment as what made the object, and UIDs that are a
function of content, so that doing an analysis twice never puts a second object into an archive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian

from models.registry import ModelIdentity
from node import __version__
from node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, MANUFACTURER, MODEL_NAME, uid_of
from node.methods.outcome import NEUTRAL, Subject

#: Goes into every object, in the words that a reader can see.
NOT_FOR_DIAGNOSIS = "AI result, not for primary diagnosis"


@dataclass(frozen=True)
class SourceInstance:
    """What one slice of the analysed volume is called in the archive."""

    sop_class_uid: str
    sop_instance_uid: str
    #: 1-based frame number in a multi-frame instance, else None.
    frame: int | None = None


@dataclass(frozen=True)
class Part:
    """Which of the acquisitions in a series an analysis is of."""

    #: ASCII words such as 'acquisition 2'; empty for the whole series.
    name: str = ""
    #: From 0, in the order in which the series' analyses are told.
    number: int = 0


#: All of a series.
WHOLE = Part()


@dataclass(frozen=True)
class Analysis:
    """One analysis of one series, or of one acquisition in it, as its result objects refer to it."""

    #: Header of a source instance; patient, study and series attributes are taken from it.
    header: Dataset
    #: One per slice of the volume, in its order.
    instances: tuple[SourceInstance, ...]
    models: tuple[ModelIdentity, ...]
    content_datetime: datetime
    part: Part = WHOLE
    subject: Subject = NEUTRAL

    def uid(self, *names: str) -> str:
        """UID for what `names` says within this analysis.

        It depends on the source series, the set of its instances (not their order), what they are called where they
        are a part of it, the method, the models and `names`; on nothing else.

        Returns
        -------
        str
            ``2.25.`` and the decimal value of a version 5 UUID (PS3.5 B.2, RFC 9562 section 5.5).
        """
        generation = hashlib.sha256()
        for sop_instance_uid in sorted({instance.sop_instance_uid for instance in self.instances}):
            generation.update(sop_instance_uid.encode() + b"\n")
        models = [f"{model.name} {model.version} {model.sha256}" for model in self.models]
        series = str(self.header.get("SeriesInstanceUID", ""))
        part = [self.part.name] if self.part.name else []
        return uid_of(series, generation.hexdigest(), *part, *self.subject.uid_names, *models, *names)

    def unique_instances(self) -> list[SourceInstance]:
        """Every source instance once, without frame numbers, in slice order."""
        unique = {each.sop_instance_uid: each for each in self.instances}
        return [SourceInstance(each.sop_class_uid, each.sop_instance_uid) for each in unique.values()]

    @property
    def serial_number(self) -> str:
        """Device Serial Number: stands for this software with these models."""
        parts = [MANUFACTURER, __version__, *(model.sha256 for model in self.models)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def device_uid(self) -> str:
        """Device UID of this software with these models."""
        return uid_of("device", self.serial_number)


def describe(
    dataset: Dataset,
    analysis: Analysis,
    *,
    kind: str,
    sop_class_uid: str,
    modality: str,
    series_offset: int,
    series_description: str,
    variant: str = "",
) -> None:
    """Give `dataset` all that is common to results; replaces what a library may have put there.

    Parameters
    ----------
    dataset
        The object; its own modules (image, document, segments) are left alone.
    kind
        Kind of the object; with `variant` it goes into the UIDs.
    series_offset
        91 to 99; Series Number is 100 times the source's plus this, less 10 for each further acquisition of a series.
    series_description
        ASCII, so that it fits any Specific Character Set of the source; with the name of the acquisition at most 64
        characters, or it is cut there.
    variant
        Tells objects of one kind apart that say different things, such as reasons for not analysing.
    """
    _copy_patient_and_study(analysis.header, dataset)
    date, time = _date_and_time(analysis)
    dataset.SOPClassUID = UID(sop_class_uid)
    dataset.SOPInstanceUID = analysis.uid(kind, variant, "instance")
    dataset.InstanceCreationDate = dataset.SeriesDate = dataset.ContentDate = date
    dataset.InstanceCreationTime = dataset.SeriesTime = dataset.ContentTime = time
    dataset.Modality = modality
    dataset.SeriesInstanceUID = analysis.uid(kind, variant, "series")
    # Ten acquisitions have numbers of their own, and no two series need to differ in theirs.
    dataset.SeriesNumber = _series_number(analysis.header, series_offset - 10 * (analysis.part.number % 10))
    dataset.SeriesDescription = ", ".join(filter(None, (series_description, analysis.part.name)))[:64]
    dataset.InstanceNumber = 1
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = MODEL_NAME
    dataset.SoftwareVersions = __version__
    dataset.DeviceSerialNumber = analysis.serial_number
    dataset.ContributingEquipmentSequence = Items(_contributing_equipment(analysis, date + time))
    dataset.file_meta = _file_meta(dataset)


def set_body_part(dataset: Dataset, subject: Subject) -> None:
    """Say which body part the images of a series show.

    Where that is not known it may be one of a pair, and Laterality is there with no value (PS3.3 C.7.3.1, type 2C).
    """
    if subject.body_part:
        dataset.BodyPartExamined = subject.body_part
    else:
        dataset.Laterality = None


def code_item(code: Code) -> Dataset:
    """One item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def ascii_text(text: str) -> str:
    """`text` with everything outside printable ASCII replaced, as it must fit any character set of a source."""
    return "".join(character if " " <= character <= "~" else "?" for character in " ".join(text.split()))


#: Present even when the source lacks them: type 2 in the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1).
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)

#: Of the study and the visit, outside groups 0010 and 0012 (PS3.3 C.7.2.1, C.7.2.2), and what text and time need.
_STUDY_KEYWORDS = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "StudyInstanceUID",
    "StudyDescription",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianIdentificationSequence",
    "ConsultingPhysicianName",
    "ConsultingPhysicianIdentificationSequence",
    "PhysiciansOfRecord",
    "PhysiciansOfRecordIdentificationSequence",
    "NameOfPhysiciansReadingStudy",
    "PhysiciansReadingStudyIdentificationSequence",
    "RequestingService",
    "RequestingServiceCodeSequence",
    "ReferencedStudySequence",
    "ProcedureCodeSequence",
    "ReasonForPerformedProcedureCodeSequence",
    "AdmittingDiagnosesDescription",
    "AdmittingDiagnosesCodeSequence",
    "AdmissionID",
    "IssuerOfAdmissionIDSequence",
    "ServiceEpisodeID",
    "ServiceEpisodeDescription",
    "IssuerOfServiceEpisodeIDSequence",
    "ReasonForVisit",
    "ReasonForVisitCodeSequence",
    *_TYPE_2,
)

#: Clinical Trial Series module (PS3.3 C.7.3.2): says something of the source series, not of ours.
_TRIAL_SERIES = range(0x00120060, 0x00120080)


def _copy_patient_and_study(header: Dataset, dataset: Dataset) -> None:
    """Make the Patient, Clinical Trial, General Study and Patient Study modules those of `header`.

    Elements are taken over whole, never through their values, so that names keep their bytes and what does not
    conform is neither lost nor corrected.
    """
    wanted = {tag_for_keyword(keyword) for keyword in _STUDY_KEYWORDS}
    # Tags, not elements: going through a Dataset decodes every element of the header, sound or not.
    own, given = list(dataset.keys()), list(header.keys())
    for tag in own:
        if tag.group in (0x0010, 0x0012) or int(tag) in wanted:
            del dataset[tag]
    for tag in given:
        of_patient = tag.group in (0x0010, 0x0012) and int(tag) not in _TRIAL_SERIES and not tag.is_private
        if of_patient or int(tag) in wanted:
            dataset[tag] = header[tag]
    for keyword in _TYPE_2:
        if keyword not in dataset:
            setattr(dataset, keyword, None)


def _date_and_time(analysis: Analysis) -> tuple[str, str]:
    """Content date (DA) and time (TM), in the zone that the source's dates are in."""
    moment = analysis.content_datetime
    if moment.tzinfo is not None:
        offset = str(analysis.header.get("TimezoneOffsetFromUTC", "") or "")
        try:
            zone = datetime.strptime(offset, "%z").tzinfo
        except ValueError:
            zone = None  # no zone given: local time (PS3.3 C.12.1.1.8)
        moment = moment.astimezone(zone)
    return moment.strftime("%Y%m%d"), moment.strftime("%H%M%S.%f")


def _series_number(header: Dataset, offset: int) -> int:
    try:
        number = int(header.get("SeriesNumber") or 0)
    except (TypeError, ValueError):
        number = 0
    # Series Number is an IS: 32 bits signed.
    return offset + (100 * number if 0 <= number < 20_000_000 else 0)


def _contributing_equipment(analysis: Analysis, moment: str) -> Iterable[Dataset]:
    """The scanner, this node, and each model (PS3.3 C.12.1.1.5; IHE AI Results lists every algorithm)."""
    if analysis.header.get("Manufacturer"):
        scanner = _equipment(Code("109101", "DCM", "Acquisition Equipment"), str(analysis.header.Manufacturer))
        for keyword in ("ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "StationName"):
            if keyword in analysis.header:
                scanner[keyword] = analysis.header[keyword]
        yield scanner
    purpose = Code("109102", "DCM", "Processing Equipment")
    node = _equipment(purpose, MANUFACTURER, MODEL_NAME, __version__)
    node.DeviceSerialNumber, node.DeviceUID = analysis.serial_number, analysis.device_uid
    node.ContributionDateTime, node.ContributionDescription = moment, NOT_FOR_DIAGNOSIS
    yield node
    for model in analysis.models:
        algorithm = _equipment(purpose, MANUFACTURER, model.name, model.version)
        algorithm.DeviceSerialNumber, algorithm.DeviceUID = model.sha256, uid_of("model", model.sha256)
        algorithm.ContributionDateTime = moment
        algorithm.ContributionDescription = f"Algorithm with weights of SHA-256 {model.sha256}"
        yield algorithm


def _equipment(purpose: Code, manufacturer: str, model: str = "", version: str = "") -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code_item(purpose)]
    item.Manufacturer = manufacturer
    if model:
        item.ManufacturerModelName = model
    if version:
        item.SoftwareVersions = version
    return item


def _file_meta(dataset: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta


def source_instances(headers: Sequence[Dataset]) -> tuple[SourceInstance, ...]:
    """Names of `headers`, for an `Analysis` without a volume."""
    return tuple(SourceInstance(str(each.SOPClassUID), str(each.SOPInstanceUID)) for each in headers)
