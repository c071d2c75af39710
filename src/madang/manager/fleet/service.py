"""Links to agents: who is connected, what they are told, what they say.

The newest incarnation of a node wins and closes the older link. Each link has one sender (a loop,
level-triggered by the node's revision) and one receiver (the task that serves the link).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.kit.loop import Loop
from madang.manager.db import Database, Reader, micros, seconds
from madang.manager.db.events import EventFeed, add_event
from madang.manager.fleet import store
from madang.manager.fleet.types import Duties, FleetSettings, NodeRow
from madang.wire.api import Node
from madang.wire.errors import NodeUnavailable, PlatformError
from madang.wire.kernel import Hello, HostLoad, Reports
from madang.wire.link import BulkStream, ManagerEnd, StreamRequest

log = logging.getLogger(__name__)

RECENT_S: Final = 5.0
"""How long what was read of machines is believed where that harms nobody."""


class Sender(Loop):
    """Tells one agent what it shall run: everything once, then what changed."""

    period_s = 10.0

    def __init__(self, node: str, link: ManagerEnd, duties: Duties, clock: Clock) -> None:
        super().__init__(clock)
        self._node: Final = node
        self._link: Final = link
        self._duties: Final = duties
        self._sent = -1
        """Revision up to which everything was told on this link."""
        self._whole = True
        self._pruned = -1
        self._prune_at = clock.monotonic() + self.period_s

    def send_all(self) -> None:
        """Send the full desired state again."""
        self._whole = True
        self.wake()

    async def tick(self, now: float) -> None:
        whole, self._whole = self._whole, False
        try:
            desired = await self._duties.desired(self._node, None if whole else self._sent)
        except BaseException:
            self._whole |= whole
            raise
        if desired is None:
            await self._prune()
            return
        try:
            await self._link.send(desired)
        except ConnectionError:
            return  # the receiver notices and ends the link
        self._sent = desired.revision

    async def _prune(self) -> None:
        """What was told needs no row any more: a newer link begins with everything anew."""
        now = self.clock.monotonic()
        if self._sent > self._pruned and now >= self._prune_at:
            await self._duties.prune(self._node, self._sent)
            self._pruned, self._prune_at = self._sent, now + self.period_s


@dataclass(slots=True, eq=False)
class Connection:
    """One live link."""

    node: str
    incarnation: int
    link: ManagerEnd
    sender: Sender
    heard_at: float
    """Monotonic."""
    load: HostLoad | None = None
    """As the last heartbeat told."""
    streams: set[BulkStream] = field(default_factory=set)
    """Open ones; they end with the link."""


def _unavailable(node: str | None) -> NodeUnavailable:
    return NodeUnavailable(f"machine {node!r} is not connected at present.", node=node)


class FleetService:
    """See the module; ``bind`` must come before the first link."""

    def __init__(
        self, database: Database, feed: EventFeed, clock: Clock, settings: FleetSettings
    ) -> None:
        self._database: Final = database
        self._feed: Final = feed
        self._clock: Final = clock
        self._settings: Final = settings
        self._connections: Final[dict[str, Connection]] = {}
        self._duties: Duties | None = None
        self._recent: list[NodeRow] | None = None
        self._recent_at = 0.0

    def bind(self, duties: Duties) -> None:
        self._duties = duties

    async def serve(self, link: ManagerEnd) -> None:
        """Work with one agent until its link ends; the link is closed then."""
        try:
            connection = await self._welcome(link)
            if connection is not None:
                await self._listen(connection)
        except ConnectionError:
            pass
        except (PlatformError, TimeoutError) as exc:
            log.warning("an agent was not served", extra={"error": repr(exc)})
        finally:
            await link.close()

    async def _welcome(self, link: ManagerEnd) -> Connection | None:
        assert self._duties is not None
        async with asyncio.timeout(self._settings.hello_within_s):
            hello = await link.receive()
        if not isinstance(hello, Hello):
            log.warning("an agent did not say hello first", extra={"node": hello.node})
            return None
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            newest = await store.greet(tx, hello, at)
        self._recent = None
        if not newest:
            log.warning("an outdated agent was sent away", extra={"node": hello.node})
            return None
        await self._duties.adopt(hello)
        sender = Sender(hello.node, link, self._duties, self._clock)
        now = self._clock.monotonic()
        return Connection(hello.node, hello.incarnation, link, sender, now)

    async def _listen(self, connection: Connection) -> None:
        assert self._duties is not None
        node = connection.node
        if (older := self._connections.get(node)) is not None:
            await older.link.close()
        self._connections[node] = connection
        log.info("agent connected", extra={"node": node, "incarnation": connection.incarnation})
        connection.sender.start()
        try:
            await self._announce(connection)
            while True:
                message = await connection.link.receive()
                connection.heard_at = self._clock.monotonic()
                if isinstance(message, Reports):
                    connection.load = message.load or connection.load
                    if message.kernels:
                        await self._observe(node, message)
        finally:
            if self._connections.get(node) is connection:
                del self._connections[node]
            for stream in list(connection.streams):
                await stream.close()
            await connection.sender.stop()
            log.info("agent gone", extra={"node": node, "incarnation": connection.incarnation})

    async def _announce(self, connection: Connection) -> None:
        """Only now: who is woken by it finds the node online."""
        async with self._database.begin() as tx:
            await add_event(
                tx,
                at=micros(self._clock.now()),
                kind="node.connected",
                subject=connection.node,
                owner_id="",
                payload={"incarnation": connection.incarnation},
            )
        self._feed.wake()

    async def _observe(self, node: str, message: Reports) -> None:
        assert self._duties is not None
        try:
            await self._duties.observe(node, message.kernels)
        except PlatformError as exc:  # no database: the agent repeats what matters
            log.warning("reports not taken", extra={"node": node, "error": exc.text})

    def wake(self, node: str) -> None:
        """The desired state of *node* has changed."""
        if (connection := self._connections.get(node)) is not None:
            connection.sender.wake()

    def send_all(self) -> None:
        """Send everybody the full desired state again: the layers to keep have changed."""
        for connection in self._connections.values():
            connection.sender.send_all()

    def online(self) -> set[str]:
        return set(self._connections)

    def loads(self) -> dict[str, HostLoad]:
        """What is in use on each connected node, as far as it told."""
        return {name: each.load for name, each in self._connections.items() if each.load}

    @asynccontextmanager
    async def open(self, node: str | None, request: StreamRequest) -> AsyncIterator[BulkStream]:
        """A bulk stream to the agent of *node*; it ends with the link. Raises NodeUnavailable."""
        connection = self._connections.get(node or "")
        if connection is None:
            raise _unavailable(node)
        try:
            stream = await connection.link.open(request)
        except ConnectionError as exc:
            raise _unavailable(node) from exc
        connection.streams.add(stream)
        try:
            yield stream
        finally:
            connection.streams.discard(stream)
            await stream.close()

    async def disconnect_silent(self) -> None:
        """Close links that have said nothing for too long; their agents connect anew."""
        now = self._clock.monotonic()
        for connection in list(self._connections.values()):
            if now - connection.heard_at > self._settings.lost_after_s:
                log.warning("agent is silent", extra={"node": connection.node})
                await connection.link.close()

    async def mark_seen(self) -> None:
        """Write down who is connected."""
        if self._connections:
            at = micros(self._clock.now())
            async with self._database.begin() as tx:
                for node in self._connections:
                    await store.mark_seen(tx, node, at)

    async def nodes(self) -> list[NodeRow]:
        async with self._database.read() as tx:
            return await store.list_nodes(tx)

    async def recent_nodes(self, tx: Reader) -> list[NodeRow]:
        """As of a few seconds ago at most, with all that have connected since."""
        now = self._clock.monotonic()
        if self._recent is None or now - self._recent_at > RECENT_S:
            self._recent, self._recent_at = await store.list_nodes(tx), now
        return self._recent

    def view(self, row: NodeRow, *, sessions: int) -> Node:
        """As the API shows it."""
        connection = self._connections.get(row.name)
        return Node(
            name=row.name,
            status="online" if connection else "offline",
            capacity=row.capacity.capacity(),
            allocated=row.used.capacity(),
            sessions=sessions,
            seen_at=self._clock.now() if connection else seconds(row.seen_at),
            facts=from_json(dict, row.facts),
            load=connection.load if connection else None,
        )

    async def close(self) -> None:
        """End all links; agents and sessions go on."""
        for connection in list(self._connections.values()):
            await connection.link.close()
