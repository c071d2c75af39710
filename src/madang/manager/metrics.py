"""``/metrics`` in Prometheus' text format, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from madang.manager.fleet.types import NodeRow
from madang.manager.policy.types import CountRow
from madang.wire.api import Event
from madang.wire.kernel import HostLoad, WarmLoad

_LATENCY: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """Counters fed as things happen; gauges filled when somebody looks."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry()
        self.requests: Final = Histogram(
            "madang_http_request_seconds",
            "Time of an HTTP request, streams to their end.",
            ("method", "path", "status"),
            buckets=_LATENCY,
            registry=self.registry,
        )
        self.moves: Final = Counter(
            "madang_session_moves",
            "Moves of sessions.",
            ("target", "result"),
            registry=self.registry,
        )
        self.sessions: Final = Gauge(
            "madang_sessions", "Sessions by status.", ("status",), registry=self.registry
        )
        self.capacity: Final = Gauge(
            "madang_node_capacity", "What a node has.", ("node", "slot"), registry=self.registry
        )
        self.allocated: Final = Gauge(
            "madang_node_allocated", "What is allocated.", ("node", "slot"), registry=self.registry
        )
        self.in_use: Final = Gauge(
            "madang_node_in_use",
            "What is in use on the whole machine, by anybody.",
            ("node", "slot"),
            registry=self.registry,
        )
        self.warm_memory: Final = self._by_node(
            "madang_warm_memory_bytes", "What interpreters kept for warm starts use."
        )
        self.warm_budget: Final = self._by_node(
            "madang_warm_budget_bytes", "The most that they may use."
        )
        self.warm_interpreters: Final = self._by_node(
            "madang_warm_interpreters", "Interpreters kept for warm starts."
        )
        self.warm_starts: Final = self._by_node(
            "madang_warm_starts_total", "Warm starts since the node's launcher began."
        )
        self.online: Final = Gauge(
            "madang_node_online", "1 while its agent is linked.", ("node",), registry=self.registry
        )

        self.refused: Final = Gauge(
            "madang_policy_refusals",
            "What the rules of the policies in force have refused while sessions ran.",
            ("policy", "version", "line"),
            registry=self.registry,
        )

    def _by_node(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("node",), registry=self.registry)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        self.requests.labels(method, path, str(status)).observe(seconds)

    def event(self, event: Event) -> None:
        if event.kind == "session.moved":
            result = event.payload.get("result") or ""
            self.moves.labels(event.payload["target"], result).inc()

    def fill(
        self,
        statuses: Mapping[str, int],
        nodes: list[NodeRow],
        online: set[str],
        loads: Mapping[str, HostLoad],
    ) -> None:
        shown = (self.sessions, self.capacity, self.allocated, self.in_use, self.online)
        warm = (self.warm_memory, self.warm_budget, self.warm_interpreters, self.warm_starts)
        for gauge in (*shown, *warm):
            gauge.clear()
        for status, count in statuses.items():
            self.sessions.labels(status).set(count)
        for node in nodes:
            self.online.labels(node.name).set(node.name in online)
            if load := loads.get(node.name):
                self.in_use.labels(node.name, "cpu").set(load.cpu)
                self.in_use.labels(node.name, "mem_bytes").set(load.mem_bytes)
                self._fill_warm(node.name, load.warm)
            for gauge, slots in ((self.capacity, node.capacity), (self.allocated, node.used)):
                gauge.labels(node.name, "cpu").set(slots.cpu_milli / 1000)
                gauge.labels(node.name, "mem_bytes").set(slots.mem_bytes)
                gauge.labels(node.name, "disk_bytes").set(slots.disk_bytes)
                gauge.labels(node.name, "pids").set(slots.pids)

    def _fill_warm(self, node: str, warm: WarmLoad | None) -> None:
        if warm is not None:
            self.warm_memory.labels(node).set(warm.used_bytes)
            self.warm_budget.labels(node).set(warm.budget_bytes)
            self.warm_interpreters.labels(node).set(warm.interpreters)
            self.warm_starts.labels(node).set(warm.starts)

    def fill_policies(self, counts: Iterable[CountRow]) -> None:
        self.refused.clear()
        for each in counts:
            self.refused.labels(each.target, str(each.version), str(each.line)).set(each.refused)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def as_response(metrics: Metrics) -> web.Response:
    return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
