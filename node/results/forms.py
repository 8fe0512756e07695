"""What one peer gets of an analysis, and in which form; the kinds of result objects.

Read by the settings: it imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from node.methods.registry import SEGMENTATION

#: Kinds of object that every method has beside its segmentations, in the order in which they are made.
COMMON_KINDS = ("sr", "capture", "pdf")

#: The kind that always shows, whatever a viewer knows: what a peer gets in place of those that it refuses.
FALLBACK = "capture"

#: End of the name of a file that did not pass its check, for who looks at the folder; the ledger records why.
STOPPED = ".stopped.dcm"

#: How segmentations are stored: bits without their empty frames, bits with a frame for every slice, or one frame a
#: slice whose pixels are segment numbers.
SegForm = Literal["binary", "binary-all-frames", "labelmap"]
#: Which SOP class the structured report is of.
SrForm = Literal["comprehensive-3d", "comprehensive"]

#: The slices of a capture in words: 'key-images', 'every-slice', or 'every-N-mm'.
CAPTURE_FORMS = re.compile(r"key-images|every-slice|every-(\d+(?:\.\d+)?)-mm")


def is_segmentation(kind: str) -> bool:
    """Whether objects of this kind are segmentations."""
    return kind.endswith(SEGMENTATION)


def kinds_of(segmentations: Iterable[str]) -> tuple[str, ...]:
    """Kinds of object of a method with these segmentations, in the order in which they are made."""
    return (*segmentations, *COMMON_KINDS)


@dataclass(frozen=True)
class Profile:
    """Objects for one peer."""

    #: None for all that the method has.
    kinds: tuple[str, ...] | None = None
    seg: SegForm = "binary"
    sr: SrForm = "comprehensive-3d"
    #: As `CAPTURE_FORMS`.
    capture: str = "key-images"

    def __post_init__(self) -> None:
        unknown = {kind for kind in self.kinds or () if kind not in COMMON_KINDS and not is_segmentation(kind)}
        if unknown:
            raise ValueError(f"unknown kinds of result {sorted(unknown)}; there are {', '.join(COMMON_KINDS)}, *-seg")
        if not CAPTURE_FORMS.fullmatch(self.capture):
            raise ValueError(f"unknown form of capture {self.capture!r}")

    def takes(self, kind: str) -> bool:
        """Whether the peer gets objects of this kind."""
        return self.kinds is None or kind in self.kinds

    def seg_form(self) -> str:
        """What tells its segmentations from those for another peer; '' for the usual form."""
        return "" if self.seg == _USUAL.seg else self.seg

    def capture_form(self) -> str:
        """The same of its capture."""
        return "" if self.capture == _USUAL.capture else self.capture

    def sr_form(self, segmentations: Sequence[str]) -> str:
        """The same of its report, which refers to those of the method's segmentations that go with it."""
        taken = [kind for kind in segmentations if self.takes(kind)]
        parts: list[str] = [] if self.sr == _USUAL.sr else [self.sr]
        if taken != list(segmentations):
            parts.append("with-" + "-".join(taken) if taken else "alone")
        if taken and self.seg != _USUAL.seg:
            parts.append(self.seg)
        return "-".join(parts)


_USUAL = Profile()
