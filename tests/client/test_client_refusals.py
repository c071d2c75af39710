"""What a stream tells of refusals, whatever breaks on the way."""

from __future__ import annotations

from madang.client.following import Following
from madang.kit.codec import to_json
from madang.wire.api import ClientMessage, ClientOp, ServerMessage, ServerOp
from madang.wire.policy import Refusal


def told(thing: str, line: int = 3, count: int = 1) -> str:
    refusal = Refusal(
        at=1.0, layer="site", line=line, what="connect", object=thing, count=count, why="no"
    )
    return to_json(ServerMessage(op=ServerOp.REFUSED, refusal=refusal)).decode()


def test_each_refusal_comes_once_also_after_a_new_connection() -> None:
    following = Following("/v1/run", ClientMessage(op=ClientOp.RUN))
    events = [
        event
        for message in (told("10.0.0.5:1"), told("10.0.0.5:2"), told("10.0.0.5:1", count=9),
                        told("10.0.0.5:1", line=4))
        for event in following.take(message)
    ]  # fmt: skip
    assert [event.text for event in events if isinstance(event, Refusal)] == [
        "connect to 10.0.0.5:1 refused by site policy, line 3 (no)",
        "connect to 10.0.0.5:2 refused by site policy, line 3 (no)",
        "connect to 10.0.0.5:1 refused by site policy, line 4 (no)",
    ]
