"""What the objects of the pneumonia method are about."""

from __future__ import annotations

from node.methods.codes import CT_OF_CHEST
from node.methods.outcome import Subject

SUBJECT = Subject("pneumonia", "Chest CT", "CHEST", CT_OF_CHEST)

#: Title of its pages.
TITLE = "Chest CT: lungs and pneumonia infection"
