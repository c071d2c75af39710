"""``build.pyz debian SUITE``: the first stage of a Debian root, as the only layer of an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from madang.agent.buildscript import debian, intake, rootlayer
from madang.agent.buildscript.intake import Foreign, Intake, Source
from madang.agent.buildscript.main import Build, BuildError, Exit, Places, say

LOCK = "lock"


def run(places: Places, suite: str) -> None:
    """Raises BuildError."""
    intake.scratch(places)
    build = Build(places)
    build.connect()
    os.environ.update(build.environment)
    arch = debian.MACHINES.get(os.uname().machine, os.uname().machine)
    mirror = build.environment.get("DEBIAN_MIRROR")
    if not mirror:
        text = "no mirror of Debian is known: set DEBIAN_MIRROR where `madang up` starts."
        raise BuildError(Exit.NETWORK, text)
    root = os.path.join(places.scratch, "root")
    os.makedirs(root)
    try:
        found = debian.make(root, mirror, suite, arch, say)
    except debian.DebianError as exc:
        raise BuildError(Exit.NETWORK, str(exc)) from exc
    layer = Foreign("", lambda: _tar(places, root), f"debian {suite}")
    config = {"env": {}, "architecture": arch}
    Intake(places, {}).run(Source([layer], config, {}))
    with open(os.path.join(places.outputs, LOCK), "w", encoding="utf-8") as file:
        file.writelines(f"{each.name}:{each.arch}={each.version}\n" for each in found)


@contextmanager
def _tar(places: Places, root: str) -> Iterator[BinaryIO]:
    path = os.path.join(places.scratch, "root.tar")
    with open(path, "w+b") as file:
        rootlayer.write(root, file)
        file.seek(0)
        yield file
    os.unlink(path)
