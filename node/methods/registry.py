"""What a method is, and which are installed.

A method is one way to read a series. A package provides one as an entry point of the group `lungnode.methods`, whose
value names an object of the `Method` protocol; no file outside the package changes. To list names imports no method, to
look one up imports that one alone, and a method imports its networks when it runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # settings are checked by this module: it stays light
    from models.registry import Bundle
    from models.roles import Role
    from node.images.volume import Volume
    from node.intake.assembly import ClosedSeries
    from node.intake.verdict import Verdict
    from node.methods.outcome import Outcome, Point, Subject

#: Group of the entry points.
GROUP = "lungnode.methods"

#: The method of a route that names none.
DEFAULT = "pneumonia"

#: Methods that come with the node, so that a source tree that was never installed has them too.
SHIPPED = {DEFAULT: "node.methods.pneumonia.method:METHOD"}

#: End of the names of kinds of object that are segmentations.
SEGMENTATION = "-seg"

Progress = Callable[[str, float], None]


@runtime_checkable
class Method(Protocol):
    """One way to read a series."""

    @property
    def name(self) -> str:
        """As the entry point and the routes call it."""

    @property
    def subject(self) -> Subject:
        """What its objects are about, also those that say why there is no result."""

    @property
    def segmentations(self) -> tuple[str, ...]:
        """Kinds of its segmentations, as routes name them; each ends in '-seg'. Report, capture and PDF are common."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """The models that it needs, by the names that settings give them, and what each must be."""

    def accepts(self, series: ClosedSeries) -> list[Verdict]:
        """Judge a closed series by its headers.

        Returns
        -------
        list[Verdict]
            One about the whole series, or one for each of its acquisitions that is analysed or reported as not.
        """

    def run(
        self, paths: Sequence[Path], models: Mapping[str, Bundle], device: str | None, progress: Progress
    ) -> tuple[Volume, Outcome]:
        """Analyse one series.

        Parameters
        ----------
        paths
            All files of it, in any order.
        models
            Bundle by role, each of which `Role.require` has passed.
        device
            'cpu' or 'cuda'; None for CUDA where there is a card.
        progress
            Called with a stage and the fraction of it that is done.

        Raises
        ------
        VolumeError
            The series cannot be analysed; the message says why, free of patient data.
        CardMemoryError
            The card has too little memory: the analysis is done again on the CPU.
        """

    def point(self, summary: dict[str, Any]) -> Point | None:
        """What a later result is compared with, of the summary that an earlier `Outcome` had; None for nothing."""


class MethodError(LookupError):
    """No method of that name is installed, or it cannot be loaded."""


def names() -> list[str]:
    """Names of the installed methods, sorted; imports none of them."""
    return sorted(_found())


@functools.cache
def find(name: str) -> Method:
    """The method of this name.

    Raises
    ------
    MethodError
        It is not installed, or its package cannot be imported or provides no method.
    """
    value = _found().get(name)
    if value is None:
        raise MethodError(f"no method is called '{name}'; installed: {', '.join(names())}")
    module, _, attribute = value.partition(":")
    try:
        method = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a package of somebody else's
        raise MethodError(f"method '{name}' cannot be loaded from {value} ({type(error).__name__})") from error
    if not isinstance(method, Method) or method.name != name:
        raise MethodError(f"{value} is no method called '{name}' (see node/methods/registry.py)")
    if wrong := [kind for kind in method.segmentations if not kind.endswith(SEGMENTATION)]:
        raise MethodError(f"method '{name}' has a segmentation called '{wrong[0]}', which must end in '-seg'")
    return method


def _found() -> dict[str, str]:
    """Where each method is, by its name. A shipped one is never another package's."""
    found: Sequence[EntryPoint] = tuple(entry_points(group=GROUP))
    return {one.name: one.value for one in found} | SHIPPED
