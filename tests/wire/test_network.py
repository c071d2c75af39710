"""What sessions may ask for: targets, rates, ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.wire import network
from madang.wire.errors import NetworkInvalid
from madang.wire.network import Net, Network, NetworkMode, format_rate, parse_rate, parse_target

ALLOW, FULL = NetworkMode.ALLOW, NetworkMode.FULL
ADDRESSES = st.integers(0, 2**32 - 1)
NETS = st.builds(
    lambda address, bits: Net(address & Net(0, bits).mask, bits), ADDRESSES, st.integers(0, 32)
)


@pytest.mark.parametrize(
    ("text", "name", "net", "ports"),
    [
        ("data.example.org:443", "data.example.org", None, (443, 443)),
        (" *.Example.ORG. ", "*.example.org", None, (1, 65535)),
        ("10.1.0.0/16:5432", "", "10.1.0.0/16", (5432, 5432)),
        ("192.0.2.7:8000-8100", "", "192.0.2.7/32", (8000, 8100)),
        ("_dns.localhost", "_dns.localhost", None, (1, 65535)),
    ],
)
def test_a_target_is_a_name_or_a_range_with_ports(
    text: str, name: str, net: str | None, ports: tuple[int, int]
) -> None:
    target = parse_target(text)

    assert (target.name, target.ports) == (name, ports)
    assert (None if target.net is None else str(target.net)) == net


@pytest.mark.parametrize(
    "text",
    "|a..b|-a|a b|*|a.*.b|::1|[::1]:80|2001:db8::/32|10.0.0.1/8|10.0.0.0/33|1.2.3|256.1.1.1|x:0|"
    "x:70000|x:9-8|x:|x:80-|a/b|http://x|x/24|1.2.3.4/|ü.example|a;b|a}b|a\nb".split("|"),
)
def test_what_is_no_target_is_said_in_words(text: str) -> None:
    with pytest.raises(NetworkInvalid):
        parse_target(text)


@given(st.text(max_size=40))
def test_no_text_becomes_a_target_that_rules_could_not_hold(text: str) -> None:
    """Whatever passes is put into the text of rules."""
    try:
        target = parse_target(text)
    except NetworkInvalid:
        return
    assert set(target.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.*")
    assert 1 <= target.ports[0] <= target.ports[1] <= 65535


@pytest.mark.parametrize(
    ("target", "name", "covered"),
    [
        ("example.org", "example.org", True),
        ("example.org", "a.example.org", False),
        ("example.org", "xexample.org", False),
        ("*.example.org", "a.example.org", True),
        ("*.example.org", "b.a.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "xexample.org", False),
        ("192.0.2.1", "192.0.2.1", False),
        ("192.0.2.1", "", False),
    ],
)
def test_a_star_covers_what_lies_below(target: str, name: str, covered: bool) -> None:
    assert parse_target(target).covers(name) is covered


@given(NETS, NETS, ADDRESSES)
def test_ranges_agree_about_what_they_hold(one: Net, other: Net, address: int) -> None:
    assert Net.parse(str(one)) == one
    if one.within(other) and address in one:
        assert address in other
    if address in one and address in other:
        assert one.overlaps(other)
    assert one.overlaps(other) == (one.base in other or other.base in one)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Network(allow=("a.b",)), "the mode is none"),
        (Network(mode=ALLOW), "no target"),
        (Network(mode=ALLOW, allow=("a.b",) * 65), "the most is 64"),
        (Network(mode=FULL, allow=("a.b",)), "the mode is full"),
        (Network(bandwidth_bits=10**6), "no network"),
        (Network(mode=FULL, bandwidth_bits=1), "not within 8kbit"),
        (Network(mode=FULL, bandwidth_bits=10**15), "not within"),
        (Network(mode=ALLOW, allow=("a b",)), "'a b' is no HOST"),
    ],
)
def test_a_network_that_makes_no_sense_is_said_in_words(asked: Network, words: str) -> None:
    with pytest.raises(NetworkInvalid, match=words):
        network.check(asked)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("100mbit", 10**8),
        ("1.5G", 15 * 10**8),
        ("64000", 64000),
        ("8kbit/s", 8000),
    ],
)
def test_a_rate_is_in_bits_per_second(text: str, bits: int) -> None:
    assert parse_rate(text) == bits
    assert parse_rate(format_rate(bits)) == bits


@pytest.mark.parametrize("text", ["", "fast", "-1m", "1e6", "10MB", "1mib", "2mbps"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(NetworkInvalid):
        parse_rate(text)


def test_a_network_is_shown_as_it_was_asked_for() -> None:
    asked = Network(mode=ALLOW, allow=("a.b:1", "10.0.0.0/8"), bandwidth_bits=10**7)
    assert str(asked) == "allow a.b:1 10.0.0.0/8 at 10mbit"
    assert str(Network(mode=FULL)) == "full" and not Network()
