"""Live rules on their way to the runtime: told until it has them, by whoever is there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from madang.agent import streams
from madang.agent.refusals import REFUSALS, Counting, Reading, read_refusals
from madang.agent.settings import AgentSettings
from madang.agent.watch import Watch
from madang.kit.clock import SystemClock
from madang.kit.codec import to_json
from madang.testing.nodes import NodeUnderTest, node
from madang.testing.runtime import FakeMachine, FakeRuntime
from madang.testing.simulation import NoBlobs, assignment, sandbox_of
from madang.wire.errors import HostLacks, InvalidRequest, PlatformError, RuntimeFailed
from madang.wire.kernel import Assignment, KernelId
from madang.wire.link import BulkStream, StreamItem
from madang.wire.policy import NO_SANDBOX, SESSION, Act, NetRule, Refusal, Sandbox
from madang.wire.session import Reason


@dataclass
class Machine:
    """A fake machine, and what its runtime is to fail with."""

    machine: FakeMachine
    root: str
    failures: list[PlatformError] = field(default_factory=list)
    runtimes: list[FakeRuntime] = field(default_factory=list)

    def runtime(self) -> FakeRuntime:
        made = FakeRuntime(self.machine, self.root, failure=self._failure)
        self.runtimes.append(made)
        return made

    def _failure(self, operation: str, kernel: KernelId) -> PlatformError | None:
        return self.failures.pop(0) if operation == "guard" and self.failures else None

    def guards(self) -> int:
        return sum(call == "guard" for made in self.runtimes for call, _ in made.calls)


@pytest.fixture
def on(tmp_path: Path) -> Machine:
    return Machine(FakeMachine(SystemClock()), str(tmp_path))


@pytest.fixture
async def it(on: Machine, tmp_path: Path) -> AsyncIterator[NodeUnderTest]:
    settings = AgentSettings(
        node="n1", state_dir=str(tmp_path), disk_reserve_bytes=0, heartbeat_s=0.5
    )
    keepers = FakeRuntime(on.machine, on.root)
    async with node(on.runtime, settings, NoBlobs(), keepers=keepers) as found:
        yield found
    await on.machine.tasks.close()


def with_rules(wanted: Assignment, sandbox: Sandbox) -> Assignment:
    spec = replace(wanted.spec, sandbox=sandbox)
    return replace(wanted, spec=spec, live=sandbox.label)


async def has(it: NodeUnderTest, wanted: Assignment) -> None:
    """The kernel's newest report is about these rules."""
    await it.until(lambda: it.reports[wanted.kernel].guarded.live == wanted.live)


async def test_a_running_kernel_gets_new_rules_and_says_which(
    it: NodeUnderTest, on: Machine
) -> None:
    wanted = assignment("a")
    await it.want(wanted)
    await it.running(wanted.kernel)
    assert on.guards() == 0, "there was nothing to tell"

    changed = with_rules(wanted, sandbox_of(1))
    await it.want(changed)
    await has(it, changed)
    assert on.machine.kernels[wanted.kernel].sandbox == sandbox_of(1)
    assert it.reports[wanted.kernel].guarded.label == "site 1"

    await it.want(replace(changed, live="", spec=wanted.spec))
    await has(it, wanted)
    assert on.machine.kernels[wanted.kernel].sandbox == NO_SANDBOX
    assert on.guards() == 2


async def test_it_is_not_told_what_it_began_with(it: NodeUnderTest, on: Machine) -> None:
    wanted = with_rules(assignment("a"), sandbox_of(1))
    await it.want(wanted)
    await it.running(wanted.kernel)
    await has(it, wanted)
    await it.restart()
    await it.want(replace(wanted, stop_text="another word"))
    await it.running(wanted.kernel)
    assert on.guards() == 0


async def test_a_change_while_the_agent_is_away_is_made_by_the_next(
    it: NodeUnderTest, on: Machine
) -> None:
    wanted = assignment("a")
    await it.want(wanted)
    await it.running(wanted.kernel)
    await it.stop()
    changed = with_rules(wanted, sandbox_of(2))
    it.wanted[wanted.kernel] = changed
    await it.start()
    await has(it, changed)
    assert on.machine.kernels[wanted.kernel].sandbox == sandbox_of(2)


async def test_what_a_machine_lacks_is_told_once_and_the_former_rules_stay(
    it: NodeUnderTest, on: Machine
) -> None:
    wanted = with_rules(assignment("a"), sandbox_of(1))
    await it.want(wanted)
    await it.running(wanted.kernel)
    on.failures = [HostLacks("no cgroup v2 here")]
    changed = with_rules(wanted, sandbox_of(2))
    await it.want(changed)
    await has(it, changed)
    guarded = it.reports[wanted.kernel].guarded
    assert (guarded.error, guarded.label) == ("no cgroup v2 here", "")
    assert on.machine.kernels[wanted.kernel].sandbox == sandbox_of(1)
    assert on.guards() == 1


async def test_a_failure_that_may_pass_is_tried_again(it: NodeUnderTest, on: Machine) -> None:
    wanted = assignment("a")
    await it.want(wanted)
    await it.running(wanted.kernel)
    on.failures = [RuntimeFailed("no process to be had"), RuntimeFailed("again")]
    changed = with_rules(wanted, sandbox_of(1))
    await it.want(changed)
    await has(it, changed)
    assert it.reports[wanted.kernel].guarded.error == ""
    on.failures = [RuntimeFailed("for good")] * 3
    last = with_rules(wanted, sandbox_of(3))
    await it.want(last)
    await has(it, last)
    assert it.reports[wanted.kernel].guarded.error == "for good"


async def test_who_adds_so_many_rules_that_no_more_fit_is_ended(
    it: NodeUnderTest, on: Machine
) -> None:
    own = NetRule(layer=SESSION, line=2, act=Act.CONNECT, targets=("10.0.0.0/8",))
    wanted = with_rules(assignment("a"), Sandbox(nets=(own,), label="session"))
    await it.want(wanted)
    await it.running(wanted.kernel)
    on.failures = [InvalidRequest("sandbox: has more than 256 rules.")]
    site = replace(own, layer="site")
    await it.want(with_rules(wanted, Sandbox(nets=(site, own), label="site 1, session")))
    ended = await it.ended(wanted.kernel)
    assert ended.reason is Reason.GUARD
    assert "more than 256 rules" in ended.text


async def test_an_administrator_s_rules_that_can_t_be_taken_end_nobody(
    it: NodeUnderTest, on: Machine
) -> None:
    wanted = assignment("a")
    await it.want(wanted)
    await it.running(wanted.kernel)
    on.failures = [InvalidRequest("sandbox: has more than 256 rules.")]
    changed = with_rules(wanted, sandbox_of(1))
    await it.want(changed)
    await has(it, changed)
    assert "more than 256" in it.reports[wanted.kernel].guarded.error


async def test_rules_whose_meaning_has_changed_are_given_again(
    it: NodeUnderTest, on: Machine
) -> None:
    wanted = with_rules(assignment("a"), sandbox_of(1))
    await it.want(wanted)
    await it.running(wanted.kernel)
    it.agent.kernels[wanted.kernel].renew_rules()
    await it.until(lambda: on.guards() == 1)


# --- refusals


def refusal(thing: str, count: int = 1, line: int = 3) -> Refusal:
    return Refusal(at=1.0, layer="site", line=line, what="open", object=thing, count=count)


def test_the_newest_number_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    lines = [refusal("/a"), refusal("/b", line=4), refusal("/a", count=7)]
    text = b"".join(to_json(each) + b"\n" for each in lines)
    torn = b"not json\n" + json.dumps({"at": "x"}).encode() + b"\n" + to_json(refusal("/c"))
    (tmp_path / REFUSALS).write_bytes(text + torn)

    found = read_refusals(str(tmp_path))

    assert [(each.object, each.count) for each in found] == [("/a", 7), ("/b", 1)]
    assert Counting(str(tmp_path)).now() == {"site line 3": 7, "site line 4": 1}


def test_a_file_that_grows_or_is_written_anew_is_followed(tmp_path: Path) -> None:
    path = tmp_path / REFUSALS
    reading, counting = Reading(str(tmp_path)), Counting(str(tmp_path))
    for written, news, total in (
        ([refusal("/a")], ["/a"], 1),
        ([refusal("/a"), refusal("/a", count=4)], ["/a"], 4),
    ):
        path.write_bytes(b"".join(to_json(each) + b"\n" for each in written))
        assert [each.object for each in reading.news()] == news
        assert counting.now() == {"site line 3": total}
    assert reading.news() == []
    new = tmp_path / "new"
    new.write_bytes(b"".join(to_json(refusal(f"/{n}")) + b"\n" for n in range(5)))
    new.rename(path)
    assert len(reading.news()) == 5
    assert counting.now() == {"site line 3": 9}


def test_where_nothing_was_refused_there_is_no_file(tmp_path: Path) -> None:
    assert read_refusals(str(tmp_path)) == []


# --- streams


class Told:
    """The other end of a stream that only listens."""

    def __init__(self) -> None:
        self.items: list[StreamItem] = []

    async def send(self, item: StreamItem) -> None:
        self.items.append(item)

    @property
    def things(self) -> list[str]:
        return [item.object for item in self.items if isinstance(item, Refusal)]


async def test_a_stream_tells_each_refusal_once_and_nothing_that_was_only_logged(
    tmp_path: Path,
) -> None:
    watch = Watch(str(tmp_path), FakeRuntime(FakeMachine(SystemClock()), ""), SystemClock())
    told, refusals = Told(), streams._Refusals(str(tmp_path), watch)

    async def write(*found: Refusal) -> None:
        with open(tmp_path / REFUSALS, "ab") as file:
            file.writelines(to_json(each) + b"\n" for each in found)
        watch.refusals += 1
        assert refusals.due
        await refusals.tell(cast(BulkStream, told))
        assert not refusals.due

    await refusals.tell(cast(BulkStream, told))
    assert told.things == []
    await write(refusal("/a"), replace(refusal("/quiet"), answer="log"))
    await write(refusal("/a", count=2), refusal("/b"), refusal("/a", line=9))
    assert told.things == ["/a", "/b", "/a"]
