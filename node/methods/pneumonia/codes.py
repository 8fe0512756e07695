"""What the pneumonia report names by codes: standard ones, and those that no standard scheme has."""

from __future__ import annotations

from pydicom.sr.coding import Code

from node.methods.codes import PRIVATE_SCHEME

PNEUMONIA = Code("233604007", "SCT", "Pneumonia")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ANATOMICAL = Code("91723000", "SCT", "Anatomical Structure")
POSITIVE, NEGATIVE = Code("10828004", "SCT", "Positive"), Code("260385009", "SCT", "Negative")
MILD = Code("255604002", "SCT", "Mild")

#: UCUM units of the rules.
SLICES = Code("{slices}", "UCUM", "slices")
BOXES = Code("{boxes}", "UCUM", "boxes")

#: The private codes: what no standard scheme has a code for. A value keeps its meaning for ever.
PRIVATE_CODES = {
    "101": "Right lung infected share",
    "102": "Right lung infected volume",
    "103": "Left lung infected share",
    "104": "Left lung infected volume",
    "105": "Infected share of both lungs",
    "106": "Lesion infection probability",
    "107": "Lesion share of its lung",
    "201": "Slices with infection",
    "202": "Longest run of slices with infection",
    "203": "Length of longest run of slices with infection",
    "204": "Lesion boxes per lung area",
    "205": "Lesion boxes",
    "206": "Scan infection probability (Noisy-OR)",
    "211": "Consecutive slices rule",
    "212": "Intensity rule",
    "221": "Alarming",
    "222": "Not COVID-19-like",
}


def private(value: str) -> Code:
    """A code of `PRIVATE_CODES`."""
    return Code(value, PRIVATE_SCHEME, PRIVATE_CODES[value])
