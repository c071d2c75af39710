"""The ledger follows the sessions, whatever happens to machines and servers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.session.types import SessionSettings
from madang.manager.usage.types import UsageRow
from madang.testing.books import check_ledger, ledger_rows
from madang.testing.clock import FakeClock
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.wire.kernel import Assignment, KernelReport, KernelState
from madang.wire.network import NetworkUse
from madang.wire.session import Ended, Reason

LOST_S: Final = 300.0
SETTINGS: Final = SessionSettings(node_lost_after_s=LOST_S, retention_s=3600, retention_count=100)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def timed(sqlite_url: str, clock: FakeClock) -> AsyncIterator[ManagerBox]:
    settings = ManagerSettings(database_url=sqlite_url, sessions=SETTINGS)
    async with manager_box(settings, clock) as box:
        yield box


async def assigned(box: ManagerBox, agent: ScriptedAgent, **size: Any) -> Assignment:
    session = await box.call("POST", "/v1/sessions", {"argv": ["true"], "size": size})
    return await agent.assigned(session["id"])


async def rows(box: ManagerBox) -> list[UsageRow]:
    return await ledger_rows(box.manager.database)


async def test_a_run_is_open_until_its_agent_says_how_it_ended(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent, cpu=2)
    began = clock.now()
    await agent.running(assignment, started_at=began)
    session = assignment.kernel.session
    await timed.until(session, "RUNNING")
    (row,) = await rows(timed)
    assert (row.id, row.cpu_milli, row.ended_at, row.closed_by) == (f"{session}.1", 2000, None, "")

    await agent.send()
    await clock.advance(10)
    report = await timed.call("GET", "/v1/usage?by=user,month")
    assert (report["total"]["open"], report["total"]["cpu_core_s"]) == (1, 20.0)

    network = NetworkUse(received_bytes=7, sent_bytes=9)
    ended = Ended(
        reason=Reason.EXIT, exit_code=0, duration_s=8.5, cpu_s=3.25, mem_peak_bytes=77,
        disk_used_bytes=5, network=network,
    )  # fmt: skip
    await agent.ended(assignment, ended)
    await timed.until(session, "TERMINATED")

    (row,) = await rows(timed)
    assert row.ended_at == row.started_at + 8_500_000
    assert (row.closed_by, row.cpu_us, row.mem_peak_bytes) == ("agent", 3_250_000, 77)
    assert (row.disk_used_bytes, row.received_bytes, row.sent_bytes) == (5, 7, 9)
    report = await timed.call("GET", "/v1/usage?by=session")
    assert report["total"]["cpu_core_s"] == 17.0
    assert report["total"]["cpu_used_s"] == 3.25
    assert [line["by"] for line in report["lines"]] == [{"session": row.session}]


async def test_an_end_that_is_told_twice_or_late_changes_nothing(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment, started_at=clock.now())
    await clock.advance(5)
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=4.0))
    await timed.until(assignment.kernel.session, "TERMINATED")
    before = await rows(timed)

    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=400.0))
    await agent.running(assignment, started_at=clock.now())
    await clock.advance(5)

    assert await rows(timed) == before


async def test_a_run_that_nobody_saw_begin_is_written_as_a_whole(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    began = clock.now()
    await clock.advance(3)
    ended = Ended(reason=Reason.EXIT, exit_code=0, duration_s=2.0)
    await agent.ended(assignment, ended, started_at=began)
    await timed.until(assignment.kernel.session, "TERMINATED")

    (row,) = await rows(timed)
    assert row.ended_at == row.started_at + 2_000_000


async def test_what_never_began_costs_nothing(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.ended(assignment, Ended(reason=Reason.START_FAILED, text="no"))
    await timed.until(assignment.kernel.session, "TERMINATED")
    await timed.call("POST", "/v1/sessions", {"argv": ["true"], "size": {"cpu": 4}})

    assert await rows(timed) == []


async def test_a_machine_that_fell_silent_is_charged_until_it_was_last_heard(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    began = clock.now()
    await agent.running(assignment, started_at=began)
    session = assignment.kernel.session
    await timed.until(session, "RUNNING")
    for _ in range(12):
        await agent.send()
        await clock.advance(5)
    await agent.disconnect()
    await clock.advance(LOST_S + 60)
    found = await timed.until(session, "TERMINATED")
    assert found["ended"]["reason"] == "node_lost"

    (row,) = await rows(timed)
    assert row.ended_at is not None
    assert row.closed_by == "manager"
    assert 40 <= (row.ended_at - row.started_at) / 1e6 <= 60
    await check_ledger(timed.manager.database)

    # It comes back and had ended its session in time.
    ended = Ended(reason=Reason.EXIT, exit_code=0, duration_s=123.0, cpu_s=9.0)
    agent.incarnation = 5
    report = KernelReport(
        kernel=assignment.kernel, nonce=assignment.nonce, state=KernelState.ENDED,
        started_at=began, ended=ended,
    )  # fmt: skip
    for _ in range(2):  # told twice, it counts once
        timed.connect(agent, (report,))
        await agent.until(lambda: assignment.kernel in agent.forgotten or bool(agent.messages))
        await clock.advance(1)
    first, second = await rows(timed)
    assert (second.corrects, second.closed_by) == (first.id, "agent")
    assert second.ended_at == second.started_at + 123_000_000
    assert second.cpu_us == 9_000_000
    total = (await timed.call("GET", "/v1/usage"))["total"]
    assert (total["intervals"], total["time_s"]) == (1, 123.0)


async def test_another_machine_or_a_wrong_nonce_corrects_nothing(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment, started_at=clock.now())
    await timed.until(assignment.kernel.session, "RUNNING")
    await agent.disconnect()
    await clock.advance(LOST_S + 60)
    await timed.until(assignment.kernel.session, "TERMINATED")
    before = await rows(timed)

    lie = Ended(reason=Reason.EXIT, exit_code=0, duration_s=300.0)
    other = await timed.add_agent(ScriptedAgent("n2"))
    await other.ended(assignment, lie)
    agent.incarnation = 5
    wrong = KernelReport(
        kernel=assignment.kernel, nonce="guess", state=KernelState.ENDED, ended=lie
    )
    timed.connect(agent, (wrong,))
    await clock.advance(5)

    assert await rows(timed) == before


async def test_no_run_is_believed_to_be_longer_than_there_was_time(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment, started_at=clock.now())
    await timed.until(assignment.kernel.session, "RUNNING")
    await agent.send()
    await clock.advance(10)
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=1e9))
    await timed.until(assignment.kernel.session, "TERMINATED")

    (row,) = await rows(timed)
    assert row.ended_at == row.started_at + 10_000_000


async def test_rows_outlive_their_sessions(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment, started_at=clock.now())
    await clock.advance(5)
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=5.0))
    session = assignment.kernel.session
    await timed.until(session, "TERMINATED")
    await timed.call("DELETE", f"/v1/sessions/{session}")

    assert [row.session_id for row in await rows(timed)] == [session]
    assert (await timed.call("GET", "/v1/usage"))["total"]["time_s"] == 5.0


async def test_an_administrator_corrects_by_a_new_row_and_nobody_else(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment, started_at=clock.now())
    session = assignment.kernel.session
    await timed.until(session, "RUNNING")
    path = f"/v1/usage/intervals/{session}.1/correct"
    await timed.call("POST", path, {"reason": "too early"}, status=409)
    await agent.send()
    await clock.advance(10)
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=10.0))
    await timed.until(session, "TERMINATED")
    ann = await timed.new_user("ann")

    await timed.call("POST", path, {"reason": "please"}, status=403, headers=ann)
    await timed.call("POST", path, {"reason": " "}, status=400)
    await timed.call("POST", path, {"reason": "x", "ended_at": 1e300}, status=400)
    await timed.call("POST", path, {"reason": "x", "ended_at": clock.now() + 9}, status=400)
    first = (await rows(timed))[0]
    fresh = await timed.call(
        "POST", path, {"reason": "stuck", "ended_at": first.started_at / 1e6 + 4}
    )
    assert (fresh["id"], fresh["corrects"]) == (f"{session}.1.1", f"{session}.1")
    wrong = await timed.call("POST", path, {"reason": "again"}, status=409)
    assert f"{session}.1.1" in wrong["detail"]
    assert (await timed.call("GET", "/v1/usage"))["total"]["time_s"] == 4.0
    await timed.call("POST", f"/v1/usage/intervals/{session}.1.1/correct", {"reason": "free"})

    assert (await rows(timed))[0] == first
    assert (await timed.call("GET", "/v1/usage"))["total"]["intervals"] == 0
    listed = await timed.call("GET", "/v1/usage/intervals")
    assert [each["id"] for each in listed["items"]] == [f"{session}.1.2"]
    listed = await timed.call("GET", "/v1/usage/intervals?corrected=1")
    assert len(listed["items"]) == 3
    records = (await timed.call("GET", "/v1/audit?action=usage"))["items"]
    assert [record["after"]["reason"] for record in records] == ["free", "stuck"]


async def test_everybody_sees_their_own_and_a_project_s_admin_the_project_s(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    people = {name: await timed.new_user(name) for name in ("ann", "bob", "eve")}
    for name in ("ann", "bob"):
        session = await timed.call("POST", "/v1/sessions", {"argv": ["true"]}, headers=people[name])
        assignment = await agent.assigned(session["id"])
        await agent.running(assignment, started_at=clock.now())
        await clock.advance(5)
        await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0, duration_s=5.0))
        await timed.until(session["id"], "TERMINATED")

    async def seen(name: str) -> list[str]:
        found = await timed.call("GET", "/v1/usage", headers=people[name])
        listed = await timed.call("GET", "/v1/usage/intervals", headers=people[name])
        bill = await timed.call(
            "GET", "/v1/usage/bill?project=default&month=2026-11", headers=people[name]
        )
        users = [line["by"]["user"] for line in found["lines"]]
        assert sorted({each["user"] for each in listed["items"]}) == users
        assert {line["user"] for line in bill["lines"]} <= set(users)
        return users

    assert await seen("ann") == ["ann"]
    assert await seen("eve") == []
    await make_project_admin(timed, "eve")
    assert await seen("eve") == ["ann", "bob"]


async def make_project_admin(box: ManagerBox, user: str) -> None:
    import sqlalchemy as sa

    from madang.manager.identity.tables import memberships

    async with box.manager.database.begin() as tx:
        await tx.execute(
            sa.update(memberships).where(memberships.c.user_id == sa.bindparam("b_user")),
            b_user=user,
            role="admin",
        )


@pytest.mark.parametrize("seed", range(12))
async def test_after_bad_days_the_ledger_equals_the_sessions(database_url: str, seed: int) -> None:
    """Random ends, lost machines, restarts of the server, doubled and late reports."""
    rng = random.Random(seed)
    clock = FakeClock()
    settings = ManagerSettings(database_url=database_url, sessions=SETTINGS)
    agent = ScriptedAgent()
    known: dict[str, Assignment] = {}
    for _ in range(3):  # servers, one after the other
        async with manager_box(settings, clock) as box:
            await box.add_agent(agent)
            for _ in range(rng.randrange(4, 10)):
                await misfortune(rng, box, agent, clock, known)
            await check_ledger(box.manager.database)
            await box.stop_links()


async def misfortune(
    rng: random.Random,
    box: ManagerBox,
    agent: ScriptedAgent,
    clock: FakeClock,
    known: dict[str, Assignment],
) -> None:
    match rng.randrange(7):
        case 0 | 1:
            size = {"cpu": rng.choice((0.5, 1)), "mem_bytes": rng.randrange(1, 9) << 26}
            body = {"argv": ["true"], "size": size}
            session = (await box.call("POST", "/v1/sessions", body))["id"]
            if rng.random() < 0.7 and await placed(box, clock, session):
                known[session] = await agent.assigned(session)
        case 2 if known:
            assignment = rng.choice(list(known.values()))
            await agent.running(assignment, started_at=clock.now() - rng.random())
        case 3 if known:
            assignment = rng.choice(list(known.values()))
            reason = rng.choice((Reason.EXIT, Reason.LOST, Reason.OOM, Reason.START_FAILED))
            ended = Ended(
                reason=reason, exit_code=0, duration_s=rng.choice((0.0, rng.uniform(0, 30))),
                at=rng.choice((0.0, clock.now())),
            )  # fmt: skip
            began = rng.choice((None, clock.now() - 10))
            await agent.ended(assignment, ended, started_at=began)
        case 4 if known:
            session = rng.choice(list(known))
            await box.call("POST", f"/v1/sessions/{session}/stop", {"grace_s": 0}, status=None)
        case 5:
            await box.stop_links()
            await clock.advance(rng.choice((5, LOST_S + 60)))
            await box.add_agent(agent)
        case _:
            await agent.send()
            await clock.advance(rng.uniform(0, 8))
    await clock.advance(0.01)


async def placed(box: ManagerBox, clock: FakeClock, session: str) -> bool:
    """Whether it got a machine; False once it is said to wait."""
    while True:
        found = await box.call("GET", f"/v1/sessions/{session}")
        if found["node"] or found["pending"] or found["status"] == "TERMINATED":
            return bool(found["node"])
        await clock.advance(0.05)
