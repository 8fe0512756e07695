"""Settings of pydicom and pynetdicom that hold for a whole process."""

from __future__ import annotations

import functools

import pydicom
from pynetdicom import _config

#: The check of a UID as pynetdicom has it.
_VALIDATE_UID = _config.VALIDATORS["UI"]


def configure() -> None:
    """Set both libraries up; each process calls this once at its start, before it reads or sends DICOM.

    So the same file is read in the same way by listener, workers and command line. May be called again.
    """
    # Values unlike their VR are common in real files. pydicom would warn of each, and quote it, which may be patient
    # data; what lungnode itself reads of a header it checks itself.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    # These cost 40 % of negotiation time and buy us nothing: per-PDU log summaries that we never emit, and the same
    # few UIDs checked again and again.
    _config.LOG_HANDLER_LEVEL = "none"
    _config.VALIDATORS["UI"] = functools.lru_cache(1024)(_VALIDATE_UID)
    # Files go out from disk in fragments, never whole in memory (a 166 MB object took 145 MB instead of 547 MB).
    _config.STORE_SEND_CHUNKED_DATASET = True
