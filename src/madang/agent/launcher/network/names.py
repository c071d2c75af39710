"""Answers a session's questions for names: those that it may ask for, by the machine's resolvers.

Whatever address a resolver gives for a name that is allowed is learnt before the session hears of
it, unless no session may connect there: so a name can't be pointed at the machine itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from madang.agent.launcher.network import packets
from madang.agent.launcher.network.packets import Question
from madang.agent.launcher.network.rules import RESOLVER
from madang.wire.network import Net, NetworkMode, Target

Learn = Callable[[tuple[int, int], Sequence[int], int], None]
"""(ports, addresses, seconds)"""

MAX_RESOLVERS: Final = 3
LEAST_S: Final = 60
"""Programs use an address a while after they asked; connections that stand are never cut."""
_LONGEST_S: Final = 3600
_SOCKETS_EACH: Final = 8
_MAX_WAITING: Final = 256
_MAX_TCP: Final = 16
_TRY_S: Final = 2.0
_TRIES: Final = 4
_TCP_S: Final = 10.0
_MAX_REFUSED: Final = 64
_PASSED_ON: Final = {packets.ADDRESS, 15, 16, 33}
"""Kinds of question besides: MX, TXT, SRV. To others there is no answer; IPv6 isn't there."""


def machine_resolvers(path: str = "/etc/resolv.conf") -> list[str]:
    """Addresses that the machine itself asks."""
    found = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                found.append(words[1])
    return found[:MAX_RESOLVERS]


def connect_resolvers(addresses: Sequence[str]) -> list[list[socket.socket]]:
    """For each resolver sockets with ports of their own. In the machine's namespace."""
    found = []
    for address in addresses[:MAX_RESOLVERS]:
        with contextlib.suppress(OSError):
            found.append([_connected(address) for _ in range(_SOCKETS_EACH)])
    return found


def _connected(address: str) -> socket.socket:
    """Hears nobody but that resolver."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    link = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    link.connect((address, 53))
    return link


def listen() -> tuple[socket.socket, socket.socket]:
    """(UDP, TCP), where the session's programs ask. In the session's namespace."""
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for link in (plain, stream):
        link.bind((RESOLVER, 53))
    stream.listen(_MAX_TCP)
    return plain, stream


@dataclass(eq=False, slots=True, kw_only=True)
class _Waiting:
    """A question that a resolver was asked."""

    question: Question
    reply: Callable[[bytes], None]
    room: int
    number: int = 0
    link: socket.socket | None = None
    tries: int = 0
    deadline: float = 0.0


@dataclass(eq=False, slots=True)
class _Stream:
    link: socket.socket
    deadline: float
    data: bytearray = field(default_factory=bytearray)
    asked: bool = False


class Names:
    """Everything about the names of one session."""

    def __init__(
        self,
        *,
        mode: NetworkMode,
        targets: Sequence[Target],
        forbidden: Sequence[Net],
        learn: Learn,
        resolvers: Sequence[Sequence[socket.socket]],
        listeners: tuple[socket.socket, socket.socket],
        selector: selectors.BaseSelector,
    ) -> None:
        self._mode = mode
        self._targets = [target for target in targets if target.name]
        self._forbidden = tuple(forbidden)
        self._learn = learn
        self._resolvers = resolvers
        self._plain, self._stream = listeners
        self._selector = selector
        self._waiting: dict[tuple[int, int], _Waiting] = {}
        """(socket, number of the question) →"""
        self._streams: dict[int, _Stream] = {}
        self.refused: Counter[str] = Counter()
        self.refused_count = 0
        selector.register(self._plain, selectors.EVENT_READ, self._hear)
        selector.register(self._stream, selectors.EVENT_READ, self._accept)
        for link in (link for links in resolvers for link in links):
            selector.register(link, selectors.EVENT_READ, partial(self._hear_resolver, link))

    # -- the session -------------------------------------------------------------------------

    def _hear(self, _events: int = 0) -> None:
        with contextlib.suppress(OSError, ValueError):
            data, sender = self._plain.recvfrom(packets.MAX_TCP)
            question = packets.read_question(data)
            self._serve(question, partial(self._send, sender), question.room)

    def _send(self, to: tuple[str, int], data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._plain.sendto(data, to)

    def _serve(self, question: Question, reply: Callable[[bytes], None], room: int) -> None:
        if not self._allows(question.name):
            self._note(question.name)
            reply(packets.refuse(question, packets.NO_SUCH_NAME))
        elif question.kind not in _PASSED_ON:
            reply(packets.refuse(question, packets.NO_ERROR))
        elif not self._resolvers or len(self._waiting) >= _MAX_WAITING:
            reply(packets.refuse(question, packets.SERVER_FAILED))
        else:
            self._ask(_Waiting(question=question, reply=reply, room=room))

    def _allows(self, name: str) -> bool:
        full = self._mode is NetworkMode.FULL
        return full or any(target.covers(name) for target in self._targets)

    def _note(self, name: str) -> None:
        self.refused_count += 1
        if name in self.refused or len(self.refused) < _MAX_REFUSED:
            self.refused[name] += 1

    # -- resolvers ---------------------------------------------------------------------------

    def _ask(self, waiting: _Waiting) -> None:
        """One resolver after the other, each time by another socket and number."""
        links = self._resolvers[waiting.tries % len(self._resolvers)]
        chance = int.from_bytes(os.urandom(3))
        waiting.link, waiting.number = links[chance % len(links)], chance >> 8
        waiting.tries += 1
        waiting.deadline = time.monotonic() + _TRY_S
        key = (waiting.link.fileno(), waiting.number)
        if key in self._waiting:  # One in hundreds of thousands.
            waiting.reply(packets.refuse(waiting.question, packets.SERVER_FAILED))
            return
        self._waiting[key] = waiting
        with contextlib.suppress(OSError):  # As if it were silent.
            waiting.link.send(packets.ask(waiting.question, waiting.number))

    def _hear_resolver(self, link: socket.socket, _events: int) -> None:
        try:
            data = link.recv(packets.MAX_TCP)
        except OSError:  # Nobody listens there: the question's time runs out.
            return
        key = (link.fileno(), int.from_bytes(data[:2]))
        waiting = self._waiting.get(key)
        if waiting is None:
            return
        with contextlib.suppress(ValueError):
            found = packets.read_answer(data, waiting.question, waiting.number)
            del self._waiting[key]
            self._open(waiting.question.name, found.addresses)
            waiting.reply(packets.answer(found, waiting.question, waiting.room))

    def _open(self, name: str, addresses: Sequence[tuple[int, int]]) -> None:
        """Let the session connect to *addresses*, by the ports of the targets that name it."""
        good = [
            (address, seconds)
            for address, seconds in addresses
            if not any(address in net for net in self._forbidden)
        ]
        if self._mode is NetworkMode.FULL or not good:
            return
        seconds = min(_LONGEST_S, LEAST_S + max(seconds for _, seconds in good))
        for ports in {target.ports for target in self._targets if target.covers(name)}:
            self._learn(ports, sorted({address for address, _ in good}), seconds)

    def keep_time(self) -> None:
        """Ask again, give up, close what is slow. To be called now and then."""
        now = time.monotonic()
        for key, waiting in [item for item in self._waiting.items() if item[1].deadline <= now]:
            del self._waiting[key]
            if waiting.tries < _TRIES:
                self._ask(waiting)
            else:
                waiting.reply(packets.refuse(waiting.question, packets.SERVER_FAILED))
        for stream in [stream for stream in self._streams.values() if stream.deadline <= now]:
            self._close(stream)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._streams)

    # -- questions by TCP --------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(OSError):
            link, _ = self._stream.accept()
            if len(self._streams) >= _MAX_TCP:
                link.close()
                return
            link.setblocking(False)
            stream = _Stream(link, time.monotonic() + _TCP_S)
            self._streams[link.fileno()] = stream
            self._selector.register(link, selectors.EVENT_READ, partial(self._read, stream))

    def _read(self, stream: _Stream, _events: int) -> None:
        """One question each; then it is closed."""
        try:
            data = stream.link.recv(packets.MAX_PLAIN)
        except OSError:
            data = b""
        stream.data += data
        if not data or len(stream.data) > packets.MAX_PLAIN:
            self._close(stream)
            return
        size = int.from_bytes(stream.data[:2])
        if len(stream.data) < max(2, size + 2) or stream.asked:
            return
        stream.asked = True
        try:
            question = packets.read_question(bytes(stream.data[2 : size + 2]))
        except ValueError:
            self._close(stream)
            return
        self._serve(question, partial(self._reply, stream), packets.MAX_TCP)

    def _reply(self, stream: _Stream, data: bytes) -> None:
        with contextlib.suppress(OSError):  # It fits into the socket's buffer.
            stream.link.send(len(data).to_bytes(2) + data)
        self._close(stream)

    def _close(self, stream: _Stream) -> None:
        if self._streams.pop(stream.link.fileno(), None) is not None:
            self._selector.unregister(stream.link)
            stream.link.close()
