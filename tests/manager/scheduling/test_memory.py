"""What ended sessions teach."""

from __future__ import annotations

import pytest

from madang.kit.codec import to_json
from madang.manager.db import Database, micros
from madang.manager.scheduling import store
from madang.manager.scheduling.service import Groups, Memory
from madang.manager.scheduling.types import GroupRules, Policy, Room, Run, Told, Wishes

HALF: float = 1000.0
RULES = {"default": GroupRules(policy=Policy(order="fair", half_life_s=HALF))}
GROUPS = Groups(RULES, {"p1": "lab"}, {})
ROOMS = (
    Room(node="n", group="default", capacity={"cpu_milli": 4000}, free={"cpu_milli": 4000}),
)  # fmt: skip


def run(name: str, ended: float, seconds: float, **more: object) -> Run:
    values = {
        "session_id": name, "name": name, "group_name": "default", "node": "n", "owner": "ann",
        "project_id": "p1", "program": "x", "priority": 0, "cpu_milli": 2000, "mem_bytes": 0,
        "disk_bytes": 0, "pids": 0, "time_us": None, "told": "", "created_at": 0,
        "wishes": to_json(Wishes(kind="train.py")).decode(),
        "scheduled_at": micros(ended - seconds), "ended_at": micros(ended), "result": "success",
        "reason": "exit",
    }  # fmt: skip
    return Run(**(values | more))  # type: ignore[arg-type]


async def taught(database: Database, groups: Groups, *runs: Run) -> Memory:
    memory = Memory()
    async with database.begin() as tx:
        for one in runs:
            await store.add_run(tx, one)
        await memory.catch_up(tx, groups)
    return memory


async def test_the_past_is_half_forgotten_after_a_half_life(database: Database) -> None:
    memory = await taught(
        database, GROUPS, run("a", 5000.0, 100.0), run("b", 4000.0, 100.0, owner="bob")
    )
    used = memory.used(RULES, ROOMS, (), 5000.0)
    assert used["user:ann"] == pytest.approx(50.0, rel=0.01)
    assert used["user:bob"] == pytest.approx(25.0, rel=0.01)
    later = memory.used(RULES, ROOMS, (), 5000.0 + HALF)
    assert later["user:ann"] == pytest.approx(25.0, rel=0.01)
    assert memory.used({"default": GroupRules()}, ROOMS, (), 5000.0) == {}, "nobody looks at it"


async def test_projects_share_where_the_group_says_so(database: Database) -> None:
    rules = {"default": GroupRules(policy=Policy(order="fair"), share_by="project")}
    groups = Groups(rules, {"p1": "lab"}, {})
    memory = await taught(database, groups, run("a", 50.0, 10.0), run("b", 50.0, 10.0, owner="bob"))
    assert memory.used(rules, ROOMS, (), 50.0) == {"project:lab": pytest.approx(10.0, rel=0.01)}


async def test_what_was_told_is_compared_once(database: Database) -> None:
    told = to_json(Told(at=0.0, p50_s=30.0, p90_s=60.0, base_s=30.0, kind="k")).decode()
    never = run("never", 400.0, 0.0, scheduled_at=None, told=told)
    memory = await taught(
        database, GROUPS, run("soon", 150.0, 100.0, told=told),
        run("late", 300.0, 100.0, told=told), never,
    )  # fmt: skip
    known = memory.forecaster("default")
    assert (known.told, known.coverage, known.median_error_s) == (2, 0.5, 20.0)
    async with database.begin() as tx:
        memory.started("live", "default", Told(at=0.0, p50_s=1, p90_s=9, base_s=1, kind="k"), 5.0)
        await store.add_run(tx, run("live", 900.0, 895.0, told=told))
        await memory.catch_up(tx, GROUPS)
    assert known.told == 3, "its start was seen already"


async def test_run_times_are_known_by_program(database: Database) -> None:
    memory = await taught(database, GROUPS, *[run(f"s{n}", 100.0, 7.0) for n in range(3)])
    times = memory.run_times("default")
    assert times.quantile("user:ann", 0.5, 1.0, "train.py") == pytest.approx(7.0)
