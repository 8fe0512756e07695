"""The one way from a text to a path: UIDs from the network or from files, and relative paths from the ledger.

Whatever such a text holds, the path that is made of it lies in the folder that it is meant for.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from node.text import UID


class UnsafePathError(ValueError):
    """A text would make a path outside its folder; the message does not quote it, for it can hold anything."""


class InvalidUIDError(UnsafePathError):
    """A UID is no UID; the message does not quote it, for it can hold anything."""


def valid_uid(uid: str) -> str:
    """The UID itself, which is one component of a path; raises `InvalidUIDError` for what is no UID."""
    if not isinstance(uid, str) or not UID.match(uid):
        raise InvalidUIDError("a UID is not digits and dots of at most 64 characters (PS3.5 9.1)")
    return uid


def within(folder: Path, *names: str) -> Path:
    """A path below `folder`; each of `names` is a relative path that was stored, or a name made of a `valid_uid`.

    Raises
    ------
    UnsafePathError
        One is absolute, goes up, is empty or no text, or holds what no name of ours does. Links are not followed: only
        who may write to the folder can make one.
    """
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or "\\" in name or PureWindowsPath(name).drive:
            raise UnsafePathError("a stored path is no path of this program's")
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
            raise UnsafePathError("a stored path leads out of its folder")
    return folder.joinpath(*names)
