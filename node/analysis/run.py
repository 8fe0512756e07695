"""One analysis of one series: the same from a worker and from the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from models.registry import Bundle, load_bundle
from models.runtime import CardMemoryError
from node.config import Settings
from node.images.volume import Volume
from node.methods import registry
from node.methods.outcome import Outcome, Subject

log = structlog.get_logger(__name__)

#: Called with a stage and the fraction of it that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Work:
    """What is to be analysed."""

    #: Name of the method.
    method: str
    #: Files of the series, or of the acquisition in it.
    paths: Sequence[Path]
    #: A sentence on what was analysed, for the notes of the outcome; '' for the whole series.
    note: str = ""


def analyse(
    work: Work, settings: Settings, progress: Progress, on_cpu: Callable[[str], None], device: str | None = None
) -> tuple[Volume, Outcome]:
    """Run a method with the models that the settings name, on the CPU where the card has too little memory.

    Parameters
    ----------
    progress
        Called as the analysis goes on.
    on_cpu
        Called with the reason when it starts again on the CPU.
    device
        'auto', 'cpu' or 'cuda'; that of the settings when left out.

    Raises
    ------
    VolumeError
        The series cannot be analysed; the message says why, free of patient data.
    MethodError, BundleError
        The method is not installed, or a model is missing, damaged or has another role.
    """
    method = registry.find(work.method)
    models = models_of(work.method, settings)
    chosen = device or settings.worker.device
    try:
        volume, outcome = method.run(work.paths, models, None if chosen == "auto" else chosen, progress)
    except CardMemoryError as error:
        log.warning("analysed on the CPU", because=str(error))
        on_cpu(str(error))
        volume, outcome = method.run(work.paths, models, "cpu", progress)
    if work.note:
        outcome = replace(outcome, notes=(work.note, *outcome.notes))
    return volume, outcome


def models_of(method: str, settings: Settings) -> Mapping[str, Bundle]:
    """Bundle of each role of a method, as the settings name them.

    Raises
    ------
    MethodError, BundleError
        As for `analyse`.
    """
    roles = registry.find(method).roles
    named = settings.models_for(method)
    found = {}
    for name, role in roles.items():
        found[name] = _bundle(named.get(name, role.default), settings.installed_models)
        role.require(found[name])
    return found


def subject_of(method: str) -> Subject:
    """What objects of a method are about, also where it is not installed any more."""
    try:
        return registry.find(method).subject
    except registry.MethodError:
        return Subject(method)


@functools.cache
def _bundle(name: str, installed: Path) -> Bundle:
    """A bundle whose weights were verified once in this process."""
    return load_bundle(name, installed)
