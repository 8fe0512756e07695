"""Presentation contexts of the Storage SCP: every storage SOP class, also private ones and those younger than our list.

A study that is sent here may hold objects that nobody analyses, and a sender whose private object is refused calls the
whole study failed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Final

from pydicom.uid import UID
from pynetdicom import sop_class
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import AllStoragePresentationContexts, PresentationContext, build_context

#: Presentation contexts are answered with the first of these that is proposed (PS3.8 9.3.3.2): whole pixels that any
#: reader can read, then lossless, then lossy, for a sender that offers a choice may compress for us. Last, what can
#: only be kept.
TRANSFER_SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless SV1
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.202",  # High-Throughput JPEG 2000 RPCL Lossless
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.8.1",  # Deflated Image Frame
    "1.2.840.10008.1.2.4.92",  # JPEG 2000 part 2 Lossless
    "1.2.840.10008.1.2.4.110",  # JPEG XL Lossless
    "1.2.840.10008.1.2.4.111",  # JPEG XL JPEG Recompression
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.4.93",  # JPEG 2000 part 2
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    *(f"1.2.840.10008.1.2.4.{n}" for n in (*range(52, 57), *range(58, 67))),  # JPEG processes retired in 2001
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(100, 109)),  # MPEG2, MPEG-4, HEVC
    *(f"1.2.840.10008.1.2.4.{n}.1" for n in range(100, 107)),  # the same, fragmentable
)

#: Service class that private and unknown SOP classes are served as (PS3.4 B.1, Storage Service Class).
_STORAGE_SERVICE = "1.2.840.10008.4.2"

_KNOWN_STORAGE = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)


def storage_contexts(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """Contexts for those proposed SOP classes that are storage, private, or younger than our list."""
    return [_storage_context(uid) for uid in {str(cx.abstract_syntax) for cx in proposed} if _is_storage(uid)]


def common_negotiation(event: Any) -> dict[UID, SOPClassCommonExtendedNegotiation]:
    """Have pynetdicom treat unknown SOP classes as of the Storage Service Class (PS3.7 D.3.3.6): `EVT_SOP_COMMON`.

    The acceptor's view of this negotiation is never sent to the peer, so it is the supported way to have an unknown
    SOP class served; `_config.UNRESTRICTED_STORAGE_SERVICE` would also take transfer syntaxes that nobody can read.
    """
    served = {}
    for context in event.assoc.requestor.primitive.presentation_context_definition_list:
        uid = UID(context.abstract_syntax)
        if uid not in _KNOWN_STORAGE and _is_storage(uid):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = uid
            item.service_class_uid = UID(_STORAGE_SERVICE)
            served[uid] = item
    return served


@functools.lru_cache(512)
def _storage_context(uid: str) -> PresentationContext:
    """A context, which an acceptor only reads; building those of one association takes 20 ms."""
    return build_context(uid, list(TRANSFER_SYNTAXES))


@functools.lru_cache(512)
def _is_storage(uid: str) -> bool:
    known = UID(uid)
    return uid in _KNOWN_STORAGE or known.is_private or not hasattr(sop_class, known.keyword or "?")
