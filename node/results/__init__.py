"""Findings to DICOM objects: one maker per kind of object."""
