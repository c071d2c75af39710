"""Figures of warm starts: sessions forked from interpreters that have everything imported."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Final

import machine
from rows import ROUNDS, SMALL, Bench, Row, burst_s, interleaved, ms

PLAIN: Final = ("-c", "print(1)")
TORCH: Final = ("-c", "import torch; print(torch.ones(3).sum().item())")
TORCH_IMAGE: Final = "bench-torch"
TORCH_VERSION: Final = "2.13.0"
IDLE: Final = "import time; print(1, flush=True); time.sleep(1000)"
WARM_UP_S: Final = 2.0


def session_warm(bench: Bench) -> Iterator[Row]:
    """Plain Python: create → first output, warm beside cold (named by its path)."""
    bench.first_output_s("python3", *PLAIN)
    time.sleep(WARM_UP_S)
    warm, cold = interleaved(
        ROUNDS,
        lambda: bench.first_output_s("python3", *PLAIN),
        lambda: bench.first_output_s("/usr/bin/python3", *PLAIN),
    )
    note = f"p90 {sorted(warm)[int(len(warm) * 0.9)] * 1000:.1f} ms, {ROUNDS} rounds"
    yield Row(name="session_warm", value=ms(warm), unit="ms", goal="≤ 20", reference="cold",
              reference_value=ms(cold), note=note)  # fmt: skip


def session_warm_torch(bench: Bench) -> Iterator[Row]:
    """The same with PyTorch imported and used; its image is built first.

    With NumPy: without, PyTorch warns while it is imported, and a warning would be lost.
    """
    known = {image.name for image in bench.client.list_images()}
    if TORCH_IMAGE not in known:
        requirement = f"torch=={TORCH_VERSION}"
        begin = time.perf_counter()
        subprocess.run(
            bench.command(
                *("image", "build", TORCH_IMAGE, "--pip", requirement, "--pip", "numpy"),
                *("--warm", "torch", "--warm", "numpy"),
            ),
            check=True, stdin=subprocess.DEVNULL, capture_output=True, cwd=bench.folder,
            env=bench.platform.environment,
        )  # fmt: skip
        print(f"# torch image built in {time.perf_counter() - begin:.0f} s", flush=True)
    size = {"image": TORCH_IMAGE, "mem": "1g"}
    bench.first_output_s("python", *TORCH, **size)
    time.sleep(WARM_UP_S + 5)
    cold = [bench.first_output_s("/env/bin/python", *TORCH, **size) for _ in range(5)][1:]
    (warm,) = interleaved(ROUNDS, lambda: bench.first_output_s("python", *TORCH, **size))
    note = f"p90 {sorted(warm)[int(len(warm) * 0.9)] * 1000:.1f} ms, {ROUNDS} rounds"
    yield Row(name="session_warm_torch", value=ms(warm), unit="ms", goal="≤ 40", reference="cold",
              reference_value=ms(cold), note=note)  # fmt: skip
    yield Row(name="torch_ratio", value=ms(cold) / ms(warm), unit="×", goal="≥ 20")


def burst_warm(bench: Bench, count: int) -> Iterator[Row]:
    """Python sessions created at once: the last one's first output."""
    bench.first_output_s("python3", *PLAIN, **SMALL)
    time.sleep(WARM_UP_S)
    last = burst_s(bench, count, "python3", *PLAIN)
    yield Row(name=f"burst_warm_{count}", value=last, unit="s", goal="≤ 2")


def warm_session_memory(bench: Bench) -> Iterator[Row]:
    """What an idle forked session adds: its program, init and keeper."""
    count = 20
    bench.first_output_s("python3", *PLAIN, **SMALL)
    time.sleep(WARM_UP_S)
    launcher = bench.platform.child("launcher")
    before = machine.pss_bytes(machine.tree(launcher))
    runs = [bench.client.run(["python3", "-c", IDLE], **SMALL) for _ in range(count)]
    for run in runs:
        next(iter(run))
    time.sleep(2)
    more = machine.pss_bytes(machine.tree(launcher)) - before
    for run in runs:
        assert run.session is not None
        bench.client.stop(run.session.id, grace_s=0)
    for run in runs:
        bench.client.remove(run.wait().id)
    yield Row(name="warm_session_memory", value=more / count / 2**20, unit="MiB", goal="≤ 1.5",
              note=f"keeper, init and program, of {count} idle sessions")  # fmt: skip
