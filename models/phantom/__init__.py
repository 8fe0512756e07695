"""Procedural chest CT with exact masks: `draw` composes what the other modules draw."""
