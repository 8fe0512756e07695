"""How many instances a series has, as the archive that sent it counts them: a C-FIND (PS3.4 C.6.2, Study Root).

The count is asked when an association ends, in a thread, and is one more witness of whether all has come. It cannot
prove that nothing more will: an archive may itself still be receiving.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import structlog
from pydicom import Dataset
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    StudyRootQueryRetrieveInformationModelFind,
)

from node.config import Peer
from node.network.associations import PeerError, association, hexadecimal, status_of
from node.telemetry.logs import plainly

log = structlog.stdlib.get_logger(__name__)

#: Seconds for the connection, the association and the answer each.
TIMEOUT_S = 3.0

#: Questions under way at a time; an archive that does not answer holds up other questions and nothing else.
AT_ONCE = 4

#: What is asked with (PS3.4 C.6.2).
QUERY_MODEL = StudyRootQueryRetrieveInformationModelFind

#: Takes the count, or None when there is none to be had.
Tell = Callable[[int | None], None]

#: Answers that are waited for: one series has one match, and a peer could send them without end.
_MOST_ANSWERS = 100

#: C-FIND statuses: a match follows (PS3.4 C.4.1.1.4).
_PENDING = (0xFF00, 0xFF01)


class Counter:
    """Asks peers for their counts.

    Parameters
    ----------
    peers
        Who may be asked, by AE title.
    ae_title
        Our own.
    """

    def __init__(self, peers: Mapping[str, Peer], ae_title: str) -> None:
        self._peers = peers
        self._ae_title = ae_title
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="count")
        self._lock = threading.Lock()
        self._stopped = False
        #: What waits for a thread, by study and series UID. A later question about a series takes an earlier one's
        #: place: one that arrives in a thousand associations is asked for once, as it is by then.
        self._waiting: dict[tuple[str, str], tuple[Peer, Tell]] = {}

    def ask(self, calling_ae: str, study_uid: str, series_uid: str, tell: Tell) -> bool:
        """Begin to ask the sender of a series; `tell` gets the count, or None. False where it may not be asked.

        `tell` is not called when the series is asked for again before its turn has come.
        """
        peer, series = self._peers.get(calling_ae), (study_uid, series_uid)
        with self._lock:
            if peer is None or self._stopped:
                return False
            if series not in self._waiting:
                self._threads.submit(self._work, series)
            self._waiting[series] = peer, tell
        return True

    def stop(self) -> None:
        """Ask no more; what is under way ends by itself."""
        with self._lock:
            self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _work(self, series: tuple[str, str]) -> None:
        with self._lock:
            peer, tell = self._waiting.pop(series)
        count = None
        try:
            count = count_instances(peer, self._ae_title, *series)
        except Exception as error:
            log.warning("count not asked", calling_ae=peer.ae_title, error=plainly(error))
        tell(count)


def count_instances(peer: Peer, ae_title: str, study_uid: str, series_uid: str) -> int | None:
    """Number of Series Related Instances (0020,1209) as the peer has it; None when it does not say."""
    query = Dataset()
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID, query.SeriesInstanceUID = study_uid, series_uid
    query.NumberOfSeriesRelatedInstances = ""
    count, because = None, "no match"
    try:
        with association(peer, ae_title, [build_context(QUERY_MODEL)], timeout_s=TIMEOUT_S) as made:
            for n, (answer, found) in enumerate(made.send_c_find(query, QUERY_MODEL)):
                if n >= _MOST_ANSWERS:
                    count, because = None, f"more than {_MOST_ANSWERS} answers"
                    made.abort()
                    break
                status = status_of(answer)
                if status not in _PENDING:
                    because = because if status == 0x0000 else f"C-FIND answered {hexadecimal(status)}"
                elif found is not None and found.get("SeriesInstanceUID") == series_uid:
                    count = int(found.get("NumberOfSeriesRelatedInstances") or 0)
                    count = count if 0 < count < 1 << 31 else None  # an IS has 32 bits (PS3.5 table 6.2-1)
    except PeerError as error:
        because = str(error)
    if count is None:
        hint = (
            f"check with `lungnode echo`, and that it answers C-FIND; or take 'count' out of what {peer.ae_title} may"
        )
        log.warning("peer returned no instance count for the series", peer=peer.ae_title, reason=because, hint=hint)
    return count
