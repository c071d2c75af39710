"""DNS messages, all of them hostile; and what a session's questions get."""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher.network import names, packets, rules
from madang.agent.launcher.network.names import Names
from madang.testing.patience import PATIENCE_S
from madang.wire.network import Net, NetworkMode, parse_target, show_address


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\0"


def question(name: str, kind: int = 1, number: int = 7, extra: bytes = b"") -> bytes:
    head = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, int(bool(extra)))
    return head + encoded(name) + struct.pack("!HH", kind, 1) + extra


OPTIONS = b"\0" + struct.pack("!HHIH", 41, 4096, 0, 0)


# -- messages ------------------------------------------------------------------------------------


def test_a_question_is_read_in_lower_case() -> None:
    found = packets.read_question(question("Good.EXAMPLE"))

    assert (found.number, found.name, found.kind, found.room) == (7, "good.example", 1, 512)
    assert packets.read_question(question("a.b", extra=OPTIONS)).room == packets.MAX_ANSWER


@given(st.binary(max_size=600))
def test_no_bytes_harm_the_reader(data: bytes) -> None:
    asked = packets.read_question(question("a.b"))
    for read in (packets.read_question, lambda data: packets.read_answer(data, asked, 7)):
        try:
            read(data)
        except ValueError:
            continue


@given(st.binary(max_size=120))
def test_no_bytes_after_a_fitting_head_harm_the_reader(data: bytes) -> None:
    asked = packets.read_question(question("a.b"))
    head = struct.pack("!HHHHHH", 7, 0x8180, 1, 3, 0, 0) + asked.plain
    try:
        found = packets.read_answer(head + data, asked, 7)
    except ValueError:
        return
    assert len(packets.answer(found, asked, 512)) <= 512


def test_a_name_that_points_at_itself_ends() -> None:
    with pytest.raises(ValueError, match="without an end"):
        packets.read_question(question("a.b")[:12] + b"\xc0\x0c\0\1\0\1")


def test_a_dot_inside_of_a_label_is_no_dot() -> None:
    """``evil.good`` as one label is not below ``good``."""
    raw = question("x.y")[:12] + b"\x09evil.good\x07example\0\0\1\0\1"
    assert packets.read_question(raw).name == "evil?good.example"


def record(owner: bytes, kind: int, value: bytes, seconds: int = 30) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, seconds, len(value)) + value


def answer_to(asked: packets.Question, *records: bytes, number: int = 9) -> bytes:
    head = struct.pack("!HHHHHH", number, 0x8180, 1, len(records), 0, 0)
    return head + asked.plain + b"".join(records)


SAME = b"\xc0\x0c"
ADDRESS = socket.inet_aton("203.0.113.9")


def test_addresses_count_for_the_name_and_its_aliases_only() -> None:
    asked = packets.read_question(question("a.b"))
    told = answer_to(
        asked,
        record(encoded("other.org"), 1, socket.inet_aton("198.51.100.1")),
        record(SAME, 5, encoded("c.d")),
        record(encoded("c.d"), 1, ADDRESS),
        record(encoded("e.f"), 1, socket.inet_aton("198.51.100.2")),
    )

    found = packets.read_answer(told, asked, 9)

    assert [(show_address(a), s) for a, s in found.addresses] == [("203.0.113.9", 30)]


@pytest.mark.parametrize("wrong", ["number", "question", "direction"])
def test_an_answer_to_something_else_is_none(wrong: str) -> None:
    asked = packets.read_question(question("a.b"))
    other = packets.read_question(question("a.c"))
    told = answer_to(other if wrong == "question" else asked, record(SAME, 1, ADDRESS))
    if wrong == "direction":
        told = told[:2] + b"\x01\x00" + told[4:]
    with pytest.raises(ValueError, match="answer"):
        packets.read_answer(told, asked, 8 if wrong == "number" else 9)


def test_an_answer_without_room_is_cut_and_the_asker_told() -> None:
    asked = packets.read_question(question("a.b"))
    told = answer_to(asked, *[record(SAME, 1, ADDRESS)] * 60)
    found = packets.read_answer(told, asked, 9)

    cut = packets.answer(found, asked, 512)

    assert struct.unpack_from("!HHHH", cut) == (7, 0x8180 | 0x0200, 1, 0)
    assert len(packets.answer(found, asked, packets.MAX_TCP)) > 900


Serve = Callable[..., "Service"]


# -- answers -------------------------------------------------------------------------------------


@dataclass
class Service:
    """Names between a session's side and a resolver, all in this process."""

    names: Names
    selector: selectors.BaseSelector
    asker: socket.socket
    resolvers: list[socket.socket]
    learnt: list[tuple[tuple[int, int], list[str], int]] = field(default_factory=list)

    def turn(self) -> None:
        for key, events in self.selector.select(1.0):
            key.data(events)
        self.names.keep_time()

    def ask(self, name: str, kind: int = 1) -> None:
        self.asker.send(question(name, kind))
        self.turn()

    def close(self) -> None:
        links = [key.fileobj for key in self.selector.get_map().values()]
        for link in (self.asker, *self.resolvers, *links):
            assert isinstance(link, socket.socket)
            link.close()
        self.selector.close()

    def code(self) -> int:
        """Of the answer that came."""
        return int.from_bytes(self.asker.recv(4096)[2:4]) & 0xF


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def make(mode: NetworkMode, *targets: str, silent: int = 0) -> Service:
            found = service(mode, *targets, silent=silent)
            stack.callback(found.close)
            return found

        yield make


def service(mode: NetworkMode, *targets: str, silent: int) -> Service:
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    plain.bind(("127.0.0.1", 0))
    stream = socket.create_server(("127.0.0.1", 0))
    selector = selectors.DefaultSelector()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(silent + 1)]
    for ours, _ in pairs:
        ours.setblocking(False)
    learnt: list[tuple[tuple[int, int], list[str], int]] = []

    def learn(ports: tuple[int, int], addresses: Sequence[int], seconds: int) -> None:
        learnt.append((ports, [show_address(a) for a in addresses], seconds))

    made = Names(
        mode=mode,
        targets=[parse_target(text) for text in targets],
        forbidden=[*rules.ALWAYS_FORBIDDEN, Net.parse("10.0.0.0/8")],
        learn=learn,
        resolvers=[[ours] for ours, _ in pairs],
        listeners=(plain, stream),
        selector=selector,
    )
    asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect(plain.getsockname())
    asker.settimeout(PATIENCE_S)
    return Service(made, selector, asker, [theirs for _, theirs in pairs], learnt)


def reply(found: Service, *addresses: str, resolver: int = 0, seconds: int = 30) -> None:
    data = found.resolvers[resolver].recv(4096)
    number = int.from_bytes(data[:2])
    asked = packets.read_question(data)
    records = [record(SAME, 1, socket.inet_aton(a), seconds) for a in addresses]
    found.resolvers[resolver].send(answer_to(asked, *records, number=number))
    found.turn()


ALLOW, FULL = NetworkMode.ALLOW, NetworkMode.FULL


def test_the_way_is_open_before_the_answer_comes(serve: Serve) -> None:
    found = serve(ALLOW, "a.b:443", "*.b:80", "c.d")
    found.ask("a.b")

    reply(found, "203.0.113.9", "203.0.113.8")

    assert sorted(found.learnt) == [
        ((80, 80), ["203.0.113.8", "203.0.113.9"], 90),
        ((443, 443), ["203.0.113.8", "203.0.113.9"], 90),
    ]
    assert found.code() == packets.NO_ERROR


def test_a_forbidden_address_is_never_learnt(serve: Serve) -> None:
    found = serve(ALLOW, "a.b")
    found.ask("a.b")

    reply(found, "10.1.2.3", "127.0.0.1", "169.254.169.254", "203.0.113.9", seconds=10**8)

    assert found.learnt == [((1, 65535), ["203.0.113.9"], 3600)]


def test_no_resolver_hears_of_a_name_that_is_not_allowed(serve: Serve) -> None:
    found = serve(ALLOW, "a.b")
    found.resolvers[0].setblocking(False)
    for name in ("b", "x.a.b", "a.b.c", "secret.evil.org"):
        found.ask(name)
        assert found.code() == packets.NO_SUCH_NAME
    with pytest.raises(BlockingIOError):
        found.resolvers[0].recv(10)
    assert found.names.refused_count == 4 and found.names.refused["x.a.b"] == 1


def test_many_refused_names_take_no_room(serve: Serve) -> None:
    found = serve(ALLOW, "a.b")
    for number in range(300):
        found.ask(f"n{number}.evil.org")
    assert found.names.refused_count == 300
    assert len(found.names.refused) == 64


def test_there_is_no_ipv6_to_be_found(serve: Serve) -> None:
    found = serve(FULL)
    found.ask("a.b", kind=28)
    assert found.code() == packets.NO_ERROR


def test_a_full_network_learns_nothing(serve: Serve) -> None:
    found = serve(FULL)
    found.ask("a.b")
    reply(found, "203.0.113.9")
    assert found.code() == packets.NO_ERROR and found.learnt == []


def test_a_silent_resolver_is_passed_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    found = serve(ALLOW, "a.b", silent=1)
    found.ask("a.b")
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    found.names.keep_time()

    reply(found, "203.0.113.9", resolver=1)

    assert found.code() == packets.NO_ERROR


def test_a_question_that_nobody_answers_fails_in_the_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    found = serve(ALLOW, "a.b")
    found.ask("a.b")
    for step in range(1, 5):
        monkeypatch.setattr(time, "monotonic", lambda step=step: now + 60 * step)
        found.names.keep_time()
    assert found.code() == packets.SERVER_FAILED and not found.names.busy


def test_an_answer_with_another_number_is_not_believed(serve: Serve) -> None:
    found = serve(ALLOW, "a.b")
    found.ask("a.b")
    data = found.resolvers[0].recv(4096)
    asked = packets.read_question(data)
    number = int.from_bytes(data[:2]) ^ 1
    found.resolvers[0].send(answer_to(asked, record(SAME, 1, ADDRESS), number=number))
    found.turn()
    assert found.learnt == [] and found.names.busy


def test_resolvers_of_the_machine_are_those_of_its_file(tmp_path: Path) -> None:
    path = f"{tmp_path}/resolv.conf"
    with open(path, "w") as file:
        file.write("# x\nnameserver 192.0.2.1\nsearch a\nnameserver\nnameserver ::1\n" * 2)
    assert names.machine_resolvers(path) == ["192.0.2.1", "::1", "192.0.2.1"]
    assert names.machine_resolvers(f"{tmp_path}/none") == []
