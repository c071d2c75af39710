"""Placement on the Alibaba 2023 GPU trace, the way its authors run it.

GPU machines only, no departures; tasks shuffled, then random clones until 130 % of the GPU capacity
has been asked for; each is placed once or counts as failed. One pass places them all.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.types import Ask, Policy, Room, Snapshot, Typical

ARRIVES: Final = 1.3


@dataclass(frozen=True, slots=True)
class Task:
    cpu_milli: int
    memory_mib: int
    devices: int
    milli: int
    models: frozenset[str]

    @property
    def demand(self) -> int:
        return self.devices * self.milli


def read_rooms(path: Path) -> list[Room]:
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["gpu"])]
    return [
        Room(node=row["sn"], capacity=slots, free=slots, devices=devices, model=row["model"])
        for row in rows
        for slots in [_slots(row)]
        for devices in [(1000,) * int(row["gpu"])]
    ]


def read_tasks(path: Path) -> list[Task]:
    with path.open() as file:
        return [_task(row) for row in csv.DictReader(file)]


def _slots(row: dict[str, str]) -> dict[str, int]:
    return {"cpu_milli": int(row["cpu_milli"]), "mem_bytes": int(row["memory_mib"]) << 20}


def _task(row: dict[str, str]) -> Task:
    devices = int(row["num_gpu"])
    models = frozenset((row.get("gpu_spec") or "").split("|")) - {"", "nan"}
    milli = int(row["gpu_milli"]) if devices else 1000
    return Task(int(row["cpu_milli"]), int(row["memory_mib"]), devices, milli, models)


def ask(task: Task, number: int, at: float = 0.0) -> Ask:
    return Ask(
        session=f"{number:06d}",
        name=f"task-{number}",
        priority=0,
        created_at=at,
        slots={"cpu_milli": task.cpu_milli, "mem_bytes": task.memory_mib << 20},
        devices=task.devices,
        device_milli=task.milli,
        models=task.models,
    )


def mix(tasks: list[Task]) -> tuple[Typical, ...]:
    """How often each kind of task comes; memory does not make a kind."""
    kinds = Counter((t.cpu_milli, t.devices, t.milli, t.models) for t in tasks)
    return tuple(
        Typical(cpu_milli=cpu, devices=devices, device_milli=milli, models=models, weight=count)
        for (cpu, devices, milli, models), count in kinds.items()
    )


def arrivals(tasks: list[Task], capacity: int, random: np.random.Generator) -> list[Task]:
    """All of them in random order, then clones up to 130 % of *capacity*."""
    found = [tasks[number] for number in random.permutation(len(tasks))]
    total = sum(task.demand for task in found)
    while True:
        task = tasks[random.integers(len(tasks))]
        total += task.demand
        if total > ARRIVES * capacity:
            return found
        found.append(task)


def allocation(rooms: list[Room], tasks: list[Task], policy: Policy, seed: int) -> float:
    """Percent of the GPU capacity that is in use in the end."""
    random = np.random.default_rng(seed)
    capacity = sum(sum(room.devices) for room in rooms)
    coming = arrivals(tasks, capacity, random)
    # Machines are compared by name where scores are equal: these are the seed's names.
    names = random.permutation(len(rooms))
    renamed = tuple(
        Room(
            node=f"n{name:05d}", capacity=room.capacity, free=room.free,
            devices=room.devices, model=room.model,
        )
        for name, room in zip(names, rooms, strict=True)
    )  # fmt: skip
    asks = tuple(ask(task, number) for number, task in enumerate(coming))
    found = plan(Snapshot(pending=asks, rooms=renamed), policy, 0.0)
    taken = sum(milli for place in found.places for _, milli in place.devices)
    return 100.0 * taken / capacity
