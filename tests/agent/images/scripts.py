"""The real build script beside the real proxy, without a session around them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from tests.agent.images.conftest import KERNEL, SPEC

from madang.agent.build import Builds
from madang.kit import codec
from madang.wire.image import BuildManifest
from madang.wire.session import Ended, Reason

SCRIPT = """
import sys
sys.path.insert(0, {tools!r} + "/build.pyz")
from madang.agent.buildscript import main, words
places = main.Places({tools!r}, {proxy!r}, {outputs!r}, {scratch!r})
sys.exit(words.run(sys.argv[1:], places))
"""


async def run(
    builds: Builds,
    tmp_path: Path,
    *words: str,
    stdin: bytes = b"",
    offers: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> tuple[Ended, str]:
    """One build; how it ended and what it printed."""
    spec = replace(SPEC, image=replace(SPEC.image, offers=offers))
    await builds.before_start(KERNEL, spec)
    code = SCRIPT.format(
        tools=str(tmp_path / "tools"),
        proxy=str(tmp_path / "service" / "proxy.sock"),
        outputs=str(tmp_path / "outputs"),
        scratch=str(tmp_path / "scratch"),
    )
    process = await asyncio.create_subprocess_exec(
        *("/usr/bin/python3", "-I", "-c", code, *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": os.defpath, **(env or {})},
    )
    text, _ = await process.communicate(stdin)
    ended = Ended(reason=Reason.EXIT, exit_code=process.returncode)
    return await builds.after_end(KERNEL, spec, ended), text.decode()


def manifest(outputs: Path) -> BuildManifest:
    return codec.from_json(BuildManifest, (outputs / "image.json").read_bytes())
