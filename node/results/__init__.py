"""Findings as DICOM objects: segmentations, structured report, colour capture."""
