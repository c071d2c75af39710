"""Passwords, cookies, second factors, invitations over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from madang.manager.app import ManagerSettings
from madang.manager.identity.rules import totp
from madang.manager.identity.service.passwords import Passwords
from madang.testing.clock import FakeClock
from madang.testing.manager import ManagerBox, manager_box
from madang.testing.people import OWNER, PROJECT, World, make_world

PASSWORD = "correct horse battery"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def world(database_url: str, clock: FakeClock) -> AsyncIterator[World]:
    """On each kind of database; the time is the test's."""
    async with manager_box(ManagerSettings(database_url=database_url), clock) as box:
        yield await make_world(box)


@pytest.fixture
async def lite(sqlite_url: str, clock: FakeClock) -> AsyncIterator[World]:
    async with manager_box(ManagerSettings(database_url=sqlite_url), clock) as box:
        yield await make_world(box)


async def set_password(world: World, who: str = OWNER) -> None:
    body = {"new": PASSWORD}
    assert (await world.ask(who, "PUT", "/v1/account/password", body))[0] == 204


async def login(world: World, status: int = 200, **request: Any) -> Any:
    body = {"user": OWNER, "password": PASSWORD, "token": "laptop", **request}
    found, text = await world.ask("anonymous", "POST", "/v1/login", body)
    assert found == status, text
    return json.loads(text)


class Browser:
    """Keeps one cookie, and says where its page is from."""

    def __init__(self, box: ManagerBox) -> None:
        self.http = aiohttp.ClientSession(box.url, cookie_jar=aiohttp.CookieJar(unsafe=True))
        self.origin = {"Origin": box.url}
        self.csrf: dict[str, str] = {}

    async def login(self, **headers: str) -> aiohttp.ClientResponse:
        body = {"user": OWNER, "password": PASSWORD}
        sent = {**self.origin, **headers}
        async with self.http.post("/v1/login", json=body, headers=sent) as response:
            found = await response.json()
            self.csrf = {"Madang-CSRF": found.get("csrf", "")}
            return response

    async def status(self, method: str, path: str, body: Any = None, **headers: str) -> int:
        async with self.http.request(method, path, json=body, headers=headers) as response:
            return response.status


@pytest.fixture
async def browser(lite: World) -> AsyncIterator[Browser]:
    await set_password(lite)
    browser = Browser(lite.box)
    yield browser
    await browser.http.close()


async def test_a_password_makes_a_token_for_one_machine(world: World) -> None:
    await set_password(world)
    reply = await login(world)
    world.headers["laptop"] = {"Authorization": f"Bearer {reply['token']}"}
    who = json.loads((await world.ask("laptop", "GET", "/v1/whoami"))[1])
    assert (who["user"], who["token"], who["kind"]) == (OWNER, "laptop", "login")
    assert (who["domain"], who["project"], who["scopes"]) == ("home", PROJECT, ["*"])
    assert who["projects"] == [{"project": PROJECT, "role": "member"}]
    assert (await world.ask("laptop", "POST", "/v1/logout"))[0] == 204
    assert (await world.ask("laptop", "GET", "/v1/whoami"))[0] == 401


async def test_wrong_unknown_and_disabled_are_told_the_same(lite: World) -> None:
    await set_password(lite)
    await set_password(lite, "fellow")
    await lite.ask("root", "PATCH", "/v1/users/fellow", {"disabled": True})
    answers = [
        await login(lite, 401, user=user, password=password)
        for user, password in (
            (OWNER, "wrong password"), ("nobody", PASSWORD), ("fellow", PASSWORD),
            ("neighbour", PASSWORD), ("NOBODY'; --", PASSWORD), (OWNER, ""), (OWNER, "x" * 9999),
        )
    ]  # fmt: skip
    for answer in answers:
        answer.pop("request_id")
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["code"] == "auth.login_failed"


async def test_an_unknown_user_costs_as_much_as_a_known_one() -> None:
    passwords = Passwords()
    stored = await passwords.hash(PASSWORD)
    assert stored.startswith("$argon2id$")
    assert await passwords.verify(stored, PASSWORD)
    assert not await passwords.verify(stored, "wrong")
    assert not await passwords.verify(None, PASSWORD)
    assert not await passwords.verify("garbage", PASSWORD)
    assert passwords._nobody.split("$")[1:4] == stored.split("$")[1:4]


async def test_guessing_is_slowed_down_also_across_restarts(
    database_url: str, clock: FakeClock
) -> None:
    settings = ManagerSettings(database_url=database_url)
    async with manager_box(settings, clock) as box:
        world = await make_world(box)
        await set_password(world)
        for _ in range(5):
            await login(world, 401, password="wrong guess")
        await login(world, 429)
    async with manager_box(settings, clock) as box:
        world = World(box, {"anonymous": {}})
        problem = await login(world, 429)
        assert 0 < problem["details"]["retry_after_s"] <= 1
        assert "wait 1 s" in problem["detail"]
        clock.jump(1.5)
        await login(world)
        for _ in range(5):  # it succeeded: the pair starts anew
            await login(world, 401, password="wrong guess")
        await login(world, 429)


async def test_many_guesses_at_once_are_not_cheaper(lite: World) -> None:
    await set_password(lite)
    body = {"user": OWNER, "password": "wrong guess", "token": "x"}
    answers = await asyncio.gather(
        *(lite.ask("anonymous", "POST", "/v1/login", body) for _ in range(12))
    )
    statuses = sorted(status for status, _ in answers)
    assert statuses == [401] * 5 + [429] * 7


async def test_a_new_password_ends_other_logins_alone(lite: World) -> None:
    await set_password(lite)
    first, second = await login(lite), await login(lite, token="desk")
    lite.headers["first"] = {"Authorization": f"Bearer {first['token']}"}
    lite.headers["second"] = {"Authorization": f"Bearer {second['token']}"}
    body = {"old": "wrong password", "new": "another password"}
    assert (await lite.ask("first", "PUT", "/v1/account/password", body))[0] == 401
    body = {"old": PASSWORD, "new": "another password"}
    assert (await lite.ask("first", "PUT", "/v1/account/password", body))[0] == 204
    assert (await lite.ask("first", "GET", "/v1/whoami"))[0] == 200
    assert (await lite.ask("second", "GET", "/v1/whoami"))[0] == 401
    assert (await lite.ask(OWNER, "GET", "/v1/whoami"))[0] == 200
    await login(lite, 401)
    await login(lite, password="another password")


# Browsers


async def test_a_browser_s_cookie_and_its_csrf_token(browser: Browser) -> None:
    response = await browser.login()
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith("madang=mdb_")
    assert "HttpOnly; SameSite=Lax" in cookie
    assert await browser.status("GET", "/v1/whoami") == 200
    run = {"argv": ["true"]}
    assert (
        await browser.status("POST", "/v1/sessions", run, **browser.origin, **browser.csrf) == 201
    )
    async with browser.http.get("/v1/whoami") as answer:
        assert (await answer.json())["csrf"] == browser.csrf["Madang-CSRF"]
    assert await browser.status("POST", "/v1/logout", **browser.origin, **browser.csrf) == 204
    assert await browser.status("GET", "/v1/whoami") == 401


async def test_other_sites_change_nothing(browser: Browser) -> None:
    await browser.login()
    run, own, csrf = {"argv": ["true"]}, browser.origin, browser.csrf
    for headers in (
        {}, own, csrf, {**own, "Madang-CSRF": "wrong"}, {"Origin": "http://evil.example", **csrf},
        {"Origin": "null", **csrf}, {**own, **csrf, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", **csrf},
    ):  # fmt: skip
        assert await browser.status("POST", "/v1/sessions", run, **headers) == 403
    headers = {"Origin": "http://evil.example"}
    for path in ("/v1/run", "/v1/sessions/x/attach"):
        for sent in (headers, {}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await browser.http.ws_connect(path, headers=sent)
            assert refused.value.status == 403
    async with browser.http.ws_connect("/v1/run", headers=own) as socket:
        await socket.send_json({"op": "run", "spec": run})
        assert (await socket.receive_json())["op"] == "session"


async def test_another_site_logs_nobody_in(browser: Browser) -> None:
    assert (await browser.login(Origin="http://evil.example")).status == 403
    assert (await browser.login(**{"Sec-Fetch-Site": "cross-site"})).status == 403
    assert await browser.status("GET", "/v1/whoami") == 401


async def test_over_tls_the_cookie_is_bound_to_the_host(browser: Browser) -> None:
    browser.origin = {"Origin": browser.origin["Origin"].replace("http://", "https://")}
    cookie = (await browser.login()).headers["Set-Cookie"]
    assert cookie.startswith("__Host-madang=mdb_")
    assert cookie.endswith("; Secure")


@pytest.mark.parametrize("value", ["mdb_wrong", "", "mdg_of-root", "x" * 500, "mdb_%00"])
async def test_forged_cookies_are_refused(lite: World, value: str) -> None:
    for name in ("madang", "__Host-madang"):
        cookie = {"Cookie": f"{name}={value}"}
        assert (await lite.ask("anonymous", "GET", "/v1/whoami", **cookie))[0] == 401


async def test_a_cookie_is_no_bearer_token_nor_the_other_way_round(browser: Browser) -> None:
    response = await browser.login()
    secret = response.cookies["madang"].value
    async with aiohttp.ClientSession(str(browser.http._base_url)) as http:
        headers = {"Authorization": f"Bearer {secret}"}
        async with http.get("/v1/whoami", headers=headers) as answer:
            assert answer.status == 401


async def test_browser_sessions_end_when_idle_and_in_any_case(
    browser: Browser, clock: FakeClock
) -> None:
    await browser.login()
    began = clock.now()
    for _ in range(16):
        clock.jump(11 * 3600)
        if await browser.status("GET", "/v1/whoami") != 200:
            break
    assert clock.now() - began > 6.5 * 86400
    assert await browser.status("GET", "/v1/whoami") == 401
    browser.http.cookie_jar.clear()
    await browser.login()
    clock.jump(13 * 3600)
    assert await browser.status("GET", "/v1/whoami") == 401


# The second factor


async def turn_on(world: World, clock: FakeClock) -> tuple[bytes, list[str]]:
    await set_password(world)
    body = {"password": PASSWORD}
    draft = json.loads((await world.ask(OWNER, "POST", "/v1/account/totp", body))[1])
    secret = _decode(draft["secret"])
    assert draft["uri"].startswith("otpauth://totp/Madang:")
    await login(world)  # not in force yet
    code = totp.code_at(secret, totp.step_of(clock.now()))
    found = await world.ask(OWNER, "PUT", "/v1/account/totp", {"otp": code})
    return secret, json.loads(found[1])["codes"]


def _decode(text: str) -> bytes:
    import base64

    return base64.b32decode(text + "=" * (-len(text) % 8))


async def test_a_second_factor_is_needed_and_each_code_works_once(
    world: World, clock: FakeClock
) -> None:
    secret, recovery = await turn_on(world, clock)
    assert (await login(world, 401))["code"] == "auth.otp_needed"
    used = totp.code_at(secret, totp.step_of(clock.now()))
    assert (await login(world, 401, otp=used))["code"] == "auth.login_failed"
    clock.jump(31)
    code = totp.code_at(secret, totp.step_of(clock.now()))
    body = {"user": OWNER, "password": PASSWORD, "token": "x", "otp": code}
    answers = await asyncio.gather(
        *(world.ask("anonymous", "POST", "/v1/login", body) for _ in range(2))
    )
    assert sorted(status for status, _ in answers) == [200, 401]
    await login(world, otp=recovery[0])
    await login(world, 401, otp=recovery[0])
    await login(world, otp=recovery[1].upper())
    assert (await login(world, 401, otp=code, password="wrong one"))["code"] == "auth.login_failed"


async def test_a_second_factor_goes_with_the_password_or_by_an_administrator(
    lite: World, clock: FakeClock
) -> None:
    await turn_on(lite, clock)
    off = "/v1/account/totp/off"
    assert (await lite.ask(OWNER, "POST", off, {"password": "wrong one"}))[0] == 401
    path = f"/v1/users/{OWNER}"
    assert (await lite.ask(OWNER, "PATCH", path, {"totp": False}))[0] == 403
    assert (await lite.ask("domain_admin", "PATCH", path, {"totp": True}))[0] == 400
    assert (await lite.ask("domain_admin", "PATCH", path, {"totp": False}))[0] == 200
    await login(lite)


# Invitations


async def invite(world: World, who: str = "domain_admin", **draft: Any) -> str:
    body = {"project": PROJECT, **draft}
    status, text = await world.ask(who, "POST", "/v1/invitations", body)
    assert status == 201, text
    code: str = json.loads(text)["code"]
    return code


async def accept(world: World, code: str, user: str = "newcomer", **more: Any) -> tuple[int, Any]:
    body = {"code": code, "user": user, "password": PASSWORD, "token": "laptop", **more}
    status, text = await world.ask("anonymous", "POST", "/v1/invitations/accept", body)
    return status, json.loads(text)


async def test_an_invitation_lets_one_person_in(world: World) -> None:
    code = await invite(world)
    answers = await asyncio.gather(*(accept(world, code, f"new{n}") for n in range(3)))
    assert sorted(status for status, _ in answers) == [200, 401, 401]
    reply = next(answer for status, answer in answers if status == 200)
    world.headers["new"] = {"Authorization": f"Bearer {reply['token']}"}
    who = json.loads((await world.ask("new", "GET", "/v1/whoami"))[1])
    assert (who["role"], who["domain"], who["project"]) == ("user", "home", PROJECT)
    assert (await accept(world, code, "later"))[1]["code"] == "auth.invitation"
    assert json.loads((await world.ask("root", "GET", "/v1/invitations"))[1])["items"] != []


async def test_a_refused_name_or_password_leaves_the_invitation(lite: World) -> None:
    code = await invite(lite)
    for user, password, status in (
        (OWNER, PASSWORD, 409), ("Root", PASSWORD, 400), ("rооt", PASSWORD, 400),
        ("newcomer", "short", 400), ("newcomer", PASSWORD, 200),
    ):  # fmt: skip
        assert (await accept(lite, code, user, password=password))[0] == status


async def test_an_invitation_ends_with_its_time_its_maker_and_its_project(
    lite: World, clock: FakeClock
) -> None:
    late = await invite(lite, expires_s=60)
    made = [await invite(lite) for _ in range(3)]
    clock.jump(61)
    assert (await accept(lite, late))[0] == 401
    listed = json.loads((await lite.ask("domain_admin", "GET", "/v1/invitations"))[1])["items"]
    path = f"/v1/invitations/{listed[1]['id']}"
    assert (await lite.ask("domain_admin", "DELETE", path))[0] == 204
    assert (await accept(lite, made[2]))[0] == 401
    project = f"/v1/projects/home%2F{PROJECT}"
    await lite.ask("root", "PATCH", project, {"disabled": True})
    assert (await accept(lite, made[1]))[0] == 401
    await lite.ask("root", "PATCH", project, {"disabled": False})
    await lite.ask("root", "PATCH", "/v1/users/domain_admin", {"role": "user"})
    assert (await accept(lite, made[1]))[0] == 401


async def test_nobody_invites_above_themselves(lite: World) -> None:
    for who, role, status in (
        ("domain_admin", "admin", 403), ("domain_admin", "monitor", 403),
        ("domain_admin", "domain_admin", 201), ("project_admin", "user", 403),
        (OWNER, "user", 403), ("foreign_admin", "user", 404), ("root", "admin", 201),
        ("domain_admin", "king", 400),
    ):  # fmt: skip
        body = {"project": f"home/{PROJECT}", "role": role}
        assert (await lite.ask(who, "POST", "/v1/invitations", body))[0] == status, (who, role)


async def test_a_reset_sets_a_new_password_and_ends_logins(lite: World) -> None:
    await set_password(lite)
    reply = await login(lite)
    lite.headers["old"] = {"Authorization": f"Bearer {reply['token']}"}
    first, second = [await invite(lite, user=OWNER) for _ in range(2)]
    assert (await accept(lite, first, "", password="a new password"))[0] == 401
    status, reply = await accept(lite, second, "", password="a new password")
    assert (status, reply["user"]) == (200, OWNER)
    assert (await lite.ask("old", "GET", "/v1/whoami"))[0] == 401
    await login(lite, password="a new password")
    body = {"user": "root"}
    assert (await lite.ask("domain_admin", "POST", "/v1/invitations", body))[0] == 404


async def test_a_reset_does_not_go_round_the_second_factor(lite: World, clock: FakeClock) -> None:
    await turn_on(lite, clock)
    code = await invite(lite, user=OWNER)
    status, reply = await accept(lite, code, "", password="a new password")
    assert (status, reply["token"], reply["csrf"]) == (200, "", "")
    assert (await login(lite, 401, password="a new password"))["code"] == "auth.otp_needed"


async def test_an_added_user_sets_the_password_first(lite: World) -> None:
    body = {"name": "newcomer", "project": PROJECT}
    status, text = await lite.ask("domain_admin", "POST", "/v1/users", body)
    assert status == 201
    await login(lite, 401, user="newcomer")
    assert (await accept(lite, json.loads(text)["code"], "other-name"))[1]["user"] == "newcomer"
    await login(lite, user="newcomer")


async def test_no_secret_of_a_login_is_stored_or_told(lite: World, clock: FakeClock) -> None:
    secret, recovery = await turn_on(lite, clock)
    code = await invite(lite)
    reply = await login(lite, otp=recovery[0])
    path = lite.box.manager._settings.database_url.removeprefix("sqlite:///")
    from pathlib import Path

    data = Path(path).read_bytes() + Path(f"{path}-wal").read_bytes()
    for each in (PASSWORD, recovery[1], code, reply["token"], totp.show_secret(secret)):
        assert each.encode() not in data
    assert secret not in data
    user = (await lite.ask("root", "GET", f"/v1/users/{OWNER}"))[1]
    assert "$argon2" not in user
