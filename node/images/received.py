"""A received file → its header as a pydicom `Dataset`, under limits that hold for every file.

Whoever reads a file again that a peer sent (listener, workers, command line) reads it here: what a peer can send is
limited by the disk alone, and a deflated megabyte may stand for gigabytes. Elements too large for a header are left
out as if they were absent. The pixel data is read by those only who decode it.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset

from node.images.counting import count_within
from node.images.elements import (
    DEFLATED,
    EXPLICIT_BIG,
    INFLATE_LIMIT,
    INFLATED_HELD,
    INFLATING,
    PIXELS,
    UNDEFINED,
    FileSpan,
    HeaderError,
    TooLargeError,
    Walk,
    inflate,
)

#: Bytes of one element's value that are kept, sequences too; a larger one is left out. What is read of a header are
#: names, dates and codes of patient, study and image, of some hundred bytes each.
LONGEST_VALUE = 256 << 10

#: Bytes of all elements of a header, and their number with those in sequences, from which on elements are left out:
#: pydicom takes about 1 kB for an item. Headers without functional groups have hundreds of elements, rarely thousands.
MOST_BYTES = 8 << 20
MOST_KEPT = 50_000

#: The same for functional groups, which are read for the analysis only, and where an image with more is refused: 10,000
#: frames of 100 elements and 10 kB each.
MOST_GROUP_BYTES = 100 << 20
MOST_GROUP_ELEMENTS = 1_000_000

#: Bytes of preamble, prefix and File Meta Information (PS3.10 7.1), which takes some hundred.
LONGEST_META = 64 << 10

#: Bytes of pixel data beyond twice what the header makes of it, that a file may have: encoded pixels are hardly ever
#: larger than plain ones, but there are offset tables, and makers pad.
PIXEL_MARGIN = 1 << 20

#: Specific Character Set, without which no text can be read.
_CHARACTER_SET = 0x00080005
#: Shared and Per-Frame Functional Groups Sequence.
_GROUPS = frozenset((0x52009229, 0x52009230))
#: Bytes of a deflated data set that are inflated in search of its pixel data, in turn; the last for functional groups.
_INFLATED = (1 << 20, INFLATED_HELD, INFLATE_LIMIT)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Descriptor of a regular file, for reading.

    Raises
    ------
    OSError
        It cannot be opened, or is a pipe, a device or a folder, on which a reader could block.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if stat.S_ISDIR(mode := os.fstat(file).st_mode):
            os.pread(file, 1, 0)  # raises what the system has to say of it
        if not stat.S_ISREG(mode):
            raise OSError("not a regular file")
        yield file
    finally:
        os.close(file)


def read_received(path: Path, keywords: Sequence[str] | None = None) -> FileDataset:
    """The header of a Part 10 file: its elements up to the pixel data.

    Parameters
    ----------
    path
        A file of any size and content.
    keywords
        Elements that are wanted. None for all but the functional groups of a multi-frame image.

    Returns
    -------
    FileDataset
        Without the elements that are larger than a header needs.

    Raises
    ------
    InvalidDicomError
        It is no Part 10 file.
    HeaderError
        It is damaged, or has more elements than are read of any.
    OSError
        It cannot be read.
    """
    with ReceivedFile(path) as file:
        return file.header(keywords)


class ReceivedFile:
    """A received file that is open; a context manager. Raises what `read_received` does.

    Attributes
    ----------
    meta
        The File Meta Information.
    transfer_syntax
        Its Transfer Syntax UID.
    dataset
        Where the data set lies.
    pixels_at
        After `header`: offset in the file of the element with the pixel data; None where there is none, or where the
        data set is deflated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = opened(path)
        self._file = self._opened.__enter__()
        self.pixels_at: int | None = None
        try:
            self._read_meta()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ReceivedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._opened.__exit__(None, None, None)

    def read(self, at: int, count: int) -> bytes:
        """Bytes of the file; fewer at its end."""
        return FileSpan(self._file, 0, at + count).read(at, count)

    def _read_meta(self) -> None:
        first = self.read(0, LONGEST_META)
        if first[128:132] != b"DICM":
            raise InvalidDicomError("no DICOM file")
        meta = BytesIO(first[132:])
        try:
            self.meta = FileMetaDataset(read_dataset(meta, False, True, stop_when=lambda tag, _vr, _n: tag >> 16 != 2))
            self.transfer_syntax = str(self.meta.get("TransferSyntaxUID") or "")
        except Exception as error:
            raise HeaderError(f"its File Meta Information cannot be read ({type(error).__name__})") from None
        start = 132 + meta.tell()
        self.dataset = FileSpan(self._file, start, os.fstat(self._file).st_size - start)
        self._order = "big" if self.transfer_syntax == EXPLICIT_BIG else "little"
        # As pydicom does: whatever the syntax says, the first element's VR is one or is none.
        vr = self.read(start + 4, 2)
        deflated = self.transfer_syntax == DEFLATED
        self._explicit = deflated or (vr.isalpha() and vr.isupper())

    def header(self, keywords: Sequence[str] | None = None) -> FileDataset:
        """The elements up to the pixel data, as by `read_received`."""
        tags = None if keywords is None else {_CHARACTER_SET, *(tag_for_keyword(word) or 0 for word in keywords)}
        try:
            if self.transfer_syntax == DEFLATED:
                dataset = self._deflated_header(tags)
            else:
                walk = Walk(self.dataset, self._order, False, self.dataset.size, self.dataset.size)
                dataset, pixels = self._kept(walk, self.dataset.size, tags)
                self.pixels_at = None if pixels is None else self.dataset.start + pixels
        except struct.error:
            raise HeaderError("the data set ends within an element") from None
        return FileDataset(self._path, dataset, bytes(128), self.meta, not self._explicit, self._order == "little")

    def pixels(self, header: Dataset) -> Dataset:
        """The element with the pixel data, of an image with this `header`.

        Raises
        ------
        TooLargeError
            It is much larger than the header says, which is where the memory for it comes from.
        HeaderError
            There is none.
        OSError
            The file cannot be read.
        """
        most = 2 * _plain_bytes(header) + PIXEL_MARGIN
        try:
            if self.transfer_syntax == DEFLATED:
                return self._deflated_pixels(most)
            if self.pixels_at is None:
                raise HeaderError("no Pixel Data")
            size = self.dataset.start + self.dataset.size - self.pixels_at
            walk = Walk(FileSpan(self._file, self.pixels_at, size), self._order, False, size, size)
            _, _, length, _ = walk.element(0, self._explicit)
            _require_room(size if length == UNDEFINED else length, most)
            with open(self._file, "rb", closefd=False) as file:
                file.seek(self.pixels_at)
                return self._parsed(file, size)
        except struct.error:
            raise HeaderError("the file ends within its pixel data") from None

    def _deflated_header(self, tags: Collection[int] | None) -> Dataset:
        grouped = tags is not None and not _GROUPS.isdisjoint(tags)
        for limit in _INFLATED if grouped else _INFLATED[:-1]:
            with INFLATING:
                inflated, count, _ = inflate(self.dataset, limit, limit)
                walk = Walk(inflated, self._order, False, len(inflated), self.dataset.size)
                dataset, pixels = self._kept(walk, len(inflated), tags)
                if pixels is not None or count < limit:
                    return dataset
        if grouped:
            raise TooLargeError(f"its header is larger than {INFLATE_LIMIT >> 20} MB when inflated")
        return dataset  # what lies behind so much is not read

    def _deflated_pixels(self, most: int) -> Dataset:
        with INFLATING:
            inflated, _, _ = inflate(self.dataset, INFLATE_LIMIT, INFLATE_LIMIT)
            walk = Walk(inflated, self._order, False, len(inflated), self.dataset.size)
            pixels = next((at for at, tag, *_ in _top(walk, len(inflated), True) if tag in PIXELS), None)
            if pixels is None:
                raise HeaderError("no Pixel Data")
            _, value, length, _ = walk.element(pixels, True)
            end = value + (most if length == UNDEFINED else length)
            _require_room(end - value, most)
            if end > len(inflated):
                inflated, _, _ = inflate(self.dataset, end, end)
        return self._parsed(BytesIO(inflated[pixels:end]), end - pixels)

    def _parsed(self, file: BinaryIO, size: int) -> Dataset:
        """The first element from here on, which is no sequence, by pydicom."""
        seen: list[int] = []

        def after_one(tag: int, _vr: object, _length: int) -> bool:
            seen.append(tag)
            return len(seen) > 1

        return self._dataset(file, 1, size, after_one)

    def _dataset(
        self, file: BinaryIO, elements: int, size: int, stop_when: Callable[[int, str | None, int], bool] | None = None
    ) -> Dataset:
        """What pydicom makes of so many elements and items; raises `TooLargeError` where it finds more."""
        reader = _Reader(file, elements, size)
        try:
            return read_dataset(reader, not self._explicit, self._order == "little", stop_when=stop_when)  # type: ignore[arg-type]
        except Exception:
            if reader.left < 0:  # of which pydicom makes an OSError
                raise TooLargeError("it holds more elements than were counted, so its encoding is in doubt") from None
            raise

    def _kept(self, walk: Walk, end: int, tags: Collection[int] | None) -> tuple[Dataset, int | None]:
        """The elements that are kept, and where the pixel data begins."""
        pieces, bytes_left, left, pixels, counted = list[bytes](), MOST_BYTES, MOST_KEPT, None, 0
        for at, tag, value, after, inner in _top(walk, end, self._explicit):
            if tag in PIXELS:
                pixels = at
                break
            if after > end:
                break
            if (tag in _GROUPS) if tags is None else (tag not in tags):
                continue
            size, grouped = after - at, tag in _GROUPS
            if not grouped and (size > min(LONGEST_VALUE, bytes_left)):
                continue
            count = count_within(walk, value, after, inner, MOST_GROUP_ELEMENTS if grouped else left)
            if grouped and (count is None or size > MOST_GROUP_BYTES):
                raise TooLargeError("its functional groups are larger than those of any image that is read")
            if count is None:
                continue
            pieces.append(walk.read(at, after))
            counted += count
            if not grouped:
                bytes_left, left = bytes_left - size, left - count
        with BytesIO(b"".join(pieces)) as kept:
            try:
                return self._dataset(kept, counted, sum(map(len, pieces))), pixels
            except TooLargeError:
                raise
            except Exception as error:
                raise HeaderError(f"its header cannot be parsed ({type(error).__name__})") from None


class _Reader:
    """A file for pydicom, which gets no further than was counted.

    pydicom takes other bytes for elements than `Walk` where a VR is none of PS3.5 table 6.2-1, or where an item mixes
    explicit and implicit elements; a value that was counted as one could hold any number of them.

    Parameters
    ----------
    file
        Where it reads.
    elements
        Elements and items that were counted. pydicom reads at most four times for each.
    size
        Bytes of them, of which it reads a value of undefined length in pieces of 8 kB.
    """

    def __init__(self, file: BinaryIO, elements: int, size: int) -> None:
        self.tell, self.seek = file.tell, file.seek
        self._read = file.read
        self.left = 4 * elements + size // 1024 + 100

    def read(self, count: int = -1) -> bytes:
        """Bytes of the file; raises `TooLargeError` after too many calls."""
        self.left -= 1
        if self.left < 0:
            raise TooLargeError
        return self._read(count)


def _top(walk: Walk, end: int, explicit: bool) -> Iterator[tuple[int, int, int, int, bool]]:
    """(offset, tag, offset of the value, end, whether what is nested is explicit) of each element of the data set.

    The last may be the pixel data, or one that ends beyond the data set.
    """
    at = 0
    while end - at >= 8:
        tag, value, length, inner = walk.element(at, explicit)
        if tag in PIXELS:
            yield at, tag, value, end, inner
            return
        try:
            after = walk.skip(value, end, inner) if length == UNDEFINED else value + length
        except TooLargeError:
            raise
        except HeaderError:
            return  # the data set ends within it
        yield at, tag, value, after, inner
        at = after


def _plain_bytes(header: Dataset) -> int:
    """Bytes of an image's pixels as they are when nothing encodes them."""
    try:
        counts = [int(header.get(word) or 1) for word in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
        bits = int(header.get("BitsAllocated") or 8)
    except (TypeError, ValueError):
        raise HeaderError("its header does not say how large its pixel data is") from None
    size = bits // 8 or 1
    for count in counts:
        size *= max(count, 1)
    return size


def _require_room(size: int, most: int) -> None:
    if size > most:
        raise TooLargeError(
            f"its pixel data takes {size >> 20} MB, and its header accounts for {most >> 20} MB at most"
        )
