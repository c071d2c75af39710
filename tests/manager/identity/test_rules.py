"""Who may do what, what tokens can give, how fast one may guess: what must never happen."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.identity.rules import names, origins, throttle, totp
from madang.manager.identity.rules.rights import MAY, Act, Actor, Standing, Target, may, may_give
from madang.manager.identity.rules.scopes import check_granted, check_scopes, effective
from madang.manager.identity.types import ProjectRole, Role, Scope, allows
from madang.wire.errors import Forbidden, InvalidRequest

ids = st.sampled_from(["a", "b", "c"])
actors = st.builds(
    Actor,
    user_id=ids,
    role=st.sampled_from(Role),
    domain_id=ids,
    projects=st.dictionaries(ids, st.sampled_from(ProjectRole)),
)
targets = st.builds(
    Target,
    domain_id=ids,
    project_ids=st.frozensets(ids),
    user_id=st.none() | ids,
    role=st.none() | st.sampled_from(Role),
)
acts = st.sampled_from(Act)
scopes = st.frozensets(st.sampled_from([str(scope) for scope in Scope]), min_size=1)
SEEING = {Act.SEE_DOMAIN, Act.SEE_PROJECT, Act.SEE_USER, Act.SEE_TOKENS}
OWN = {Act.CHOOSE_PROJECT, *SEEING}


def test_every_act_has_its_line() -> None:
    assert set(MAY) == set(Act)


@given(actors, acts, targets)
def test_a_monitor_changes_nobody_but_itself(actor: Actor, act: Act, target: Target) -> None:
    if actor.role is Role.MONITOR and may(actor, act, target):
        assert act in SEEING or target.user_id == actor.user_id


@given(actors, acts, targets)
def test_a_mere_user_rules_nothing_outside_of_their_projects(
    actor: Actor, act: Act, target: Target
) -> None:
    if actor.role is Role.USER and may(actor, act, target) and act not in OWN:
        assert act is Act.CHANGE_MEMBERS
        assert any(actor.projects.get(each) is ProjectRole.ADMIN for each in target.project_ids)


@given(actors, acts, targets)
def test_a_domain_admin_s_power_ends_with_the_domain(
    actor: Actor, act: Act, target: Target
) -> None:
    if actor.role is not Role.DOMAIN_ADMIN or actor.domain_id == target.domain_id:
        return
    if act not in OWN and may(actor, act, target):
        assert act is Act.CHANGE_MEMBERS
        assert any(actor.projects.get(each) is ProjectRole.ADMIN for each in target.project_ids)


@given(actors, targets)
def test_nobody_below_an_administrator_touches_one(actor: Actor, target: Target) -> None:
    if target.role in {Role.ADMIN, Role.MONITOR} and actor.role is not Role.ADMIN:
        assert not may(actor, Act.CHANGE_USER, target)
        assert target.user_id == actor.user_id or not may(actor, Act.SEE_TOKENS, target)


@given(actors, st.sampled_from(Role))
def test_nobody_gives_more_than_they_have(actor: Actor, role: Role) -> None:
    if may_give(actor, role):
        assert actor.role is Role.ADMIN or role in {Role.USER, Role.DOMAIN_ADMIN}
        assert actor.role in {Role.ADMIN, Role.DOMAIN_ADMIN}


@given(acts, targets)
def test_an_administrator_may_all(act: Act, target: Target) -> None:
    assert may(Actor(user_id="z", role=Role.ADMIN, domain_id="z"), act, target)


def test_standings_are_what_the_table_speaks_of() -> None:
    assert {each for line in MAY.values() for each in line} <= set(Standing)


@given(scopes, scopes, st.sampled_from(Role))
def test_a_token_never_gives_what_its_maker_lacks(
    maker: frozenset[str], wanted: frozenset[str], role: Role
) -> None:
    has = effective(maker, role)
    try:
        check_granted(has, wanted)
    except Forbidden:
        return
    for scope in Scope:
        assert not allows(effective(wanted, role), scope) or allows(has, scope)


@given(scopes)
def test_a_monitor_s_token_only_reads_and_keeps_its_account(given: frozenset[str]) -> None:
    assert effective(given, Role.MONITOR) <= {"read", "account"}


@pytest.mark.parametrize("wanted", [[], ["READ"], ["read", "root"], ["*", ""]])
def test_unknown_scopes_are_refused(wanted: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_scopes(wanted)


@given(st.text(max_size=50))
def test_names_are_plain_ascii(name: str) -> None:
    if names.valid(name):
        assert name.isascii()
        assert name == name.lower()
        assert "/" not in name
        assert "--" not in name


@pytest.mark.parametrize(
    "name", ["", "Ann", "аnn", "an n", "-a", "a-", "a--b", "a/b", "a" * 41, "1a", "ann\n", "ａnn"]
)
def test_look_alikes_are_no_names(name: str) -> None:
    assert not names.valid(name)


@pytest.mark.parametrize("password", ["short", "aaaaaaaaaaaa", "annannannann", "x" * 2000])
def test_weak_passwords_are_refused(password: str) -> None:
    with pytest.raises(InvalidRequest):
        names.check_password(password, "ann")


def test_codes_are_those_of_the_standard() -> None:
    secret = b"12345678901234567890"  # RFC 6238, appendix B
    for at, code in {59: "94287082", 1111111109: "07081804", 20000000000: "65353130"}.items():
        assert totp.code_at(secret, totp.step_of(at), digits=8) == code


@given(st.integers(0, 2**33), st.integers(-3, 3))
def test_a_code_is_good_near_its_time_and_once(now: int, off: int) -> None:
    secret = b"12345678901234567890"
    step = totp.step_of(now)
    found = totp.find_step(secret, totp.code_at(secret, max(0, step + off)), now, used=-1)
    if abs(off) <= totp.DRIFT and step + off >= 0:
        assert found is not None
        assert totp.find_step(secret, totp.code_at(secret, found), now, used=found) is None


@given(st.integers(0, 10**6), st.floats(0, 10**6))
def test_the_pause_grows_and_ends(failures: int, since_s: float) -> None:
    for counter in throttle.counters("ann", "192.0.2.1"):
        left = throttle.left_s(counter, failures, since_s)
        assert 0 <= left <= counter.most_s
        assert left <= throttle.left_s(counter, failures + 1, since_s) or since_s > 0
        if failures < counter.free or since_s > throttle.MAX_PAUSE_S:
            assert left == 0


def test_one_attacker_s_many_addresses_are_one() -> None:
    near = throttle.network_of
    assert near("2001:db8:1:2::1") == near("2001:db8:1:2:ffff::9") != near("2001:db8:1:3::1")
    assert near("::ffff:192.0.2.1") == near("192.0.2.1") != near("192.0.2.2")
    assert near("nonsense") == near("") == "unknown"


@pytest.mark.parametrize(
    ("origin", "site", "ours"),
    [
        ("http://x:1", None, True),
        ("http://x:1", "same-origin", True),
        (None, "same-origin", True),
        (None, "none", True),
        (None, None, False),
        ("null", None, False),
        ("http://x:1", "cross-site", False),
        ("http://evil", None, False),
        ("http://x:1.evil", None, False),
        ("http://x:1@evil", None, False),
        ("http://evil/x:1", None, False),
        ("ftp://x:1", None, False),
        ("http://[::", None, False),
    ],
)
def test_only_pages_of_ours_are_ours(origin: str | None, site: str | None, ours: bool) -> None:
    assert origins.is_ours(origin, site, "x:1") is ours


def test_the_cookie_does_not_follow_from_its_csrf_token() -> None:
    assert origins.csrf_of("mdb_a") != origins.csrf_of("mdb_b")
    expected = hmac.new(b"mdb_a", b"madang csrf", "sha256").hexdigest()
    assert origins.csrf_of("mdb_a") == expected
