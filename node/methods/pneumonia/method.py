"""The pneumonia method, as the registry finds it. Networks and arrays are imported when it runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.registry import Bundle, load_bundle
from models.roles import INFECTION, LUNGS, Role
from node.methods.outcome import Outcome, Point, Subject
from node.methods.pneumonia.subject import SUBJECT
from node.methods.registry import Progress

if TYPE_CHECKING:
    from models.segmenter.inference import Segmenter
    from node.images.volume import Volume
    from node.intake.assembly import ClosedSeries
    from node.intake.verdict import Verdict


@dataclass(frozen=True)
class Pneumonia:
    """Lungs and infection on chest CT, measured, with published rules about the scan."""

    name: str = "pneumonia"
    subject: Subject = SUBJECT
    segmentations: tuple[str, ...] = ("infection-seg", "lung-seg")
    roles: Mapping[str, Role] = field(default_factory=lambda: {"lungs": LUNGS, "infection": INFECTION})

    def accepts(self, series: ClosedSeries) -> list[Verdict]:
        """Axial chest CT; see `node.methods.pneumonia.triage`."""
        from node.methods.pneumonia.triage import triage

        return triage(series)

    def run(
        self, paths: Sequence[Path], models: Mapping[str, Bundle], device: str | None, progress: Progress
    ) -> tuple[Volume, Outcome]:
        """See `node.methods.registry.Method.run`."""
        from node.methods.pneumonia import pipeline
        from node.methods.pneumonia.outcome import outcome_of

        lungs, infection = models["lungs"], models["infection"]
        networks = segmenter(device, lungs.path, infection.path)
        smallest = float(infection.metadata["minimum_lesion_mm3"])
        volume, findings = pipeline.analyse(paths, networks, progress, minimum_lesion_mm3=smallest)
        return volume, outcome_of(volume, findings)

    def point(self, summary: dict[str, Any]) -> Point | None:
        """The infected share of both lungs."""
        from node.methods.pneumonia.outcome import point_of

        return point_of(summary)


METHOD = Pneumonia()


@functools.cache
def segmenter(device: str | None, lungs: Path, infection: Path) -> Segmenter:
    """The networks of two bundles' folders, loaded once in a process."""
    from models.runtime import keep_memory
    from models.segmenter.inference import Segmenter  # torch takes seconds to import; only the analyse worker needs it

    keep_memory()
    return Segmenter(load_bundle(lungs), load_bundle(infection), device)
