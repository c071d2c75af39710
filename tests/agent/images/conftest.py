"""What tests of builds share."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from madang.agent.build import Builds
from madang.agent.layers import LayerStore
from madang.agent.registry import registry
from madang.kit.clock import SystemClock
from madang.wire.kernel import ImageMount, KernelId, KernelSpec
from madang.wire.size import GIB, Size

KERNEL = KernelId("01abcdefghjkmnpqrstvwxyz00", 1)
SPEC = KernelSpec(
    argv=("python3",),
    image=ImageMount(name="host", digest="", kind="host"),
    size=Size(cpu=1, mem_bytes=GIB, pids=100, disk_bytes=GIB),
    build=True,
    owner="ann",
)


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    made = LayerStore(str(tmp_path / "layers"), SystemClock())
    made.open()
    return made


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """What the build session leaves."""
    folder = tmp_path / "outputs"
    (folder / "layers").mkdir(parents=True)
    return folder


@pytest.fixture
async def builds(tmp_path: Path, outputs: Path) -> AsyncGenerator[Builds, None]:
    """Builds on a node whose session's outputs lie in ``outputs``."""
    (tmp_path / "service").mkdir()
    made = Builds(
        state_dir=str(tmp_path),
        service_dir=lambda _: str(tmp_path / "service"),
        read=reader(outputs),
        registry=registry(os.environ),
        clock=SystemClock(),
    )
    await made.open()
    yield made
    await made.close()


def reader(outputs: Path) -> Callable[[KernelId, str], AsyncGenerator[bytes, None]]:
    async def read(_: KernelId, path: str) -> AsyncGenerator[bytes, None]:
        with open(path.replace("/outputs", str(outputs)), "rb") as file:
            while chunk := file.read(64 * 1024):
                yield chunk

    return read


def archive(*entries: tuple[str, bytes, int, str]) -> io.BytesIO:
    """A tar of (name, type, mode, content or link target)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, mode, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, mode
            if kind == tarfile.REGTYPE:
                info.size = len(content.encode())
                tar.addfile(info, io.BytesIO(content.encode()))
            else:
                info.linkname = content
                tar.addfile(info)
    made.seek(0)
    return made
