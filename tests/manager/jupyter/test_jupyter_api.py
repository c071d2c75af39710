"""Jupyter's REST API on a manager whose agent does what the test tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.http import Credentials
from madang.manager.jupyter.rules.ids import session_id
from madang.testing.clock import FakeClock
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.wire.kernel import Wanted

KERNELS = "/jupyter/admin/api/kernels"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def timed(sqlite_url: str, clock: FakeClock) -> AsyncIterator[ManagerBox]:
    async with manager_box(ManagerSettings(database_url=sqlite_url), clock) as box:
        yield box


async def test_a_kernel_is_a_session_that_others_neither_see_nor_touch(box: ManagerBox) -> None:
    made = await box.call("POST", KERNELS, {"name": "python"}, status=201)
    session = await box.call("GET", f"/v1/sessions/{session_id(made['id'])}")
    assert session["labels"]["jupyter.kernel"] == "python"
    assert session["kind"] == "idle"
    eve = await box.new_user("eve")
    own = KERNELS.replace("admin", "eve")
    for method, path in (
        ("GET", f"/{made['id']}"),
        ("DELETE", f"/{made['id']}"),
        ("POST", f"/{made['id']}/restart"),
        ("POST", f"/{made['id']}/interrupt"),
        ("GET", f"/{made['id']}/channels"),
    ):
        await box.call(method, own + path, status=404, headers=eve)
        await box.call(method, KERNELS + path, status=403, headers=eve)
    assert await box.call("GET", own, headers=eve) == []
    found = await box.call("GET", own, status=403)
    assert "/jupyter/admin" in found["message"]


async def test_an_administrator_runs_no_code_in_others_sessions(box: ManagerBox) -> None:
    eve = await box.new_user("eve")
    made = await box.call("POST", "/jupyter/eve/api/kernels", {}, status=201, headers=eve)
    await box.call("GET", f"{KERNELS}/{made['id']}", status=404)
    await box.call("GET", f"{KERNELS}/{made['id']}/channels", status=404)
    assert await box.call("GET", KERNELS) == []


async def test_a_token_that_may_only_read_starts_nothing(box: ManagerBox) -> None:
    made = await box.call("POST", "/v1/tokens", {"name": "r", "scopes": ["read"]}, status=201)
    reader = {"Authorization": f"token {made['secret']}"}
    assert await box.call("GET", KERNELS, headers=reader) == []
    for method, path in (("POST", KERNELS), ("GET", f"{KERNELS}/x/channels")):
        await box.call(method, path, status=403, headers=reader)
    body = {"type": "file", "format": "text", "content": "x"}
    await box.call("PUT", "/jupyter/admin/api/contents/a/b", body, status=403, headers=reader)


async def test_clients_may_add_parameters_that_mean_nothing_to_us(box: ManagerBox) -> None:
    """JupyterLab adds the time, so that nothing in between answers from a cache."""
    assert await box.call("GET", f"{KERNELS}?1795880069452") == []
    await box.call("GET", "/v1/sessions?1795880069452", status=400)


async def test_the_token_is_taken_as_jupyters_clients_send_it_and_only_below_jupyter(
    box: ManagerBox,
) -> None:
    for headers in (
        {"Authorization": f"token {box.token}"},
        {"Authorization": f"Token {box.token}"},
    ):
        await box.call("GET", KERNELS, headers=headers)
        await box.call("GET", "/v1/sessions", status=401, headers=headers)
    shown = Credentials(method="GET", target="/", host="h", source="s", cookies=(("madang", "c"),))
    assert shown.as_bearer("t").authorization == ("Bearer t",)
    assert shown.as_bearer(None).authorization == ()
    assert shown.as_bearer(None).cookies == shown.cookies
    both = Credentials(method="GET", target="/", host="h", source="s", authorization=("Bearer a",))
    assert both.as_bearer("b").authorization == ("Bearer a",)
    signed = "MADANG-HMAC-SHA256 Credential=a"
    other = Credentials(method="GET", target="/", host="h", source="s", authorization=(signed,))
    assert other.as_bearer("b").authorization == (signed,)


async def test_the_description_of_our_api_leaves_jupyters_out(box: ManagerBox) -> None:
    paths = (await box.call("GET", "/v1/openapi.json"))["paths"]
    assert not [path for path in paths if path.startswith("/jupyter")]


async def test_what_a_request_asks_for_is_checked_as_any_session_is(box: ManagerBox) -> None:
    for body, status in (
        ({"name": "cobol"}, 404),
        ({"name": 7}, 400),
        ({"env": {"bad name": "x"}}, 400),
        ({"env": {"a": "x" * (1 << 19)}}, 413),
        ({"env": {"a": 1}}, 400),
    ):
        told = await box.call("POST", KERNELS, body, status=status)
        assert told["message"]
    made = await box.call("POST", KERNELS, {"env": {"KERNEL_ID": "x", "A": "b"}}, status=201)
    session = await box.call("GET", f"/v1/sessions/{session_id(made['id'])}")
    assert session["env"] == {"A": "b"}


async def running(box: ManagerBox, agent: ScriptedAgent, **env: str) -> str:
    """Id of a session that is a kernel and runs."""
    made = await box.call("POST", KERNELS, {"env": env}, status=201)
    assignment = await agent.assigned(session_id(made["id"]))
    await agent.running(assignment)
    await box.until(assignment.kernel.session, "RUNNING")
    return assignment.kernel.session


async def test_a_kernel_whose_client_is_gone_ends_if_that_was_asked_for(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    lonely = await running(timed, agent, MADANG_ALONE_S="90")
    kept = await running(timed, agent)
    timed.manager.jupyter.memory(lonely).clients = 1
    for _ in range(30):
        await agent.send()
        await clock.advance(5)
    assert (await timed.call("GET", f"/v1/sessions/{lonely}"))["status"] == "RUNNING"
    timed.manager.jupyter.memory(lonely).clients = 0
    for _ in range(16):
        await agent.send()
        await clock.advance(5)
    assert (await timed.call("GET", f"/v1/sessions/{lonely}"))["status"] == "RUNNING"
    for _ in range(5):
        await agent.send()
        await clock.advance(5)
    stopping = await agent.assigned(lonely, Wanted.STOP)
    assert stopping.stop_reason == "idle"
    assert (await timed.call("GET", f"/v1/sessions/{kept}"))["status"] == "RUNNING"


@pytest.mark.parametrize("asked", ["nonsense", "-5", "nan", "inf", "1e400"])
async def test_a_wait_that_is_none_ends_nothing_or_is_bounded(
    timed: ManagerBox, clock: FakeClock, asked: str
) -> None:
    agent = await timed.add_agent()
    session = await running(timed, agent, MADANG_ALONE_S=asked)
    for _ in range(20):
        await agent.send()
        await clock.advance(5)
    assert (await timed.call("GET", f"/v1/sessions/{session}"))["status"] == "RUNNING"


async def test_a_kernel_that_has_not_begun_is_interrupted_without_a_word(box: ManagerBox) -> None:
    made = await box.call("POST", KERNELS, {}, status=201)
    await box.call("POST", f"{KERNELS}/{made['id']}/interrupt", status=204)
