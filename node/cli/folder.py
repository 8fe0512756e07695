"""Analysis of a folder without a network: what the node does with a series, for `lungnode analyse`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.errors import InvalidDicomError
from rich.progress import Progress

from node.analysis import run
from node.config import Settings
from node.images.elements import HeaderError
from node.images.received import ReceivedFile
from node.images.volume import Volume, VolumeError
from node.intake.assembly import Assembly
from node.intake.header import InstanceHeader, read_header
from node.intake.part import Stored
from node.intake.series import AssociationId, ClosedSeries, Host
from node.methods import registry
from node.methods.outcome import Outcome, plain
from node.paths import InvalidUIDError, valid_uid, within
from node.results import makers
from node.results.provenance import Part


class NothingToAnalyse(ValueError):  # noqa: N818 - not an error of the program
    """A folder holds no series that can be analysed; the message says why for each series."""


@dataclass(frozen=True)
class Analysed:
    """A summary (`node.methods.outcome.plain`) and the files written, relative to the out folder."""

    #: Which of a series' acquisitions it is of; empty where it has but one.
    acquisition: str
    summary: dict[str, Any]
    files: list[str]


def analyse_folder(
    folder: Path,
    out: Path,
    settings: Settings,
    progress: Progress,
    *,
    method: str = registry.DEFAULT,
    device: str | None = None,
    content_at: datetime | None = None,
) -> list[Analysed]:
    """Analyse every series at or below `folder` that the method accepts, and each acquisition in it.

    Each gets a folder of its own when there are several. What one would expect to be analysed and was not is told on
    the console.

    Parameters
    ----------
    settings
        Name the models and the device.
    device
        Takes the place of that of the settings.
    content_at
        Content date and time of the objects; now when left out.

    Raises
    ------
    NothingToAnalyse
        No series was analysed.
    MethodError, BundleError
        As for `node.analysis.run.analyse`.
    """
    bar = progress.add_task("reading headers", total=None)
    series = closed_folder(folder)
    chosen, reasons, missed = [], list[str](), list[str]()
    for one in series:
        for number, verdict in enumerate(registry.find(method).accepts(one)):
            name = f"series {one.series_instance_uid}{f', {verdict.acquisition}' if verdict.acquisition else ''}"
            if verdict.analyse:
                chosen.append((name, one, verdict, Part(verdict.acquisition, number)))
            else:
                reasons.append(f"{name}: {verdict.reason}")
                missed += [reasons[-1]] if verdict.tell else []

    def show(stage: str, fraction: float) -> None:
        progress.update(bar, description=stage, total=1.0, completed=fraction)

    def warn(text: str) -> None:
        progress.console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def analyse_one(work: run.Work, part: Part, target: Path) -> Analysed:
        volume, outcome = run.analyse(work, settings, show, lambda why: warn(f"goes on on the CPU: {why}"), device)
        show("making objects", 0.0)
        return _written(volume, outcome, part, target, out, content_at or datetime.now().astimezone(), warn)

    several = len({one.series_instance_uid for _, one, _, _ in chosen}) > 1
    done = []
    for name, one, verdict, part in chosen:
        try:
            target = within(out, valid_uid(one.series_instance_uid)) if several else out
            if sum(other is one for _, other, _, _ in chosen) > 1:
                target = within(target, re.sub("[^a-z0-9.]+", "-", part.name))
            work = run.Work(method, [one.paths[n] for n in verdict.part] or one.paths, verdict.note)
            done.append(analyse_one(work, part, target))
        except (VolumeError, InvalidUIDError) as reason:
            reasons.append(f"{name}: not analysed: {reason}")
            missed.append(reasons[-1])
    if not done:
        raise NothingToAnalyse("\n".join(reasons) or f"no DICOM series in {folder}")
    for text in missed:
        warn(text)
    return done


class _Collecting(Host):
    """Keeps what is closed."""

    def __init__(self) -> None:
        self.all: list[ClosedSeries] = []

    def closed(self, closed: ClosedSeries) -> None:
        self.all.append(closed)


def closed_folder(folder: Path) -> list[ClosedSeries]:
    """Every series at or below a folder, closed and judged as the listener would."""
    host = _Collecting()
    assembly = Assembly(host, quiet_s=0.0)
    association = AssociationId(0, "", "")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            assembly.received(association, _header(path), Stored(path, "new"))
        except (HeaderError, InvalidDicomError):
            continue
    assembly.association_ended(association)
    assembly.tick()
    return host.all


def _header(path: Path) -> InstanceHeader:
    """Header of a Part 10 file, read as far as the pixel data.

    Raises
    ------
    HeaderError, InvalidDicomError, OSError
        The file is no Part 10 file, cannot be read, or holds no data set that can be filed.
    """
    with ReceivedFile(path) as file:
        return read_header(file.dataset, file.transfer_syntax)


def _written(
    volume: Volume,
    outcome: Outcome,
    part: Part,
    target: Path,
    out: Path,
    content_at: datetime,
    warn: Callable[[str], None],
) -> Analysed:
    target.mkdir(parents=True, exist_ok=True)
    made = makers.build(volume, outcome, None, target, content_datetime=content_at, part=part)
    overlay = target / "overlay.png"
    makers.overlay_png(volume, outcome, overlay)
    for one in made:
        if one.problems:
            warn(f"{one.path.name} must not be used: {'; '.join(one.problems)}")
    files = [str(path.relative_to(out)) for path in (*(one.path for one in made), overlay)]
    return Analysed(part.name, plain(outcome), files)
