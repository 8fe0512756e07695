"""Who lungnode is on the wire and in the files that it writes: the one source of these facts.

Every association, in either direction, and every file carries the same implementation class UID and version name, so
that an admin who reads a peer's log can tell which system it spoke to (PS3.7 D.3.3.2, PS3.10 7.1).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from node import __version__

if TYPE_CHECKING:  # a process that only names lungnode does without the network
    from pynetdicom import AE

#: Manufacturer (0008,0070) and Manufacturer's Model Name (0008,1090) of every object.
MANUFACTURER: Final = "lungnode"
MODEL_NAME: Final = "lungnode"

#: Implementation Class UID (PS3.7 D.3.3.2): fixed for all releases, from a UUID (PS3.5 B.2).
IMPLEMENTATION_CLASS_UID: Final = "2.25.236250589914516971170341255605065768586"

#: Implementation Version Name (PS3.7 D.3.3.2.3): 16 characters at most.
IMPLEMENTATION_VERSION_NAME: Final = f"LUNGNODE {__version__}"[:16]


#: Namespace of UIDs that are a function of names (RFC 9562 section 5.5); fixed for all releases.
_NAMESPACE: Final = uuid.UUID("0f1dbb9c-5f6e-5d1a-9d55-2b0f8e7a6c31")


def uid_of(*names: str) -> str:
    """UID that is a function of `names`: ``2.25.`` and a version 5 UUID in decimal (PS3.5 B.2)."""
    name = "\n".join(names)
    return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"


def application_entity(ae_title: str) -> AE:
    """A pynetdicom application entity that names this implementation, to listen or to open associations with."""
    from pynetdicom import AE

    entity = AE(ae_title)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    return entity
