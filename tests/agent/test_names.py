"""Names in rules about addresses: asked for when they are new, then kept fresh."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from madang.agent import names
from madang.agent.names import KEPT_S, REFRESH_S, Names, addresses_in
from madang.testing.clock import FakeClock
from madang.testing.patience import PATIENCE_S
from madang.testing.simulation import SPEC, assignment
from madang.wire.kernel import Assignment, KernelSpec
from madang.wire.policy import MAX_ADDRESSES, Act, NetRule, Sandbox


@dataclass
class Resolver:
    answers: dict[str, list[str]]
    asked: Counter[str] = field(default_factory=Counter)

    async def __call__(self, name: str) -> list[str]:
        self.asked[name] += 1
        return self.answers.get(name, [])


@dataclass(eq=False)
class Kernel:
    assignment: Assignment | None
    running: bool = True
    renewed: int = 0

    def renew_rules(self) -> None:
        self.renewed += 1


def spec(*targets: str) -> KernelSpec:
    rule = NetRule(layer="site", line=1, act=Act.CONNECT, targets=targets)
    return replace(SPEC, sandbox=Sandbox(nets=(rule,)))


def kernel(*targets: str) -> Kernel:
    return Kernel(replace(assignment("s"), spec=spec(*targets)))


def stands_for(found: KernelSpec) -> dict[str, tuple[str, ...]]:
    return {each.name: each.addresses for each in found.sandbox.names}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def resolver() -> Resolver:
    return Resolver({"a.test": ["192.0.2.2", "192.0.2.1"], "b.test": ["fd00::1"]})


@pytest.fixture
def kernels() -> list[Kernel]:
    return []


@pytest.fixture
def found(clock: FakeClock, resolver: Resolver, kernels: list[Kernel]) -> Names:
    return Names(clock, lambda: kernels, resolver)


async def test_each_name_gets_its_addresses_and_is_asked_for_once(
    found: Names, resolver: Resolver
) -> None:
    first = await found.filled(spec("A.test.:443", "10.0.0.0/8", "a.test:80"))
    again = await found.filled(spec("a.test", "b.test"))

    assert stands_for(first) == {"a.test": ("192.0.2.1", "192.0.2.2")}
    assert stands_for(again) == {"a.test": ("192.0.2.1", "192.0.2.2"), "b.test": ("fd00::1",)}
    assert resolver.asked == {"a.test": 1, "b.test": 1}


async def test_rules_without_names_ask_nobody(found: Names, resolver: Resolver) -> None:
    plain = spec("10.0.0.0/8", "*:25")

    assert await found.filled(plain) is plain
    assert not resolver.asked


async def test_a_changed_answer_renews_the_rules_of_who_uses_it(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    one, other = kernel("a.test"), kernel("b.test")
    kernels += [one, other]
    for each in kernels:
        assert each.assignment is not None
        await found.filled(each.assignment.spec)
    await found.tick(clock.now())
    assert (one.renewed, other.renewed) == (0, 0)

    resolver.answers["a.test"] = ["192.0.2.3"]
    await found.tick(clock.now())

    assert (one.renewed, other.renewed) == (1, 0)
    assert "192.0.2.3" in stands_for(await found.filled(spec("a.test")))["a.test"]


async def test_an_address_counts_for_a_while_after_it_was_answered(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    kernels.append(kernel("a.test"))
    await found.filled(spec("a.test"))
    resolver.answers["a.test"] = []
    await clock.advance(seconds=KEPT_S)
    await found.tick(clock.now())
    assert stands_for(await found.filled(spec("a.test")))["a.test"] == ("192.0.2.1", "192.0.2.2")

    await clock.advance(seconds=1)
    await found.tick(clock.now())

    assert stands_for(await found.filled(spec("a.test"))) == {"a.test": ()}
    assert kernels[0].renewed == 1


async def test_who_has_ended_is_neither_asked_for_nor_told(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    ended = kernel("a.test")
    ended.running = False
    kernels.append(ended)
    await found.filled(spec("a.test"))
    resolver.asked.clear()
    resolver.answers["a.test"] = ["192.0.2.9"]

    await found.tick(clock.now())

    assert not resolver.asked
    assert ended.renewed == 0
    assert stands_for(await found.filled(spec("a.test"))) == {"a.test": ("192.0.2.9",)}


async def test_a_name_that_nobody_knows_is_said_once(
    found: Names, kernels: list[Kernel], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.append(kernel("nowhere.test"))
    with caplog.at_level(logging.WARNING):
        assert stands_for(await found.filled(spec("nowhere.test"))) == {"nowhere.test": ()}
        await found.tick(clock.now())

    assert [record.getMessage() for record in caplog.records] == ["name not resolved"]


async def test_a_flood_of_addresses_is_cut_to_the_latest(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    kernels.append(kernel("a.test"))
    for turn in range(4):
        resolver.answers["a.test"] = [f"192.0.{turn}.{n}" for n in range(MAX_ADDRESSES // 2)]
        await found.tick(clock.now())
        await clock.advance(seconds=1)

    now = stands_for(await found.filled(spec("a.test")))["a.test"]
    assert len(now) == MAX_ADDRESSES
    assert {address.split(".")[2] for address in now} == {"2", "3"}


async def test_one_round_asks_for_some_those_asked_longest_ago_first(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    every = [f"n{number}.test" for number in range(100)]
    kernels.append(kernel(*every))
    await found.tick(clock.now())
    assert resolver.asked.total() == 64
    await found.tick(clock.now())

    assert set(resolver.asked) == set(every)
    assert max(resolver.asked.values()) == 2


async def test_it_looks_again_by_itself(
    found: Names, resolver: Resolver, kernels: list[Kernel], clock: FakeClock
) -> None:
    kernels.append(kernel("a.test"))
    found.start()
    await clock.advance(seconds=REFRESH_S * 2.5)
    await found.stop()

    assert resolver.asked["a.test"] == 3


def test_what_the_resolver_prints_is_read() -> None:
    text = (
        "192.0.2.1       STREAM a.test\n192.0.2.1       DGRAM  \nfe80::1%eth0    STREAM \n"
        "::ffff:192.0.2.9 RAW\nnonsense here\n\n"
    )

    assert addresses_in(text) == ["192.0.2.1", "fe80::1", "::ffff:c000:209"]


async def test_the_machine_knows_itself() -> None:
    assert "127.0.0.1" in await names.ask_the_machine("localhost")
    assert await names.ask_the_machine("nowhere.invalid") == []


async def test_a_resolver_that_does_not_answer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "getent"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(names, "_PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(names, "_PATIENCE_S", 0.1)

    async with asyncio.timeout(PATIENCE_S):
        assert await names.ask_the_machine("a.test") == []
