"""Rows about the planner: public traces of clusters, and how long one pass takes.

The traces are not part of the repository. ``MADANG_BENCH_TRACES`` names a folder with

- ``openb_node_list_gpu_node.csv`` and ``openb_pod_list_{default,gpushare40,multigpu20,gpuspec10,
  cpu100}.csv``: GitHub ``alibaba/clusterdata``, folder ``cluster-trace-gpu-v2023/csv``;
- ``philly_a.csv``: the jobs of Microsoft Philly submitted until 2017-10-23, in the form of GitHub
  ``siasosp23/artifacts``, ``sia-simulator/traces/philly.csv``; columns ``t`` (seconds from the
  first), ``duration`` (s), ``num_gpus``, ``vc``, sorted by ``t``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

import openb
import philly
from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.types import Ask, Policy, Room, Snapshot
from rows import Row

FOLDER: Final = "MADANG_BENCH_TRACES"
PUBLISHED: Final = {
    "default": 95.39,
    "gpushare40": 94.15,
    "multigpu20": 95.65,
    "gpuspec10": 94.95,
    "cpu100": 95.35,
}
"""GPU allocation of FGD by its authors: mean of 10 seeds at 130 % of arrivals."""
SEEDS: Final = range(42, 52)
FIFO_H: Final = 12.46
FIFO_MEDIAN_H: Final = 5.62
"""Reference run on Philly: FIFO with EASY backfill, mean and median completion time."""
PENDING: Final = 10_000
SHAPES: Final = 151
OWNERS: Final = 200
ROUNDS: Final = 5
KINDS: Final = ((0, 1000), (1, 1000), (1, 500), (1, 250), (2, 1000), (8, 1000))
"""Devices and thousandths of each."""
COMMON: Final = (0.13, 0.45, 0.2, 0.14, 0.05, 0.03)


class TracesMissing(RuntimeError):
    """The folder is not named, or lacks a file."""


def available() -> bool:
    return FOLDER in os.environ


def trace(name: str) -> Path:
    """Raises TracesMissing."""
    if not available():
        raise TracesMissing(f"set {FOLDER} to a folder with the traces; {__file__} says which")
    path = Path(os.environ[FOLDER]) / name
    if not path.is_file():
        raise TracesMissing(f"{path} is missing; {__file__} says where it comes from")
    return path


def fgd(mix: str) -> Iterator[Row]:
    """GPU allocation on one openb mix, mean of 10 seeds."""
    rooms = openb.read_rooms(trace("openb_node_list_gpu_node.csv"))
    tasks = openb.read_tasks(trace(f"openb_pod_list_{mix}.csv"))
    policy = Policy(
        placement="fragments", typical=openb.mix(tasks), reserve_after_s=1e18, order="fifo"
    )
    found = [openb.allocation(rooms, tasks, policy, seed) for seed in SEEDS]
    note = f"{len(found)} seeds, {min(found):.2f} to {max(found):.2f}"
    yield Row(
        name=f"trace_fgd_{mix}", value=statistics.mean(found), unit="%",
        goal=f"≥ {PUBLISHED[mix]}", reference="published FGD", reference_value=PUBLISHED[mix],
        note=note,
    )  # fmt: skip


def philly_rows(order: str) -> Iterator[Row]:
    """Completion times and what was foretold, on 80 machines of 8 GPUs."""
    jobs = philly.read_jobs(trace("philly_a.csv"))
    policy = Policy(order=order, reserve_after_s=0.0, reserve_at_most=1)
    found = philly.replay(jobs, policy)
    mean, median = philly.mean_and_median(found)
    name = f"trace_philly_{order}"
    note = f"{len(found.completions_h)} jobs, {found.passes} passes"
    yield Row(
        name=f"{name}_mean", value=mean, unit="h", goal=f"≤ {FIFO_H}",
        reference="FIFO, EASY", reference_value=FIFO_H, note=note,
    )  # fmt: skip
    yield Row(
        name=f"{name}_median", value=median, unit="h", goal=f"≤ {FIFO_MEDIAN_H}",
        reference="FIFO, EASY", reference_value=FIFO_MEDIAN_H,
    )  # fmt: skip
    yield Row(
        name=f"{name}_use", value=100 * found.utilisation, unit="%",
        note="of all GPUs until the last job came",
    )  # fmt: skip
    yield Row(
        name=f"{name}_p90", value=100 * found.forecaster.coverage, unit="%", goal="85–95",
        note=f"started before p90; {found.forecaster.told} forecasts",
    )  # fmt: skip
    yield Row(
        name=f"{name}_offers", value=100 * found.held_true / max(1, found.offered), unit="%",
        goal="≥ 99", note=f"of {found.offered} offers, taken up at the next pass",
    )  # fmt: skip


def made_up(machines: int, random: np.random.Generator) -> tuple[tuple[Room, ...], list[Ask]]:
    """A cluster that is 60 % full, and 10,000 asks of 151 shapes by 200 owners.

    Sizes as on openb: machines of 2, 4 and 8 devices, one task in eight without a device, most of
    the others with one or a part of one.
    """
    rooms = []
    for number in range(machines):
        count = int(random.choice((2, 4, 8), p=(0.4, 0.1, 0.5)))
        devices = tuple(
            int(random.choice((0, 500, 800))) if random.random() < 0.6 else 1000
            for _ in range(count)
        )
        used = sum(milli < 1000 for milli in devices) / count
        capacity = {"cpu_milli": 16_000 * count, "mem_bytes": count << 36}
        free = {
            "cpu_milli": int(capacity["cpu_milli"] * (1 - 0.7 * used)),
            "mem_bytes": int(capacity["mem_bytes"] * (1 - 0.6 * used)),
        }
        rooms.append(
            Room(node=f"n{number:05d}", capacity=capacity, free=free, devices=devices)
        )  # fmt: skip
    shapes = []
    for _ in range(SHAPES):
        asked, milli = KINDS[int(random.choice(len(KINDS), p=COMMON))]
        slots = {
            "cpu_milli": int(random.integers(1, 16)) * 1000 * max(1, asked),
            "mem_bytes": int(random.integers(1, 64)) * max(1, asked) << 30,
        }
        shapes.append((slots, asked, milli))
    often = 1.0 / np.arange(1, SHAPES + 1)
    asks = []
    for number, shape in enumerate(random.choice(SHAPES, PENDING, p=often / often.sum()).tolist()):
        slots, asked, milli = shapes[shape]
        asks.append(
            Ask(
                session=f"{number:06d}", name=f"s{number}", priority=0,
                created_at=float(number), owner=f"u{number * 7919 % OWNERS}",
                slots=slots, devices=asked, device_milli=milli,
            )
        )  # fmt: skip
    return tuple(rooms), asks


def million_steps_ms() -> float:
    """What this machine, at this moment, takes for plain Python."""
    began, found = time.process_time(), 0.0
    for number in range(1_000_000):
        found += number * 2.0
    return 1000 * (time.process_time() - began)


def plan_pass(machines: int) -> Iterator[Row]:
    """One pass over 10,000 pending, by fair share and packed; CPU time, median of a few."""
    rooms, asks = made_up(machines, np.random.default_rng(7))
    snapshot = Snapshot(pending=tuple(asks), rooms=rooms)
    policy = Policy(order="fair", placement="pack")
    spent: list[float] = []
    steps: list[float] = []
    placed = 0
    for _ in range(ROUNDS):
        steps.append(million_steps_ms())
        began = time.process_time()
        found = plan(snapshot, policy, float(PENDING))
        spent.append(1000 * (time.process_time() - began))
        placed = len(found.places)
    goal = "≤ 250" if machines <= 2000 else "≤ 5000"
    note = f"CPU time; {PENDING} pending, {placed} of them placed; least {min(spent):.0f}"
    yield Row(
        name=f"plan_pass_{machines}",
        value=statistics.median(spent),
        unit="ms",
        goal=goal,
        reference="a million steps of a loop",
        reference_value=statistics.median(steps),
        note=note,
    )
    again = replace(policy, placement="fragments")
    if machines <= 2000:
        began = time.process_time()
        plan(snapshot, again, float(PENDING))
        took = 1000 * (time.process_time() - began)
        yield Row(name=f"plan_pass_{machines}_fragments", value=took, unit="ms", note="once")
