"""Procedural chest CT with exact masks."""
