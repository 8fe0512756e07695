"""References to DICOM instances, as items of the standard's sequences; one place that builds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from node.results.provenance import Analysis, SourceInstance


def reference(instance: SourceInstance) -> Dataset:
    """One instance (SOP Instance Reference Macro, PS3.3 table 10-11), with its frame where it names one."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.sop_class_uid, instance.sop_instance_uid
    if instance.frame is not None:
        item.ReferencedFrameNumber = instance.frame
    return item


def sources(analysis: Analysis) -> list[Dataset]:
    """The source instances, each once."""
    return [reference(instance) for instance in analysis.unique_instances()]


def hierarchy(analysis: Analysis, instances: Iterable[tuple[str, Sequence[SourceInstance]]]) -> Dataset:
    """Instances of the study by their series: study, series, instance (PS3.3 table C.17-3).

    Parameters
    ----------
    analysis
        Of a series of the study.
    instances
        Series instance UID, and instances of that series.
    """
    study = Dataset()
    study.StudyInstanceUID = analysis.header.StudyInstanceUID
    study.ReferencedSeriesSequence = Items()
    for series_instance_uid, of_series in instances:
        series = Dataset()
        series.SeriesInstanceUID = series_instance_uid
        series.ReferencedSOPSequence = Items(reference(instance) for instance in of_series)
        study.ReferencedSeriesSequence.append(series)
    return study


def named(analysis: Analysis, instance: SourceInstance, series_instance_uid: str) -> Dataset:
    """An instance of the study as highdicom takes evidence; patient attributes come later, in `describe`."""
    item = Dataset()
    item.SOPClassUID, item.SOPInstanceUID = instance.sop_class_uid, instance.sop_instance_uid
    item.StudyInstanceUID, item.SeriesInstanceUID = analysis.header.StudyInstanceUID, series_instance_uid
    item.PatientID = item.PatientName = item.PatientBirthDate = item.PatientSex = ""
    item.StudyID = item.StudyDate = item.StudyTime = item.AccessionNumber = ""
    return item
