"""Image builds on a node: what surrounds a build session, before it starts and after it ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from madang.wire.kernel import KernelId, KernelSpec
from madang.wire.session import Ended


class BuildHook(Protocol):
    """What the agent calls around kernels with ``spec.build``, and to clean the layers."""

    async def open(self) -> None:
        """Put our tools in place, sweep what a crash left. Before any other call."""
        ...

    async def before_start(self, kernel: KernelId, spec: KernelSpec) -> None:
        """Between ``runtime.prepare`` and ``runtime.start``; opens the registry proxy.

        Also for each build kernel that still runs after a restart of the agent. Doing it again
        changes nothing.
        """
        ...

    async def after_end(self, kernel: KernelId, spec: KernelSpec, ended: Ended) -> Ended:
        """Before the end is reported: close the proxy and take the layers over.

        Returns the end to report: a build whose layers can't be stored has failed, in words. After
        a crash it may come again for the same kernel.
        """
        ...

    async def collect(self, keep_layers: Iterable[str]) -> None:
        """Delete layers not named; the caller adds those of the kernels that it has."""
        ...

    async def close(self) -> None:
        """Close all proxies; sessions go on."""
        ...
