"""Roles of models, and the conditions that a bundle must meet to have one.

A bundle's metadata give `role` and `dimensions`, and in `network_data_format` the number of output channels. Nothing is
inferred from position or size: a model whose role differs from the one it is configured for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.registry import Bundle, BundleError


@dataclass(frozen=True)
class Role:
    """One of the models that a method needs."""

    #: As `role` of the metadata has it.
    name: str
    #: What it finds, in words.
    finds: str
    #: Channels of the network's output.
    channels: int
    #: The bundle that has the role where the settings name none.
    default: str
    #: Axes of the network's image: 2 for slices.
    dimensions: int = 2
    #: Further numbers that the metadata must give, each positive.
    needs: tuple[str, ...] = ()

    def require(self, bundle: Bundle) -> None:
        """Check by the metadata that a bundle has this role.

        A bundle from before roles were recorded has none: then the settings decide, and the rest must fit.

        Raises
        ------
        BundleError
            It has another role, or its network gives something else.
        """
        file = bundle.path / "configs" / "metadata.json"
        if (said := role_of(bundle.metadata)) not in (None, self.name):
            raise BundleError(f"model '{bundle.name}' is a model of {said}, not of {self.name} ({file}: 'role')")
        try:
            channels = int(bundle.metadata["network_data_format"]["outputs"]["pred"]["num_channels"])
            dimensions = int(bundle.metadata.get("dimensions", self.dimensions))
            numbers = [float(bundle.metadata[need]) for need in self.needs]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{file}: a model of {self.name} needs {error}") from None
        if (channels, dimensions) != (self.channels, self.dimensions):
            raise BundleError(
                f"model '{bundle.name}' cannot be a model of {self.name}: its network has {channels} channels in "
                f"{dimensions} dimensions, not {self.channels} in {self.dimensions} ({file})"
            )
        if wrong := [need for need, number in zip(self.needs, numbers, strict=True) if not number > 0]:
            raise BundleError(f"{file}: {', '.join(wrong)} must be positive")


LUNGS = Role("lungs", "the right and the left lung", 3, "lungs")
INFECTION = Role("infection", "infection", 1, "infection", needs=("threshold", "minimum_lesion_mm3"))

#: Roles of the models that come with the program.
ROLES: Mapping[str, Role] = {role.name: role for role in (LUNGS, INFECTION)}


def role_of(metadata: Mapping[str, Any]) -> str | None:
    """The role in a bundle's metadata; None where there is none."""
    said = metadata.get("role")
    return None if said is None else str(said)
