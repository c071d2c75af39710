"""The channel between launcher, keeper and init: whole messages, descriptors, and nonsense."""

from __future__ import annotations

import os
import socket

import pytest

from madang.agent.launcher import channel


def test_a_message_arrives_with_its_descriptors() -> None:
    ours, theirs = channel.pair()
    with ours, theirs:
        sent = channel.to_memory({"large": "x" * 100_000})
        assert channel.send(ours, {"do": "it"}, [sent])
        message, (fd,) = channel.receive(theirs)
        assert message == {"do": "it"}
        assert channel.from_memory(fd) == {"large": "x" * 100_000}
        for each in (sent, fd):
            os.close(each)


def test_the_end_of_the_peer_is_seen() -> None:
    ours, theirs = channel.pair()
    with ours:
        theirs.close()
        assert channel.receive(ours) == (None, [])
        assert not channel.send(ours, {})


@pytest.mark.parametrize(
    "data", [b"{", b"[1]", b"7", b"\xff\xfe", b"[" * 60_000], ids=lambda data: repr(data[:4])
)
def test_who_says_nonsense_is_gone_and_its_descriptors_are_closed(data: bytes) -> None:
    ours, theirs = channel.pair()
    reader, writer = os.pipe()
    with ours, theirs:
        socket.send_fds(ours, [data], [writer])
        os.close(writer)
        assert channel.receive(theirs) == (None, [])
        assert os.read(reader, 1) == b""
    os.close(reader)
