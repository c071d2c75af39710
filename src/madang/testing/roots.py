"""Small whole roots, as layers of images: busybox and next to nothing, or Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from madang.agent.runtime.contract import Prepared, Started
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.sessions import Launcher
from madang.wire.image import ImageKind
from madang.wire.kernel import ImageMount, KernelId, KernelSpec
from madang.wire.session import RootMode

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


PROGRAMS: Final = "bash cat cp df echo false id ln ls mkdir mknod mount sh sleep true".split()
_LEFT_OUT: Final = ("test", "idlelib", "ensurepip", "lib2to3", "tkinter", "__pycache__")


def python_layer(state: Path, digest: str) -> str:
    """A layer with the machine's own python3, what it takes, and some programs beside it."""
    root = state / "layers" / digest
    python = os.path.realpath("/usr/bin/python3")
    library = f"/usr/lib/{os.path.basename(python)}"
    shutil.copytree(
        library, f"{root}{library}", symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT)
    )
    for name in ("bin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        os.symlink(f"usr/{name}", root / name)
    programs = {python, *filter(None, map(shutil.which, PROGRAMS))}
    extensions = [str(path) for path in Path(library, "lib-dynload").glob("*.so")]
    for path in {*programs, *_libraries([*programs, *extensions])}:
        target = Path(f"{root}{os.path.realpath(os.path.dirname(path))}", os.path.basename(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    os.symlink(os.path.basename(python), root / "usr/bin/python3")
    (root / "etc").mkdir()
    return digest


def _libraries(files: list[str]) -> set[str]:
    """What the loader would take for them."""
    done = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False)
    words = (line.split() for line in done.stdout.splitlines() if not line.endswith(":"))
    return {word for line in words for word in line if word.startswith("/")}


class FakeRootRuntime(NativeRuntime):
    """Every session has a root of its own, and programs believe they are root."""

    def __init__(self, launcher: Launcher) -> None:
        super().__init__(launcher.socket, str(launcher.state), SystemClock())
        digest = "f" * 64
        if not (launcher.state / "layers" / digest).exists():
            python_layer(launcher.state, digest)
        self._image = root_image(digest)

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        return await super().prepare(kernel, self._rooted(spec))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        return await super().start(kernel, self._rooted(spec))

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        return await super().run(kernel, self._rooted(spec))

    def _rooted(self, spec: KernelSpec) -> KernelSpec:
        return replace(spec, image=self._image, root=RootMode.FAKE)
