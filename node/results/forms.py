"""What one peer gets of an analysis, and in which form; the kinds of result objects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

#: Kinds of result objects, in the order in which they are made.
Kind = Literal["infection-seg", "lung-seg", "sr", "capture", "pdf"]
KINDS: tuple[Kind, ...] = ("infection-seg", "lung-seg", "sr", "capture", "pdf")

#: The kind that always shows, whatever a viewer knows: what a peer gets in place of those that it refuses.
FALLBACK: Kind = "capture"

#: End of the name of a file that did not pass its check, for who looks at the folder; the ledger records why.
STOPPED = ".stopped.dcm"

#: Those that are segmentations.
SEGMENTATIONS = ("infection-seg", "lung-seg")

#: How segmentations are stored: bits without their empty frames, bits with a frame for every slice, or one frame a
#: slice whose pixels are segment numbers.
SegForm = Literal["binary", "binary-all-frames", "labelmap"]
#: Which SOP class the structured report is of.
SrForm = Literal["comprehensive-3d", "comprehensive"]

#: The slices of a capture in words: 'key-images', 'every-slice', or 'every-N-mm'.
CAPTURE_FORMS = re.compile(r"key-images|every-slice|every-(\d+(?:\.\d+)?)-mm")


@dataclass(frozen=True)
class Profile:
    """Objects for one peer."""

    kinds: tuple[str, ...] = KINDS
    seg: SegForm = "binary"
    sr: SrForm = "comprehensive-3d"
    #: As `CAPTURE_FORMS`.
    capture: str = "key-images"

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"unknown kinds of result {sorted(unknown)}; there are {', '.join(KINDS)}")
        if not CAPTURE_FORMS.fullmatch(self.capture):
            raise ValueError(f"unknown form of capture {self.capture!r}")

    def form(self, kind: str) -> str:
        """What tells an object of this kind from the same kind for another peer; '' for the usual form.

        A report refers to the segmentations that go with it, so it differs with them too.
        """
        usual = Profile()
        if kind in SEGMENTATIONS:
            return "" if self.seg == usual.seg else self.seg
        if kind == "capture":
            return "" if self.capture == usual.capture else self.capture
        if kind == "sr":
            segmentations = [one for one in SEGMENTATIONS if one in self.kinds]
            parts: list[str] = [] if self.sr == usual.sr else [self.sr]
            if segmentations != list(SEGMENTATIONS):
                parts.append("with-" + "-".join(segmentations) if segmentations else "alone")
            if segmentations and self.seg != usual.seg:
                parts.append(self.seg)
            return "-".join(parts)
        return ""
