"""What makes one kind of result object, and what it gets: the analysis with its outcome, and what the object is called.

The table of the kinds is `node.results.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydicom.dataset import Dataset

from node.images.volume import Volume
from node.methods.outcome import Earlier, Outcome, Segmentation
from node.results.capture.drawing import PatientView
from node.results.forms import Profile
from node.results.provenance import Analysis


@dataclass(frozen=True)
class Naming:
    """What tells an object from the others of its analysis."""

    kind: str
    #: Of the Series Number, as `node.results.provenance.describe` has it.
    offset: int
    #: Its form, where that is not the usual one.
    variant: str


@dataclass(frozen=True)
class Making:
    """One analysis, of which objects are made."""

    volume: Volume
    outcome: Outcome
    analysis: Analysis
    earlier: Sequence[Earlier] = ()

    @cached_property
    def view(self) -> PatientView:
        """The volume and its layers as a reader sees them."""
        return PatientView.of(self.volume, self.outcome.pictures)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the outcome's segmentations."""
        return tuple(one.kind for one in self.outcome.segmentations)

    def segmentation(self, kind: str) -> Segmentation:
        """The outcome's segmentation of this kind."""
        return self.outcome.segmentations[self.kinds.index(kind)]


@dataclass(frozen=True)
class Maker:
    """How objects of one kind are made, and checked before they are sent."""

    #: 91 to 99, of the Series Number; further segmentations of a method have the numbers that follow.
    offset: int
    #: What tells an object for one peer from that for another: of what the peer takes and the method's segmentations.
    form: Callable[[Profile, Sequence[str]], str]
    #: The object; None where there is nothing to say.
    build: Callable[[Making, Naming, Profile], Dataset | None]
    #: Type 1 attributes of the mandatory modules, at the top level (PS3.3 annex A): there, with a value.
    required: str
    #: Type 2 attributes of the same modules: there, perhaps empty.
    present: str
    #: What is wrong with an object that was read back, in a sentence each: by what it was made from, which is None for
    #: one that says why nothing was analysed.
    check: Callable[[Dataset, str, Analysis, Making | None], Iterator[str]]
