"""Names of folders for names that people chose: readable, alone on any file system, and nowhere else than they look."""

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(?<!\.)")
_HASHED = re.compile(r"-[0-9a-f]{12}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows
LONGEST = 80  # characters; file systems take 255 bytes with all suffixes


def folder_of(name: str) -> str:
    """A folder's name that no other name has, on file systems that take no notice of case either.

    Lower-case letters, digits and `_.+-` stand as they are; any other name ends in a hash of itself.
    """
    return name if name == name.lower() and _is_plain(name) else _hashed(name)


def readable(name: str) -> str:
    """A folder's name in which capitals may stand, for a folder that says itself what it is of."""
    return name if _is_plain(name) else _hashed(name)


def _is_plain(name: str) -> bool:
    usual = _PLAIN.fullmatch(name) and len(name) <= LONGEST and not _RESERVED.fullmatch(name)
    return bool(usual) and not _HASHED.search(name[-13:])


def _hashed(name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    shown = re.sub(r"[^A-Za-z0-9_+-]+", "_", name).strip("_")[: LONGEST - 13]
    return f"{shown or 'unnamed'}-{digest}"
