"""lungnode: receives chest CT over DICOM, segments infection, and sends the results back to the PACS."""

__version__ = "0.1.0"
