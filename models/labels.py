"""Values of a lung mask: 0 is background; the masks of networks, phantoms, findings and data sets all use these."""

from __future__ import annotations

#: The patient's right and left lung.
RIGHT, LEFT = 1, 2
