"""Findings as plain types, for JSON: what the command line prints and the ledger keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

from node.images.volume import Volume
from node.methods.outcome import to_json
from node.methods.pneumonia.findings import Findings, Region


def summary(findings: Findings, volume: Volume) -> dict[str, Any]:
    """The method's own numbers: everything in `findings` but the masks and what all outcomes have.

    Returns
    -------
    dict
        Strings, numbers, booleans, None, lists and dicts only. Volumes in ml, shares 0 to 1, attenuation in HU (None
        where there is nothing to measure), lesion boxes and key slices as 0-based indices on the source grid, slices
        of the scan-level rules counted from the lowest. UIDs are those of the source series.
    """
    plain = {
        "geometry": {
            "study_instance_uid": volume.study_instance_uid,
            "series_instance_uid": volume.series_instance_uid,
            "frame_of_reference_uid": volume.frame_of_reference_uid,
            "shape": volume.hu.shape,
            "spacing_mm": volume.spacing,
            "affine": volume.affine.tolist(),
        },
        "lungs": {name: _region(getattr(findings, name)) for name in ("right", "left", "both")},
        "lesions": [
            dataclasses.asdict(lesion) | {"key_sop_instance_uid": volume.sources[lesion.key_slice].sop_instance_uid}
            for lesion in findings.lesion_list
        ],
        "scan": dataclasses.asdict(findings.scan),
        "calibrated": findings.calibrated,
    }
    return {key: to_json(value) for key, value in plain.items()}


def _region(region: Region) -> dict[str, float]:
    return dataclasses.asdict(region) | {"infected_share": region.infected_share}
