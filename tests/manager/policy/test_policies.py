"""Sandbox policies through the API, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from madang.kit.clock import SystemClock
from madang.kit.policy import base_rules, render
from madang.manager.app import ManagerSettings
from madang.manager.identity import store as identity
from madang.manager.identity.service.authentication import digest_of
from madang.manager.policy import rules
from madang.manager.policy.types import PolicyRow
from madang.testing.manager import ManagerBox, manager_box
from madang.testing.policies import PATIENT, layers
from madang.wire.policy import SESSION, SITE, Answer, Layer, Rule
from madang.wire.session import Reason

DENY = "version = 1\n\n[[deny]]\ncalls = ['ptrace']\nwith = 'EACCES'\nwhy = 'no debuggers'\n"
KILL = "version = 1\n[[deny]]\ncalls = ['ptrace', 'kcmp']\nwith = 'kill'\n"
WIDE = "version = 1\nwiden = ['perf']\n"


async def apply(box: ManagerBox, text: str, target: str = "site", **more: Any) -> Any:
    return await box.call("PUT", f"/v1/policies/{target}", {"text": text}, **more)


async def test_every_version_is_kept_with_who_when_and_why(either_box: ManagerBox) -> None:
    box = either_box
    body = {"text": DENY, "note": "first"}
    first = await box.call("PUT", "/v1/policies/site", body)
    second = await apply(box, KILL)
    again = await apply(box, KILL)

    assert [p["version"] for p in (first, second, again)] == [1, 2, 2]
    history = await box.call("GET", "/v1/policies/site/history")
    assert [(p["version"], p["text"], p["author"], p["note"]) for p in history] == [
        (2, KILL, "admin", ""),
        (1, DENY, "admin", "first"),
    ]
    assert abs(history[0]["at"] - SystemClock().now()) < 600
    assert await box.call("GET", "/v1/policies/site") == {**second, "effect": None}
    assert [p["target"] for p in await box.call("GET", "/v1/policies")] == ["base", "site"]


async def test_who_saw_an_older_version_does_not_overwrite(box: ManagerBox) -> None:
    await apply(box, DENY, headers={"If-Match": '"0"'})
    problem = await apply(box, KILL, headers={"If-Match": '"0"'}, status=412)
    assert "at version 1, not 0" in problem["detail"]
    assert (await apply(box, KILL, headers={"If-Match": '"1"'}))["version"] == 2


async def test_only_administrators_put_in_force_and_everybody_may_look(box: ManagerBox) -> None:
    token = "mdg_of-a-user"
    async with box.manager.database.begin() as tx:
        await identity.add_user(
            tx, user_id="u1", name="ada", role="user", project_id="default", created_at=0
        )
        await identity.add_token(
            tx, token_id="t1", user_id="u1", name="t", digest=digest_of(token), created_at=0
        )
    headers = {"Authorization": f"Bearer {token}"}
    problem = await apply(box, DENY, headers=headers, status=403)
    assert problem["code"] == "auth.forbidden"
    assert len(await box.call("GET", "/v1/policies", headers=headers)) == 1
    await box.call("POST", "/v1/policies/review", {"text": DENY}, headers=headers)
    assert (await box.call("GET", "/v1/policies/site"))["version"] == 0


@pytest.mark.parametrize(
    ("target", "text", "status", "words"),
    [
        ("site", "version = 1\n[[deny]]\ncalls = ['ptrase']", 400, "line 3"),
        ("site", WIDE, 400, "sandbox.widen"),
        ("session", DENY, 400, "can't be put in force"),
        ("base", DENY, 400, "can't be put in force"),
        ("node:nobody", DENY, 404, "no node 'nobody'"),
        ("somewhere", DENY, 404, "base, site, group:NAME"),
        ("node:..%2Fx", DENY, 404, "base, site, group:NAME"),
    ],
)
async def test_what_can_not_be_put_in_force_is_told(
    box: ManagerBox, target: str, text: str, status: int, words: str
) -> None:
    problem = await apply(box, text, target, status=status)
    assert words in problem["detail"]
    assert len(await box.call("GET", "/v1/policies")) == 1


async def test_root_of_the_server_may_let_rules_be_widened(sqlite_url: str) -> None:
    settings = ManagerSettings(database_url=sqlite_url, widen=("perf",))
    async with manager_box(settings) as box:
        question = {"call": "perf_event_open"}
        before = await box.call("POST", "/v1/policies/test", question)
        await apply(box, WIDE)
        after = await box.call("POST", "/v1/policies/test", question)
    assert (before["answer"], before["layer"], before["name"]) == ("EPERM", "base", "perf")
    assert after["passes"]


async def test_a_session_gets_what_is_in_force_where_it_runs(box: ManagerBox) -> None:
    agent = await box.add_agent()
    await apply(box, DENY)
    await apply(box, KILL, "node:n1")
    own = "version = 1\n[[deny]]\ncalls = ['mbind']"
    session = await box.call("POST", "/v1/sessions", {"argv": ["true"], "policy": own})
    sandbox = (await agent.assigned(session["id"])).spec.sandbox

    assert sandbox.label == "site 1, node 1, session"
    assert [(rule.place, rule.answer) for rule in sandbox.rules] == [
        ("site line 3", Answer.ERRNO), ("node line 2", Answer.KILL), ("session line 2", "errno"),
    ]  # fmt: skip


async def test_a_session_without_policies_gets_the_base_alone(box: ManagerBox) -> None:
    agent = await box.add_agent()
    session = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    assert not (await agent.assigned(session["id"])).spec.sandbox


async def test_a_new_policy_is_for_sessions_that_are_placed_later(box: ManagerBox) -> None:
    agent = await box.add_agent()
    first = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    assert not (await agent.assigned(first["id"])).spec.sandbox
    await apply(box, DENY)
    second = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    assert (await agent.assigned(second["id"])).spec.sandbox.label == "site 1"


@pytest.mark.parametrize("text", ["version = 9", WIDE, "[[file]]", "version = 1\n[[deny]]"])
async def test_a_bad_policy_of_a_session_is_refused_at_once(box: ManagerBox, text: str) -> None:
    body = {"argv": ["true"], "policy": text}
    for query in ("", "?dry_run=1"):
        problem = await box.call("POST", f"/v1/sessions{query}", body, status=400)
        assert problem["code"] == "policy.invalid"
        assert "line" in problem["details"]
    assert (await box.call("GET", "/v1/sessions"))["items"] == []


def row(text: str) -> PolicyRow:
    return PolicyRow(id=1, target=SITE, version=7, text=text, digest="", author_id="u",
                     author="u", at=0, note="")  # fmt: skip


def test_a_text_that_can_not_be_read_any_more_starts_no_session() -> None:
    sandbox = rules.sandbox_of([row("version = 2")], "", "")
    assert "line 1" in sandbox.broken
    assert sandbox.rules == ()
    assert sandbox


async def test_a_draft_is_compared_call_by_call(box: ManagerBox) -> None:
    await apply(box, DENY)
    same = await box.call("POST", "/v1/policies/review", {"text": "# more words\n" + DENY})
    assert (same["stricter"], same["wider"], same["other"], same["version"]) == ([], [], [], 1)
    text = DENY + "[[deny]]\ncalls = ['kcmp']\n"
    assert (await box.call("POST", "/v1/policies/review", {"text": text}))["stricter"] == ["kcmp"]
    empty = await box.call("POST", "/v1/policies/review", {"text": "version = 1"})
    assert (empty["wider"], empty["current"]) == (["ptrace"], DENY)
    other = await box.call("POST", "/v1/policies/review", {"text": KILL})
    assert (other["stricter"], other["other"]) == (["kcmp"], ["ptrace"])


def in_base(rule: Rule) -> bool:
    """Whether the base says the same of the same calls, so that the rule changes nothing."""
    statement = (rule.answer, rule.code, rule.check, rule.when)
    said = [
        set(base.calls)
        for base in base_rules()
        if (base.answer, base.code, base.check, base.when) == statement
    ]
    return not rule.others and all(any(call in calls for calls in said) for call in rule.calls)


@PATIENT
@given(layers((SITE,)))
def test_nothing_in_a_draft_goes_unmentioned(layer: Layer) -> None:
    found = rules.review(SITE, None, layer)
    named = {*found.stricter, *found.other, *found.wider}
    if layer.widen or not all(map(in_base, layer.rules)):
        assert named
    assert rules.review(SITE, row(render(layer.rules)), layer).stricter == ()


@pytest.mark.parametrize(
    ("question", "answer", "place"),
    [
        ({"call": "ptrace"}, "EACCES", ("site", 3)),
        ({"call": "socket", "arguments": [17, 3, 0]}, "EAFNOSUPPORT", ("base", None)),
        ({"call": "socket", "arguments": [2]}, "", ("", 0)),
        ({"call": "ptrace", "draft": {"text": KILL, "target": "session"}}, "SIGSYS", (SESSION, 2)),
        ({"call": "ptrace", "draft": {"text": KILL}}, "SIGSYS", ("site", 2)),
    ],
)
async def test_a_question_is_answered_with_the_rule(
    box: ManagerBox, question: dict[str, Any], answer: str, place: tuple[str, int | None]
) -> None:
    await apply(box, DENY)
    found = await box.call("POST", "/v1/policies/test", question)
    assert (found["answer"], found["layer"]) == (answer, place[0])
    assert place[1] is None or found["line"] == place[1]


@pytest.mark.parametrize(
    "question",
    [{"call": "nothing"}, {"call": "read", "arguments": [0] * 7},
     {"call": "read", "arguments": [-1]}],
    ids=str,
)  # fmt: skip
async def test_a_question_about_no_call_is_refused(box: ManagerBox, question: Any) -> None:
    problem = await box.call("POST", "/v1/policies/test", question, status=400)
    assert problem["code"] == "request.invalid"


async def test_a_change_is_an_event(box: ManagerBox) -> None:
    await apply(box, DENY)
    async with box.http.get("/v1/events", headers={"Last-Event-ID": "0"}) as stream:
        async for line in stream.content:
            if b"policy.applied" in line:
                break
        else:
            raise AssertionError(Reason.LOST)
