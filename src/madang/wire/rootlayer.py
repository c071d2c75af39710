"""How layers of whole roots are kept: names in their tars, modes and attributes on a node's disk.

On disk nothing is setuid, writable for others or anybody's but the agent's. What a file has in its
image stands in the attribute ``RECORD``, as ``MODE UID GID``, the first in octal. It counts as long
as the file has the mode that it got then, so that whoever changes the mode later has the last word.

Standard library only, and no newer Python than 3.10: build sessions read it too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

WHITEOUT: Final = b".wh."
OPAQUE: Final = b".wh..wh..opq"
RECORD: Final = "user.madang.was"
OVERLAY_OPAQUE: Final = "user.overlay.opaque"
FOLDER_MODE: Final = 0o755
FILE_MODE: Final = 0o644
"""At least, on disk: whoever has a writable root may write as its owner."""
MAX_ID: Final = 2**32 - 2
_RECORD: Final = re.compile(rb"([0-7]{1,4}) ([0-9]{1,10}) ([0-9]{1,10})")


@dataclass(frozen=True, slots=True)
class Meta:
    """Mode (``0o7777``) and owner that a file has in its image."""

    mode: int
    uid: int = 0
    gid: int = 0

    def on_disk(self, folder: bool) -> int:
        """Its mode in the layer store: all may read, its owner alone may write."""
        return FOLDER_MODE if folder else self.mode & FOLDER_MODE | FILE_MODE

    def record(self) -> bytes:
        return b"%o %d %d" % (self.mode, self.uid, self.gid)


def meta_of(mode: int, record: bytes, *, folder: bool) -> Meta:
    """What a file with *mode* on disk is in its image; *record*: its attribute, if it has one."""
    if match := _RECORD.fullmatch(record):
        was = Meta(int(match[1], 8), int(match[2]), int(match[3]))
        if was.on_disk(folder) == mode and max(was.uid, was.gid) <= MAX_ID:
            return was
    return Meta(mode)
