"""Bundles by name: configuration, digest-checked weights, model card (MONAI bundle layout)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """Names a model exactly, for the objects that its results go into."""

    name: str
    version: str
    #: sha256 of `model.safetensors`, hex.
    sha256: str
