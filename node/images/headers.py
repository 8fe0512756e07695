"""Headers of a series' files, as far as they can be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydicom import Dataset
from pydicom.errors import InvalidDicomError

from node.images.elements import HeaderError
from node.images.received import read_received


def first_header(paths: Sequence[Path]) -> Dataset:
    """The header of the first file that can be read: the analysis says, and tries again, where one of them cannot.

    Raises
    ------
    OSError
        None can be read. `FileNotFoundError` when they are all gone.
    """
    errors: list[OSError] = []
    for path in paths:
        try:
            return read_received(path)
        except OSError as error:
            errors.append(error)
    raise next((one for one in errors if not isinstance(one, FileNotFoundError)), errors[0])


def all_headers(paths: Sequence[Path]) -> list[Dataset]:
    """Headers of the files that can be read, as one that cannot may be why the analysis failed.

    Raises
    ------
    OSError, InvalidDicomError, HeaderError
        None can be read.
    """
    headers, errors = list[Dataset](), list[Exception]()
    for path in paths:
        try:
            headers.append(read_received(path))
        except (OSError, InvalidDicomError, HeaderError) as error:
            errors.append(error)
    if errors and not headers:
        raise errors[0]
    return headers
