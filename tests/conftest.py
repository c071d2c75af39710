"""For all tests: nothing that a test starts may outlive it."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# How long an example takes says more about the machine than about the code; pytest has a limit.
settings.register_profile("madang", deadline=None)
settings.register_profile("long", deadline=None, max_examples=5000)  # `make fuzz`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "madang"))

# Processes that tests start find the package, installed or not.
os.environ["PYTHONPATH"] = str(ROOT / "src")

# Nothing of whoever runs the tests is read or written: settings, tokens, caches.
_own = tempfile.mkdtemp(prefix="madang-home-")
atexit.register(shutil.rmtree, _own, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("MADANG_")]:
    del os.environ[_name]
for _name in ("CONFIG", "DATA", "CACHE"):
    os.environ[f"XDG_{_name}_HOME"] = f"{_own}/{_name.lower()}"


@pytest.fixture
async def _no_leaked_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    current = asyncio.current_task()
    left = [t for t in asyncio.all_tasks() - before if t is not current and not t.done()]
    assert not left, f"the test left tasks behind: {left}"


def _children() -> dict[int, str]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            found[int(pid)] = command.decode(errors="replace")
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    function = getattr(request, "function", None)
    if function is not None and inspect.iscoroutinefunction(function):
        request.getfixturevalue("_no_leaked_tasks")
    before = _children().keys()
    yield
    left = {pid: command for pid, command in _children().items() if pid not in before}
    # The multiprocessing helpers of the interpreter itself live as long as the test run.
    left = {pid: c for pid, c in left.items() if "multiprocessing" not in c}
    assert not left, f"the test left processes behind: {left}"
