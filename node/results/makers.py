"""Outcome → DICOM objects on disk, one Part 10 file each.

`build` makes what a method found into segmentations, a structured report, a colour capture and a PDF, in the forms
that the peers take; `not_analysed` makes the objects that say why there is no result. Both give the same files when
called again with the same arguments. Each object is read back and checked; one that does not pass says so.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from node.images.received import read_received
from node.images.volume import Volume
from node.methods.outcome import NEUTRAL, Earlier, Outcome, Subject
from node.results import kinds, not_analysed_report, preflight, rejection
from node.results.capture import maker
from node.results.capture.drawing import PatientView
from node.results.forms import STOPPED, Profile, kinds_of
from node.results.making import Making, Naming
from node.results.provenance import WHOLE, Analysis, Part, SourceInstance, ascii_text, source_instances
from node.text import SENTENCE_LENGTH, printable


@dataclass(frozen=True)
class ResultObject:
    """A result object on disk."""

    kind: str
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    #: Those of the profiles asked for that it is part of.
    profiles: tuple[Profile, ...] = ()
    #: Why it must not be sent, in a sentence each; empty for one that may.
    problems: tuple[str, ...] = ()
    #: `Profile.form` of its kind; empty for the usual form.
    form: str = ""


def build(
    volume: Volume,
    outcome: Outcome,
    sources: Sequence[Dataset] | None,
    directory: Path,
    profiles: Iterable[Profile] = (Profile(),),
    *,
    content_datetime: datetime,
    earlier: Sequence[Earlier] = (),
    part: Part = WHOLE,
) -> list[ResultObject]:
    """Make the result objects of an analysis.

    Parameters
    ----------
    volume, outcome
        The series and what was found in it, on the same grid.
    sources
        Headers of the source instances, in any order; None to read them from the files that `volume` names. Patient
        and study attributes come from the first slice's.
    directory
        An existing folder; each object is written there as ``KIND.dcm`` or ``KIND-FORM.dcm``, and one that is there
        is replaced. One that must not be sent is called ``….stopped.dcm``.
    profiles
        What each peer takes; what several have in common is made once. A kind that has nothing to say is left out:
        there is no segmentation without segments. The others then say so.
    content_datetime
        When the analysis was done; an aware one is written in the source's zone, or else in local time.
    earlier
        What earlier scans of the patient came to, for the capture and the PDF.
    part
        Which of the series' acquisitions was analysed; the objects' series are called and numbered by it.

    Returns
    -------
    list[ResultObject]
        Segmentations, report, capture, PDF, synced to disk under their final names.

    Raises
    ------
    ValueError
        Masks that do not fit the volume, a kind of object that the outcome has not, or no header of the first slice
        among `sources`.
    """
    _require_fit(volume, outcome)
    analysis = Analysis(
        header=_first_header(volume, sources),
        instances=tuple(SourceInstance(s.sop_class_uid, s.sop_instance_uid, s.frame) for s in volume.sources),
        models=outcome.models,
        content_datetime=content_datetime,
        part=part,
        subject=outcome.subject,
    )
    making = Making(volume, outcome, analysis, earlier)
    offered = kinds_of(making.kinds)
    wanted: dict[tuple[str, str], list[Profile]] = {}
    for profile in dict.fromkeys(profiles):
        if unknown := set(profile.kinds or ()) - set(offered):
            raise ValueError(f"{outcome.subject.method} makes no {', '.join(sorted(unknown))}")
        for kind in filter(profile.takes, offered):
            wanted.setdefault((kind, kinds.maker_of(kind).form(profile, making.kinds)), []).append(profile)
    objects = []
    for kind, form in sorted(wanted, key=lambda key: (offered.index(key[0]), key[1])):
        of, naming = wanted[kind, form], Naming(kind, kinds.offset_of(kind, making.kinds), form)
        if (dataset := kinds.maker_of(kind).build(making, naming, of[0])) is not None:
            name = f"{kind}-{form}" if form else kind
            made = _write(kind, name, dataset, directory, tuple(of), analysis, making)
            objects.append(replace(made, form=form))
    return objects


def not_analysed(
    source_headers: Sequence[Dataset],
    reason: str,
    directory: Path,
    profiles: Iterable[Profile] = (Profile(),),
    *,
    content_datetime: datetime,
    part: Part = WHOLE,
    subject: Subject = NEUTRAL,
) -> list[ResultObject]:
    """Make the objects that say in the source's study why the series was not analysed.

    Parameters
    ----------
    source_headers
        Headers of the series, at least one; patient and study attributes come from the first.
    reason
        Free of patient data; goes into the UIDs, so that another reason makes other objects.
    directory, content_datetime, part
        As for `build`.
    subject
        Of the method that was to analyse it.
    profiles
        Of their kinds, `sr` (a plain text document) and `capture` (one page) are made, each in one form for all.

    Raises
    ------
    ValueError
        No header.
    """
    if not source_headers:
        raise ValueError("at least one header is needed to place the object in its study")
    reason = ascii_text(printable(f"{part.name}: {reason}" if part.name else reason, SENTENCE_LENGTH))
    analysis = Analysis(source_headers[0], source_instances(source_headers), (), content_datetime, part, subject)
    makers = {"sr": not_analysed_report.not_analysed, "capture": maker.not_analysed}
    asked = tuple(dict.fromkeys(profiles))
    objects = []
    for kind, make in makers.items():
        if of := tuple(profile for profile in asked if profile.takes(kind)):
            dataset = make(reason, analysis, kinds.offset_of(kind, ()))
            objects.append(_write(kind, kind, dataset, directory, of, analysis))
    return objects


def rejection_note(
    source_header: Dataset,
    outdated: Sequence[rejection.Outdated],
    directory: Path,
    name: str,
    content_datetime: datetime,
    part: Part = WHOLE,
) -> ResultObject:
    """Make the note by which an archive hides objects that newer ones have taken the place of, as ``NAME.dcm``.

    Parameters
    ----------
    source_header
        Of the series that the objects were made from.
    outdated
        The objects, at least one.
    directory, content_datetime, part
        As for `build`.
    """
    analysis = Analysis(source_header, (), (), content_datetime, part)
    kind = kinds.REJECTION_NOTE
    note = rejection.note(outdated, analysis, kinds.offset_of(kind, ()))
    return _write(kind, name, note, directory, (), analysis)


def overlay_png(volume: Volume, outcome: Outcome, path: Path) -> None:
    """Write a PNG montage of the summary and of slices."""
    maker.overlay_png(PatientView.of(volume, outcome.pictures), outcome, path)


def _require_fit(volume: Volume, outcome: Outcome) -> None:
    """A mask that was made for another grid would be painted in the wrong place: refuse it."""
    shape, pictures = volume.hu.shape, outcome.pictures
    masks = [one.labels for one in outcome.segmentations] + [pictures.outlined.labels, pictures.tinted.labels]
    if wrong := [mask.shape for mask in masks if mask.shape != shape]:
        raise ValueError(f"masks of {wrong[0]} for a volume of {shape}")
    if len(volume.sources) != shape[0]:
        raise ValueError(f"{len(volume.sources)} source slices for a volume of {shape[0]}")
    if not outcome.models:
        raise ValueError("an outcome that names no model cannot be attributed")


def _first_header(volume: Volume, sources: Sequence[Dataset] | None) -> Dataset:
    first = volume.sources[0]
    if sources is None:
        return read_received(first.path)
    for header in sources:
        if header.SOPInstanceUID == first.sop_instance_uid:
            return header
    raise ValueError(f"no header of instance {first.sop_instance_uid} among the sources")


def _write(
    kind: str,
    name: str,
    dataset: Dataset,
    directory: Path,
    profiles: tuple[Profile, ...],
    analysis: Analysis,
    making: Making | None = None,
) -> ResultObject:
    """Write a file that is either whole or not there under its name, and has passed the check or is called stopped."""
    # The same name at each attempt, for one process at a time makes the objects of an analysis: what one that was
    # killed left behind is overwritten.
    part = directory / f".{name}.dcm.part"
    try:
        with part.open("wb") as file:
            pydicom.dcmwrite(file, dataset, enforce_file_format=True)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        if isinstance(frames := dataset.get("PixelData"), io.IOBase):
            frames.close()
    problems = preflight.problems(part, kind, kinds.maker_of(kind), analysis, making)
    path = directory / (f"{name}{STOPPED}" if problems else f"{name}.dcm")
    part.replace(path)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return ResultObject(
        kind,
        path,
        str(dataset.SOPClassUID),
        str(dataset.SOPInstanceUID),
        str(dataset.SeriesInstanceUID),
        profiles,
        tuple(problems),
    )
