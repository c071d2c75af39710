"""A small whole root, as a layer of an image: busybox and next to nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from madang.wire.image import ImageKind
from madang.wire.kernel import ImageMount

BUSYBOX: Final = "/bin/busybox"
APPLETS: Final = (
    "cat chmod chown chroot cp cut df echo env false find grep head hostname id kill ln ls mkdir "
    "mkfifo mknod mount mv nproc od ps pwd rm rmdir sed sh sleep sort stat tail tar tee test touch "
    "tr true tty umount uname wc whoami"
).split()
DIGEST: Final = "b" * 64
"""No digest of anything: the launcher takes any name."""


def busybox_layer(state: Path, digest: str = DIGEST) -> str:
    """Put the layer where a launcher on *state* looks for it; its digest.

    It has no folder that sessions need, and a user ``www``. Raises FileNotFoundError without
    busybox-static.
    """
    root = state / "layers" / digest
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in APPLETS:
        os.symlink("busybox", root / "bin" / name)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nwww:x:33:33::/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nwww:x:33:\n")
    (root / "etc/secret").write_text("hidden\n")
    os.chmod(root / "etc/secret", 0o600)
    return digest


def root_image(*layers: str) -> ImageMount:
    return ImageMount(name="tiny", digest="d" * 64, kind=ImageKind.ROOT.value, layers=layers)
