"""A second method, as somebody else's package: the share of each lung below -950 HU, a measure of emphysema.

It stands for any method that is installed beside the node, and is not shipped. It needs one model, that of the lungs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.registry import Bundle
from models.roles import LUNGS
from node.methods.outcome import Outcome, Point, Subject

NAME = "low-attenuation"
KIND = f"{NAME}-seg"

#: HU below which lung counts as emphysema (Gevenois et al. 1996).
LIMIT_HU = -950


class LowAttenuation:
    name = NAME
    subject = Subject(NAME, "Chest CT", "CHEST")
    segmentations = (KIND,)
    roles: Mapping[str, Any] = {"lungs": LUNGS}

    def accepts(self, series: Any) -> list[Any]:
        from node.methods.pneumonia.triage import triage

        return triage(series)

    def run(
        self, paths: Sequence[Path], models: Mapping[str, Bundle], device: str | None, progress: Any
    ) -> tuple[Any, Outcome]:
        from low_attenuation.analysis import analyse

        return analyse(paths, models["lungs"], device, progress)

    def point(self, summary: dict[str, Any]) -> Point | None:
        share = summary["low_attenuation"]["both"]
        return Point(f"{100 * share:.1f} %", f"{100 * share:.1f} %")


METHOD = LowAttenuation()
