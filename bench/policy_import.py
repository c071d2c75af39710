"""What rules about files cost a program that opens very many, as ``import torch`` does."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

from rows import Bench, Row, interleaved

ROUNDS: Final = 15
POLICY: Final = """
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
os.write(1, f"{took} {len(sys.modules)}\\n".encode())
os._exit(0)
"""


def policy_import(bench: Bench) -> Iterator[Row]:
    """Hundreds of modules of the standard library, with such rules and without, in turn."""
    modules = 0

    def imported_s(policy: str) -> float:
        nonlocal modules
        argv = ("/usr/bin/python3", "-I", "-c", PROGRAM)
        run = bench.client.run(argv, cpu=1, mem="512m", policy=policy)
        seconds, count = b"".join(chunk.data for chunk in run).split()
        modules = int(count)
        bench.client.remove(run.wait().id)
        return float(seconds)

    without, kept = interleaved(
        ROUNDS, lambda: imported_s("version = 1\n"), lambda: imported_s(POLICY)
    )
    ratio = statistics.median(kept) / statistics.median(without)
    note = f"{modules} modules in {statistics.median(without) * 1000:.0f} ms without rules"
    yield Row(name="policy_import", value=ratio, unit="×", goal="≤ 1.08", note=note)
