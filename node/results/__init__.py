"""Findings → DICOM objects on disk, one Part 10 file each.

`build` makes what an analysis found into segmentations, a structured report and a colour capture; `not_analysed` makes
the objects that say why there is no result. Both give the same files when called again with the same arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from node.analysis.findings import Findings
from node.analysis.volume import Volume
from node.results import capture, rejection, report, segmentation, text_report
from node.results.capture import overlay_png
from node.results.identity import Analysis, SourceInstance, ascii_text, source_instances

__all__ = ["KINDS", "ResultObject", "build", "not_analysed", "overlay_png", "rejection_note"]

#: Kinds of result objects.
KINDS = ("infection-seg", "lung-seg", "sr", "capture")


@dataclass(frozen=True)
class ResultObject:
    """A result object on disk."""

    kind: str
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str


def build(
    volume: Volume,
    findings: Findings,
    sources: Sequence[Dataset] | None,
    directory: Path,
    kinds: Iterable[str] = KINDS,
    *,
    content_datetime: datetime,
) -> list[ResultObject]:
    """Make the result objects of an analysis.

    Parameters
    ----------
    volume, findings
        The series and what was found in it, on the same grid.
    sources
        Headers of the source instances, in any order; None to read them from the files that `volume` names. Patient
        and study attributes come from the first slice's.
    directory
        An existing folder; each object is written there as ``KIND.dcm``, and one that is there is replaced.
    kinds
        Which of `KINDS` to make. One that has nothing to say is left out: without infection there is no
        infection-seg, without a lung no lung-seg. `sr` and `capture` then say so.
    content_datetime
        When the analysis was done; an aware one is written in the source's zone, or else in local time.

    Returns
    -------
    list[ResultObject]
        In the order of `KINDS`, synced to disk under their final names.

    Raises
    ------
    ValueError
        An unknown kind, masks that do not fit the volume, infection outside the lungs, or no header of the first
        slice among `sources`.
    """
    wanted = _known(kinds)
    _require_fit(volume, findings)
    analysis = Analysis(
        header=_first_header(volume, sources),
        instances=tuple(SourceInstance(s.sop_class_uid, s.sop_instance_uid, s.frame) for s in volume.sources),
        models=findings.models,
        content_datetime=content_datetime,
    )
    makers: dict[str, Callable[[], Dataset | None]] = {
        "infection-seg": lambda: segmentation.infection(volume, findings, analysis),
        "lung-seg": lambda: segmentation.lungs(volume, findings, analysis),
        "sr": lambda: report.build(findings, analysis) or text_report.not_analysed("no lung was found", analysis),
        "capture": lambda: capture.build(volume, findings, analysis),
    }
    made = ((kind, makers[kind]()) for kind in KINDS if kind in wanted)
    return [_write(kind, dataset, directory) for kind, dataset in made if dataset is not None]


def not_analysed(
    source_headers: Sequence[Dataset],
    reason: str,
    directory: Path,
    kinds: Iterable[str],
    content_datetime: datetime,
) -> list[ResultObject]:
    """Make the objects that say in the source's study why the series was not analysed.

    Parameters
    ----------
    source_headers
        Headers of the series, at least one; patient and study attributes come from the first.
    reason
        Free of patient data; goes into the UIDs, so that another reason makes other objects.
    directory, content_datetime
        As for `build`.
    kinds
        Of these, `sr` (a plain text document) and `capture` (one page) are made; there is nothing to segment.

    Raises
    ------
    ValueError
        An unknown kind, or no header.
    """
    wanted = _known(kinds)
    if not source_headers:
        raise ValueError("at least one header is needed to place the object in its study")
    reason = ascii_text(reason)
    analysis = Analysis(source_headers[0], source_instances(source_headers), (), content_datetime)
    makers = {"sr": text_report.not_analysed, "capture": capture.not_analysed}
    return [_write(kind, makers[kind](reason, analysis), directory) for kind in makers if kind in wanted]


def rejection_note(
    source_header: Dataset,
    outdated: Sequence[rejection.Outdated],
    directory: Path,
    name: str,
    content_datetime: datetime,
) -> ResultObject:
    """Make the note by which an archive hides objects that newer ones have taken the place of, as ``NAME.dcm``.

    Parameters
    ----------
    source_header
        Of the series that the objects were made from.
    outdated
        The objects, at least one.
    directory, content_datetime
        As for `build`.
    """
    analysis = Analysis(source_header, (), (), content_datetime)
    return _write(name, rejection.note(outdated, analysis), directory)


def _known(kinds: Iterable[str]) -> set[str]:
    wanted = set(kinds)
    if unknown := wanted - set(KINDS):
        raise ValueError(f"unknown kinds of result {sorted(unknown)}; there are {', '.join(KINDS)}")
    return wanted


def _require_fit(volume: Volume, findings: Findings) -> None:
    """A mask that was made for another grid would be painted in the wrong place: refuse it."""
    shape = volume.hu.shape
    if findings.lungs.shape != shape or findings.lesions.shape != shape:
        raise ValueError(f"masks of {findings.lungs.shape} and {findings.lesions.shape} for a volume of {shape}")
    if len(volume.sources) != shape[0]:
        raise ValueError(f"{len(volume.sources)} source slices for a volume of {shape[0]}")
    if np.any((findings.lesions > 0) & (findings.lungs == 0)):
        raise ValueError("infection outside the lungs belongs to neither side")
    if not findings.models:
        raise ValueError("findings that name no model cannot be attributed")


def _first_header(volume: Volume, sources: Sequence[Dataset] | None) -> Dataset:
    first = volume.sources[0]
    if sources is None:
        return pydicom.dcmread(first.path, stop_before_pixels=True)
    for header in sources:
        if header.SOPInstanceUID == first.sop_instance_uid:
            return header
    raise ValueError(f"no header of instance {first.sop_instance_uid} among the sources")


def _write(kind: str, dataset: Dataset, directory: Path) -> ResultObject:
    """Write a file that is either whole or not there under its name."""
    path = directory / f"{kind}.dcm"
    part = directory / f".{kind}.dcm.{os.getpid()}.part"
    with part.open("wb") as file:
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return ResultObject(
        kind, path, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(dataset.SeriesInstanceUID)
    )
