"""Sessions go only where their sandbox policy can be kept; where that is nowhere, they are refused.

Machines here are scripted: what they say that they keep is what counts for the server.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from madang.kit.codec import to_json
from madang.kit.policy import parse
from madang.manager.fleet.types import NodeRow, Slots
from madang.manager.policy.rules import kinds_in
from madang.manager.policy.types import Demands
from madang.manager.scheduling.rules import OWN, unkept
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.manager.session.service.keeping import lacks_of, needs_of
from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.policy import SESSION, SITE
from madang.wire.policy_kept import KINDS, accepted_as, first_places, kinds_of

ALL = ", ".join(KINDS)
FILES = "version = 1\n\n[[files]]\ndeny = ['/etc/shadow']\n"
NETS = "version = 1\n\n[[connect]]\ndeny = ['10.0.0.0/8']\n"
LOGGED = "version = 1\n\n[[deny]]\ncalls = ['kcmp']\nwith = 'log'\n"
NOTHING = "version = 1\n"


class Machine(ScriptedAgent):
    """*keeps*: by runtime; the first is its default."""

    def __init__(self, node: str, more: dict[str, str] | None = None, **keeps: str) -> None:
        super().__init__(node)
        self.facts["runtimes"] = ", ".join(keeps)
        self.facts |= {f"keeps.{name}": kinds for name, kinds in keeps.items()} | (more or {})


async def create(box: ManagerBox, policy: str = "", **more: Any) -> Any:
    size = {"cpu": 1, "mem_bytes": 16 << 20}
    body = {"argv": ["x"], "size": size, "policy": policy, **more}
    return await box.call("POST", "/v1/sessions", body)


async def refused(box: ManagerBox, policy: str = "", **more: Any) -> dict[str, Any]:
    """The refusal, with its details."""
    body = {"argv": ["x"], "policy": policy, **more}
    error = dict(await box.call("POST", "/v1/sessions", body, status=409))
    assert error["code"] == "policy.unkept"
    return {**error, **error["details"]}


async def apply(box: ManagerBox, text: str, target: str = "site") -> None:
    await box.call("PUT", f"/v1/policies/{target}", {"text": text})


async def waits(box: ManagerBox, name: str, code: str) -> str:
    async with asyncio.timeout(PATIENCE_S):
        found = await box.call("GET", f"/v1/sessions/{name}")
        while (found["pending"] or {}).get("code") != code:
            found = await box.call("GET", f"/v1/sessions/{name}?wait=5&version={found['version']}")
    return str(found["pending"]["text"])


# Rules


def test_kinds_of_a_layer_and_where_they_stand() -> None:
    assert kinds_of(parse(NOTHING, SITE)) == {}
    assert kinds_of(parse(FILES, SESSION)) == {
        "rules": "session line 3",
        "files": "session line 3",
    }
    assert kinds_of(parse(LOGGED + NETS.removeprefix(NOTHING), SITE)) == {
        "rules": "site line 3",
        "logs": "site line 3",
        "nets": "site line 7",
    }
    assert kinds_of(parse('version = 1\nwiden = ["perf"]\n', SITE)) == {"rules": "site line 2"}


def test_nobody_does_without_a_filter() -> None:
    assert {kind: accepted_as(kind) for kind in ("rules", "logs", "files", "nonsense")} == {
        "rules": "",
        "logs": "rules",
        "files": "files",
        "nonsense": "",
    }
    everything = first_places([dict.fromkeys(KINDS, "site line 1")], [*KINDS])
    assert everything == {"rules": "site line 1"}


def test_what_a_machine_says_that_it_keeps_is_by_runtime() -> None:
    facts = to_json({
        "runtimes": "native, crun, runsc", "keeps.native": ALL,
        "keeps.crun": "rules, logs, nets", "keeps.runsc": "rules",
    }).decode()  # fmt: skip
    assert unkept(facts, "") == unkept(facts, "native") == frozenset()
    assert unkept(facts, "crun") == {"files", "writes", "counts", "answers", "watches"}
    assert unkept(facts, "runsc") == {*KINDS, "network"} - {"rules"}
    accepting = facts.replace('"runtimes"', '"unkept":"accepted","runtimes"')
    assert unkept(accepting, "crun") == frozenset()
    assert unkept(accepting, "runsc") == {"network"}
    process = to_json({"runtimes": "process", "keeps.process": "", "unkept": "accepted"}).decode()
    assert unkept(process, "") == KINDS.keys(), "it takes no policy, whatever root accepts"
    assert unkept("{}", "") == frozenset(), "an older agent refuses by itself"


KIND_SETS = st.sets(st.sampled_from(sorted(KINDS)))


@given(site=KIND_SETS, own=KIND_SETS, node=KIND_SETS, kept=KIND_SETS, accepts=KIND_SETS)
def test_a_place_is_open_exactly_where_all_that_is_not_accepted_is_kept(
    site: set[str], own: set[str], node: set[str], kept: set[str], accepts: set[str]
) -> None:
    demands = Demands({
        "site": dict.fromkeys(site, "site line 1"), "node:n1": dict.fromkeys(node, "node line 1"),
    })  # fmt: skip
    rules = GroupRules(accepts=tuple(accepts))
    facts = to_json({"runtimes": "native", "keeps.native": ", ".join(sorted(kept))}).decode()
    none = Slots(0, 0, 0, 0)
    row = NodeRow(
        name="n1", incarnation=0, revision=0, facts=facts, seen_at=0, capacity=none, used=none
    )
    needs = needs_of(Wishes(keeps=tuple(own)), "g", "p", demands, rules) | {f":{OWN}"}

    open_here = not needs & lacks_of(row, [""], demands, rules)

    asked = {kind for kind in site | own | node if accepted_as(kind) not in accepts}
    assert open_here is (asked <= kept)


def test_a_text_that_can_not_be_read_needs_nothing() -> None:
    assert kinds_in("nonsense", SESSION) == kinds_in("", SESSION) == {}


# Where they are asked for


async def test_a_rule_that_no_machine_keeps_is_refused_with_its_place(
    either_box: ManagerBox,
) -> None:
    box = either_box
    await box.add_agent(Machine("n1", native="rules, logs"))

    error = await refused(box, FILES)
    assert error["detail"] == (
        "policy: session line 3 can't be kept: no machine of group default keeps rules about "
        "files. Take the rule out, or choose another runtime or group; an administrator may set "
        'accept_unenforced = ["files"] for the group.'
    )
    assert (error["place"], error["kind"]) == ("session line 3", "files")
    assert (await create(box, LOGGED))["status"] == "PENDING"


async def test_a_layer_of_the_administrator_counts_too_and_at_once(box: ManagerBox) -> None:
    agent = await box.add_agent(Machine("n1", native="rules"))
    for target, text, kind in (("site", NETS, "nets"), ("group:default", FILES, "files")):
        await apply(box, text, target)
        error = await refused(box)
        assert (error["place"], error["kind"]) == (f"{target[:5].rstrip(':')} line 3", kind)
        await apply(box, NOTHING, target)
    await apply(box, LOGGED, "node:n1")
    assert (await refused(box))["place"] == "node line 3"
    await apply(box, NOTHING, "node:n1")
    await agent.assigned((await create(box))["id"])


async def test_a_group_may_do_without(box: ManagerBox) -> None:
    agent = await box.add_agent(Machine("n1", native="rules"))
    headers = {"If-Match": '"1"'}
    text = 'accept_unenforced = ["files", "rules"]'
    await box.call("PUT", "/v1/groups/default", {"text": text}, headers=headers)

    for policy in (FILES, LOGGED):
        await agent.assigned((await create(box, policy))["id"])
    assert (await refused(box, NETS))["kind"] == "nets"


async def test_a_runtime_may_keep_less_than_the_machine(box: ManagerBox) -> None:
    await box.add_agent(Machine("n1", native=ALL, crun="rules, logs, nets", runsc="rules"))

    for runtime, policy in (("crun", FILES), ("runsc", NETS), ("runsc", LOGGED)):
        error = await refused(box, policy, runtime=runtime)
        assert f"can't be kept by runtime {runtime}: no machine" in error["detail"]
    body = {"argv": ["x"], "runtime": "runsc", "network": {"mode": "full"}}
    error = await box.call("POST", "/v1/sessions", body, status=403)
    assert error["code"] == "network.refused"
    assert "a network by runtime runsc. Choose another runtime" in error["detail"]
    assert (await create(box, NETS, runtime="crun"))["status"] == "PENDING"


async def test_a_preview_says_it_as_well(box: ManagerBox) -> None:
    await box.add_agent(Machine("n1", native="rules"))
    body = {"argv": ["x"], "policy": FILES}
    error = await box.call("POST", "/v1/sessions?dry_run=1", body, status=409)
    assert error["code"] == "policy.unkept"


async def test_no_machine_keeps_all_though_each_kind_is_kept_somewhere(box: ManagerBox) -> None:
    await box.add_agent(Machine("n1", native="rules, files"))
    await box.add_agent(Machine("n2", native="rules, nets"))

    error = await refused(box, FILES + NETS.removeprefix(NOTHING))
    assert "no machine of group default keeps all its rules" in error["detail"]


async def test_a_group_without_machines_may_get_some(box: ManagerBox) -> None:
    session = await create(box, FILES)
    assert await waits(box, session["id"], "node.none")
    agent = await box.add_agent(Machine("n1", native=ALL))
    await agent.assigned(session["id"])


# Where they go


async def test_it_goes_where_it_is_kept_and_waits_there(box: ManagerBox) -> None:
    strong = Machine("n2", native=ALL)
    await box.add_agent(Machine("n1", native="rules"))
    await box.add_agent(strong)

    for name in ("one", "two", "three", "four"):
        await strong.assigned((await create(box, FILES, name=name))["id"])
    text = await waits(box, (await create(box, FILES, name="five"))["id"], "capacity.cpu")
    assert text.startswith("waits for cpu: asks 1, 0 of 4 free on n2; ")
    assert text.endswith(" n1 has room, but does not keep rules about files.")
    why = await box.call("GET", "/v1/sessions/five/why")
    assert why["pending"]["text"] == text


async def test_a_session_that_waits_meets_a_policy_that_no_machine_keeps(box: ManagerBox) -> None:
    session = await create(box, name="early")
    await waits(box, session["id"], "node.none")
    await apply(box, NETS)
    agent = await box.add_agent(Machine("n1", native="rules"))

    text = await waits(box, session["id"], "constraint.none")
    assert text == "no machine that is large enough keeps rules about addresses."
    await apply(box, NOTHING)
    await agent.assigned(session["id"])


async def test_a_machine_whose_own_layer_is_not_kept_gets_nothing(box: ManagerBox) -> None:
    weak, other = Machine("n1", native="rules", crun="rules, nets"), Machine("n2", native=ALL)
    await box.add_agent(weak)
    await box.add_agent(other)
    await apply(box, NETS, "node:n1")

    for name in ("one", "two", "three", "four"):
        await other.assigned((await create(box, name=name))["id"])
    text = await waits(box, (await create(box, name="five"))["id"], "capacity.cpu")
    assert text.endswith(" n1 has room, but does not keep its own sandbox policy.")
    await weak.assigned((await create(box, runtime="crun"))["id"])


async def test_an_own_layer_that_became_stricter_counts_for_the_place(box: ManagerBox) -> None:
    session = await create(box, name="mine")
    await waits(box, session["id"], "node.none")
    await box.call("PUT", f"/v1/sessions/{session['id']}/policy", {"text": FILES})
    await box.add_agent(Machine("n1", native="rules"))

    assert "rules about files" in await waits(box, session["id"], "constraint.none")
