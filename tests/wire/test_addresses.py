"""Rules about addresses, compiled: what the tables say is what the rules say."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from madang.wire import addresses
from madang.wire.addresses import Table, look_up, table
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import Act, Answer, NetRule
from madang.wire.policy_live import Target

CONNECT, BIND = Act.CONNECT, Act.BIND


def rule(
    *targets: str,
    act: Act = CONNECT,
    others: bool = False,
    answer: Answer = Answer.ERRNO,
    line: int = 1,
) -> NetRule:
    return NetRule(layer="site", line=line, act=act, targets=targets, others=others, answer=answer)


def made(*rules: NetRule, act: Act = CONNECT, names: addresses.Names | None = None) -> Table:
    return table(dict(enumerate(rules)), act, names or {})


PORTS = st.sampled_from(["", ":80", ":0", ":1-79", ":80-90", ":32768-60999", ":0-65535", ":65535"])
V4 = st.sampled_from(["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "127.0.0.0/8"])
V6 = st.sampled_from(["[::]/0", "[fd00::]/8", "[fd00::1]", "[::1]", "[::]/64"])
RULES = st.lists(
    st.builds(
        rule,
        st.builds(str.__add__, V4 | V6, PORTS),
        st.builds(str.__add__, V4 | V6, PORTS),
        others=st.booleans(),
        answer=st.sampled_from([Answer.LOG, Answer.ERRNO]),
    ),
    max_size=5,
)
ADDRESSES = st.sampled_from(["10.1.2.3", "10.1.2.4", "10.2.0.0", "127.0.0.1", "8.8.8.8",
                             "fd00::1", "fd00::2", "::1", "::2", "2001::"])  # fmt: skip


@given(RULES, ADDRESSES, st.sampled_from([1, 79, 80, 81, 90, 91, 32767, 32768, 61000, 65535]))
@example([rule("0.0.0.0/0:80", others=True), rule("[::]/64:80")], "::1", 80)
def test_the_tables_say_what_the_rules_say(rules: list[NetRule], address: str, port: int) -> None:
    decided = look_up(made(*rules), address, port)

    refusing = [number for number, each in enumerate(rules) if refuses(each, address, port)]
    strict = [number for number in refusing if rules[number].answer is Answer.ERRNO]
    assert decided == next(iter(strict or refusing), None)


def refuses(each: NetRule, address: str, port: int) -> bool:
    found = ipaddress.ip_address(address)
    hit = any(
        target.network is not None
        and found.version == target.network.version
        and found in target.network
        and target.low <= port <= target.high
        for target in map(Target, each.targets)
    )
    return hit is not each.others


def test_the_unspecified_address_is_this_machine() -> None:
    found = made(rule("127.0.0.0/8:80"))

    assert look_up(found, "0.0.0.0", 80) == 0
    assert look_up(found, "::", 80) == 0, "a socket bound to IPv4 would reach 127.0.0.1"
    assert look_up(found, "0.0.0.0", 81) is None
    assert look_up(made(rule("[::1]:80")), "::", 80) == 0
    assert look_up(made(rule("127.0.0.1:80", "[::1]:80", others=True)), "::", 80) is None
    assert look_up(made(rule("127.0.0.1:80", others=True)), "::", 80) == 0
    assert look_up(made(rule("0.0.0.0:80")), "127.0.0.1", 80) == 0, "that is what it means"


def test_a_bind_to_all_addresses_is_a_bind_to_each() -> None:
    denied = made(rule("127.0.0.1:80", act=BIND), act=BIND)

    assert look_up(denied, "0.0.0.0", 80) == 0
    assert look_up(denied, "::", 80) == 0, "it may be IPv4 too"
    assert look_up(denied, "127.0.0.2", 80) is None
    only = made(rule("0.0.0.0/0:8000-8999", act=BIND, others=True), act=BIND)
    assert look_up(only, "0.0.0.0", 8000) is None
    assert look_up(only, "::", 8000) == 0, "all of IPv6 was not named"
    both = made(rule("0.0.0.0/0:8000", "[::]/0:8000", act=BIND, others=True), act=BIND)
    assert look_up(both, "::", 8000) is None
    assert look_up(made(rule("10.0.0.1:80", act=BIND, others=True), act=BIND), "0.0.0.0", 80) == 0


@pytest.mark.parametrize(
    ("ports", "others", "refused"),
    [
        (":8000-8999", False, False),
        (":40000-40001", False, True),
        (":0", False, True),
        ("", False, True),
        (":8000-8999", True, True),
        (":40000-50000", True, True),
        (":32768-60999", True, False),
        (":0", True, False),
        ("", True, False),
    ],
)
def test_a_bind_to_a_port_of_the_kernels_choice(ports: str, others: bool, refused: bool) -> None:
    found = made(rule(f"0.0.0.0/0{ports}", act=BIND, others=others), act=BIND)

    assert (look_up(found, "10.0.0.1", 0) == 0) is refused


def test_names_are_their_addresses() -> None:
    names = {"db.example.org": ["10.0.0.5", "fd00::5"]}
    only = made(rule("db.example.org:443", others=True), names=names)

    assert look_up(only, "10.0.0.5", 443) is None
    assert look_up(only, "fd00::5", 443) is None
    assert look_up(only, "10.0.0.5", 444) == 0
    assert look_up(only, "10.0.0.6", 443) == 0


def test_a_name_without_addresses_allows_nothing_and_refuses_nothing() -> None:
    assert look_up(made(rule("db.example.org", others=True)), "10.0.0.5", 443) == 0
    assert look_up(made(rule("db.example.org")), "10.0.0.5", 443) is None


def test_addresses_that_are_met_by_the_same_rules_share_their_ports() -> None:
    many = rule(*(f"10.0.{n}.0/24:443" for n in range(100)))

    found = made(many)

    assert len(found.ports) == 1
    assert len(set(found.prefixes.values())) == 2


def test_no_rule_of_its_kind_makes_an_empty_table() -> None:
    assert made(rule("10.0.0.0/8", act=BIND)) == Table()


def test_too_many_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "MAX_ENTRIES", 50)
    with pytest.raises(PolicyInvalid, match=r"too large: .* more than 50 entries"):
        made(rule(*(f"10.0.{n}.0/24:{n + 1}" for n in range(100))))


def test_a_log_rule_never_hides_one_that_refuses() -> None:
    first = rule("10.0.0.0/8", answer=Answer.LOG)

    assert look_up(made(first, rule("10.1.0.0/16")), "10.1.0.1", 1) == 1
    assert look_up(made(first, rule("10.1.0.0/16")), "10.2.0.1", 1) == 0
