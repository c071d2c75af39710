"""What policies cost a program that opens very many files, as ``import torch`` does."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from madang.agent.launcher import seccomp, syscalls
from rows import Bench, Row, interleaved

ROUNDS: Final = 15
_NO_NEW_PRIVS: Final = 38
DEFAULT: Final = "version = 1\n"
FILES: Final = """
version = 1

[[files]]
access = ["open", "execute"]
deny = ["/usr/bin/gcc", "/usr/share/secret/**", "/work/secret/**"]
"""
PROGRAM: Final = """
import importlib, os, sys, time
left_out = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"}
folder = os.path.dirname(os.__file__)
names = []
for top, folders, files in os.walk(folder):
    folders[:] = [f for f in folders if f not in left_out | {"__pycache__", "dist-packages"}
                  and not f.startswith(("test", "config-"))]
    package = os.path.relpath(top, folder).replace("/", ".").lstrip(".")
    names += [f"{package}.{f[:-3]}".lstrip(".") for f in files
              if f.endswith(".py") and f[:-3] not in left_out and not f.startswith("__")]
sys.stdout = sys.stderr = open("/dev/null", "w")
began = time.perf_counter()
for name in sorted(names):
    try:
        importlib.import_module(name)
    except BaseException:
        pass
took = time.perf_counter() - began
os.write(1, f"{took} {time.process_time()} {len(sys.modules)}\\n".encode())
os._exit(0)
"""


ARGV: Final = ("/usr/bin/python3", "-I", "-c", PROGRAM)


def policy_import(_: Bench) -> Iterator[Row]:
    """Hundreds of modules of the standard library, with the default policy's filter and without.

    Bare processes: all else that sessions have is the same with any policy, and with none.
    """
    program = seccomp.program()

    def guarded() -> None:
        syscalls.prctl(_NO_NEW_PRIVS, 1)
        seccomp.install(program)

    yield _row("policy_import", "without any", _bare, lambda: _bare(guarded))


def policy_import_files(bench: Bench) -> Iterator[Row]:
    """The same under rules about files and under the default policy."""
    yield _row(
        "policy_import_files",
        "under the default policy",
        lambda: _in_session(bench, DEFAULT),
        lambda: _in_session(bench, FILES),
    )


class _Took(NamedTuple):
    seconds: float
    processor_s: float
    modules: int


def _in_session(bench: Bench, policy: str) -> _Took:
    run = bench.client.run(ARGV, cpu=1, mem="512m", policy=policy)
    output = b"".join(chunk.data for chunk in run)
    bench.client.remove(run.wait().id)
    return _took(output)


def _bare(before: Callable[[], None] | None = None) -> _Took:
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    done = subprocess.run(
        ARGV, check=True, stdout=subprocess.PIPE, env=environment, preexec_fn=before
    )
    return _took(done.stdout)


def _took(output: bytes) -> _Took:
    seconds, processor, modules = output.split()
    return _Took(float(seconds), float(processor), int(modules))


def _row(name: str, than: str, less: Callable[[], _Took], more: Callable[[], _Took]) -> Row:
    before, after = interleaved(ROUNDS, less, more)
    seconds = statistics.median(each.seconds for each in before)
    ratio = statistics.median(each.seconds for each in after) / seconds
    used = statistics.median(each.processor_s for each in after) / statistics.median(
        each.processor_s for each in before
    )
    modules = " or ".join(map(str, sorted({each.modules for each in (*before, *after)})))
    note = f"{modules} modules in {seconds * 1000:.0f} ms {than}; its processor time × {used:.3f}"
    return Row(name=name, value=ratio, unit="×", goal="≤ 1.08", note=note)
