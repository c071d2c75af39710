"""Layers of scaling groups and projects: whose they are, whom they concern, who sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from tests.manager.policy.test_live import apply, guard, running

from madang.manager.fleet.tables import groups
from madang.manager.identity import store as identity
from madang.manager.identity.service.authentication import digest_of
from madang.manager.identity.tables import domains, memberships, projects, users
from madang.manager.policy import rules
from madang.manager.policy.types import ProjectRow, Seat
from madang.manager.session.tables import sessions
from madang.testing.manager import ManagerBox
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Guarded
from madang.wire.policy import LAYERS, Refusal

NOTHING = "version = 1\n"
LIVE = "version = 1\n\n[[connect]]\ndeny = ['10.0.0.0/8']\nwhy = 'no databases'\n"
PEOPLE = {
    # name: role, domain, project, role in the project lab
    "head": ("user", "default", "lab", "admin"),
    "member": ("user", "default", "lab", "member"),
    "guest": ("user", "default", "default", "member"),
    "dean": ("domain_admin", "default", "default", None),
    "rector": ("domain_admin", "arts", "default", None),
    "stranger": ("user", "default", "default", None),
    "watcher": ("monitor", "default", "default", None),
}
_EVERY_SESSION = sa.update(sessions)


async def settle(box: ManagerBox) -> dict[str, dict[str, str]]:
    """Name → headers, of PEOPLE around a project ``lab``."""
    async with box.manager.database.begin() as tx:
        await tx.execute(sa.insert(domains), id="arts", name="arts", created_at=0)
        await tx.execute(
            sa.insert(projects), id="p-lab", domain_id="default", name="lab", created_at=0
        )
        await tx.execute(
            sa.insert(groups), name="gpu", text="", version=1, created_at=0, changed_at=0
        )
        for name, (role, domain, project, inside) in PEOPLE.items():
            await identity.add_user(
                tx,
                user_id=f"u-{name}",
                name=name,
                role=role,
                project_id="p-lab" if project == "lab" else project,
                created_at=0,
            )
            await tx.execute(
                sa.update(users).where(users.c.name == sa.bindparam("b_name")),
                b_name=name,
                domain_id=domain,
            )
            mine = memberships.c.user_id == sa.bindparam("b_user")
            await tx.execute(sa.delete(memberships).where(mine), b_user=f"u-{name}")
            if inside is not None:
                where = {"user_id": f"u-{name}", "project_id": "p-lab"}
                await tx.execute(sa.insert(memberships), **where, role=inside, created_at=0)
            digest = digest_of(f"mdg_{name}")
            await identity.add_token(
                tx, token_id=f"t-{name}", user_id=f"u-{name}", name="t", digest=digest, created_at=0
            )
    return {name: {"Authorization": f"Bearer mdg_{name}"} for name in PEOPLE}


@pytest.mark.parametrize(
    ("who", "sees", "changes"),
    [
        ("head", True, 200),
        ("dean", True, 200),
        ("member", True, 403),
        ("guest", True, 403),
        ("watcher", True, 403),
        ("rector", False, 404),
        ("stranger", False, 404),
    ],
)
async def test_who_is_in_a_project_sees_its_policy_and_who_administers_it_changes_it(
    either_box: ManagerBox, who: str, sees: bool, changes: int
) -> None:
    box = either_box
    headers = (await settle(box))[who]
    await box.call("PUT", "/v1/policies/project:lab", {"text": LIVE})
    draft = {"text": NOTHING, "target": "project:lab"}
    seen = 200 if sees else 404

    async def call(method: str, path: str, status: int, body: Any = None) -> Any:
        return await box.call(method, f"/v1/policies{path}", body, headers=headers, status=status)

    found = await call("GET", "/project:lab", seen)
    listed = [each["target"] for each in await call("GET", "", 200)]
    assert listed == ["base", *["project:lab"] * sees]
    await call("GET", "/project:lab/history", seen)
    await call("POST", "/review", seen, draft)
    await call("POST", "/test", seen, {"call": "ptrace", "project": "lab"})
    changed = await call("PUT", "/project:lab", changes, {"text": NOTHING})
    log = "/v1/policy-log?target=project:lab"
    await box.call("GET", log, headers=headers, status=200 if sees and who not in
                   {"member", "guest"} else 403 if sees else 404)  # fmt: skip
    await box.call("PUT", "/v1/policies/group:gpu", {"text": LIVE}, headers=headers, status=403)

    if sees:
        assert (found["target"], found["text"], found["version"]) == ("project:lab", LIVE, 1)
    else:
        nobody = await call("GET", "/project:nobody", 404)
        assert found["detail"].replace("lab", "nobody") == nobody["detail"]
    if changes == 200:
        assert (changed["target"], changed["version"]) == ("project:lab", 2)


async def test_a_project_of_another_domain_is_named_with_it(box: ManagerBox) -> None:
    await settle(box)
    async with box.manager.database.begin() as tx:
        row = {"id": "p-arts", "domain_id": "arts", "name": "lab", "created_at": 0}
        await tx.execute(sa.insert(projects), **row)
    done = await box.call("PUT", "/v1/policies/project:arts%2Flab", {"text": LIVE})

    assert done["target"] == "project:arts/lab"
    assert (await box.call("GET", "/v1/policies/project:lab"))["version"] == 0
    assert [each["target"] for each in await box.call("GET", "/v1/policies")] == [
        "base",
        "project:arts/lab",
    ]
    await box.call("GET", "/v1/policies/project:nowhere%2Flab", status=404)


async def test_layers_stand_in_their_order(either_box: ManagerBox) -> None:
    box = either_box
    agent = await box.add_agent()
    headers = (await settle(box))["member"]
    targets = ("project:lab", f"node:{agent.node}", "group:default", "site")
    for target in targets:
        await box.call("PUT", f"/v1/policies/{target}", {"text": LIVE})
    body = {"argv": ["sleep"], "name": "one", "policy": LIVE}
    session = await box.call("POST", "/v1/sessions", body, headers=headers)

    sandbox = (await agent.assigned(session["id"])).spec.sandbox
    assert sandbox.label == "site 1, group 1, node 1, project 1, session"
    assert [rule.layer for rule in sandbox.nets] == [
        "site", "group", "node", "project", "session",
    ]  # fmt: skip
    assert [each["target"] for each in await box.call("GET", "/v1/policies")] == [
        "base", "site", "group:default", f"node:{agent.node}", "project:lab",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "column", "value"),
    [("group:gpu", "group_name", "gpu"), ("project:lab", "project_id", "p-lab")],
)
async def test_a_change_concerns_the_sessions_of_its_group_or_project_alone(
    either_box: ManagerBox, target: str, column: str, value: str
) -> None:
    box = either_box
    await settle(box)
    agent = await box.add_agent()
    one, told = await running(box, agent, "one")
    _, other = await running(box, agent, "other")
    async with box.manager.database.begin() as tx:
        await tx.execute(
            _EVERY_SESSION.where(sessions.c.id == sa.bindparam("b_id")), b_id=one, **{column: value}
        )
    before = agent.wanted[other.kernel].revision
    done = apply(box, LIVE, target)
    now = await guard(agent, told)

    layer = target.partition(":")[0]
    assert now.spec.sandbox.label == f"{layer} 1"
    effect = (await done)["effect"]
    assert (effect["running"], effect["changed"], effect["waiting"]) == (1, 1, [])
    assert agent.wanted[other.kernel].revision == before
    assert agent.wanted[other.kernel].live == ""

    guarded = Guarded(live=now.live, label=now.spec.sandbox.label)
    await agent.running(now, guarded=guarded, refused={f"{layer} line 3": 7})
    async with asyncio.timeout(PATIENCE_S):
        while (await box.call("GET", f"/v1/policies/{target}"))["refused"] != {"3": 7}:
            await asyncio.sleep(0)


@pytest.mark.parametrize("target", ["group:nowhere", "project:nobody", "node:nowhere"])
async def test_what_nobody_has_seen_has_no_policy(box: ManagerBox, target: str) -> None:
    kind, _, name = target.partition(":")
    problem = await box.call("PUT", f"/v1/policies/{target}", {"text": LIVE}, status=404)
    assert f"no {kind} '{name}'" in problem["detail"]


async def test_a_project_widens_nothing(box: ManagerBox) -> None:
    await settle(box)
    wide = {"text": "version = 1\nwiden = ['perf']\n"}
    problem = await box.call("PUT", "/v1/policies/project:lab", wide, status=400)
    assert "only an administrator's layer" in problem["detail"]


def test_a_refusal_says_whose_policy_it_was_and_whom_to_ask() -> None:
    seat = Seat("box-3", "gpu", "p-lab")

    def text(layer: str, *admins: str, answer: str = "EPERM") -> str:
        refusal = Refusal(
            at=0.0, layer=layer, line=12, what="connect", object="10.0.0.5:5432", answer=answer
        )
        return rules.told(refusal, seat, "lab", admins).text.partition("5432 ")[2]

    assert text("project", "ann", "bob") == "refused by project policy lab, line 12; ask ann or bob"
    assert text("project") == "refused by project policy lab, line 12; ask an administrator"
    assert text("group") == "refused by group policy gpu, line 12; ask an administrator"
    assert text("node") == "refused by node policy box-3, line 12; ask an administrator"
    assert text("session") == "refused by session policy, line 12"
    assert text("site", answer="log") == "logged by site policy, line 12"


def test_each_layer_of_a_place_has_one_target() -> None:
    targets = rules.targets_of(Seat("n", "g", "p"))
    assert list(targets) == [name for name in LAYERS if name in targets]
    assert [rules.layer_of(target) for target in targets.values()] == list(targets)
    row = ProjectRow(id="p", name="lab", domain_id="d", domain="arts", role=None)
    assert (rules.project_name(row, "d"), rules.project_name(row, "e")) == ("lab", "arts/lab")


@pytest.mark.parametrize(
    ("text", "accepts"),
    [
        ('accept_unenforced = ["nets", "files"]\n[weights]\nx = 1\n', ("files", "nets")),
        ('accept_unenforced = ["nets", "everything", 7]', ("nets",)),
        ('accept_unenforced = "files"', ()),
        ("accept_unenforced = [", ()),
        ("", ()),
    ],
)
def test_a_group_accepts_by_name_what_is_not_kept(text: str, accepts: tuple[str, ...]) -> None:
    assert rules.accepted(text) == accepts


async def test_what_a_group_accepts_is_told_with_its_sessions_policy(
    either_box: ManagerBox,
) -> None:
    box = either_box
    agent = await box.add_agent()
    async with box.manager.database.begin() as tx:
        await tx.execute(
            sa.update(groups).where(groups.c.name == sa.bindparam("b_name")),
            b_name="default",
            text='accept_unenforced = ["files"]',
        )
    _, told = await running(box, agent, "one")

    assert told.spec.sandbox.accepts == ("files",)
