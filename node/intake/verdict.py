"""What a method says of a closed series: whether it reads it, and why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a series, or an acquisition in it, is to be analysed, and why (not), for admins and radiologists."""

    analyse: bool
    #: A sentence; begins with 'not analysed: ' where it is not.
    reason: str
    #: For one that is not analysed: whether readers would expect it to be, so that the study should say why not. A
    #: localizer or a sagittal reformat is nothing to tell of; a whole axial chest CT with a gap is.
    tell: bool = False
    #: Where it is about a part of the series: which instances (numbers from 0); a sentence for the statement that says
    #: so; and words that tell it from the others, such as 'acquisition 2', where it is one of several acquisitions.
    part: tuple[int, ...] = ()
    note: str = ""
    acquisition: str = ""
