"""Codes that methods and reports share: units, common concepts, and the node's own coding scheme."""

from __future__ import annotations

from pydicom.sr.coding import Code

#: Coding scheme of the node's private codes; described in each report's Coding Scheme Identification Sequence.
PRIVATE_SCHEME = "99LUNGNODE"

#: Concept of the sentences on quality and coverage; no standard scheme has one for CT.
QUALITY = Code("231", PRIVATE_SCHEME, "Image quality and coverage")

#: UCUM units (PS3.16 CID 82). OHIF shows the code, so shares and probabilities are % and not the bare '1'.
ML = Code("ml", "UCUM", "ml")
PERCENT = Code("%", "UCUM", "%")
HU = Code("[hnsf'U]", "UCUM", "HU")
MM = Code("mm", "UCUM", "mm")

VOLUME = Code("118565006", "SCT", "Volume")
MEAN_ATTENUATION = Code("112181", "DCM", "Mean Attenuation Coefficient")

LUNG = Code("39607008", "SCT", "Lung")
RIGHT_LUNG = Code("3341006", "SCT", "Right lung")
LEFT_LUNG = Code("44029006", "SCT", "Left lung")
RIGHT, LEFT = Code("24028007", "SCT", "Right"), Code("7771000", "SCT", "Left")
CT_OF_CHEST = Code("169069000", "SCT", "CT of chest")
