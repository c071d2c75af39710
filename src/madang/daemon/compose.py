"""From settings to parts: which object gets which settings."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from madang.agent.build import Builds
from madang.agent.registry import registry
from madang.agent.runtime.contract import Runtime
from madang.agent.runtime.native import NativeRuntime
from madang.agent.runtime.process import ProcessRuntime
from madang.agent.service import Agent
from madang.agent.settings import AgentSettings
from madang.daemon.settings import Settings
from madang.kit.clock import Clock
from madang.manager.app import Manager, ManagerSettings
from madang.storage import BlobStore


@dataclass(frozen=True, slots=True)
class Parts:
    """Made, not opened."""

    blobs: BlobStore
    manager: Manager
    agent: Agent


def build(settings: Settings, clock: Clock) -> Parts:
    """Everything that runs in the server process."""
    state = settings.server.state
    blobs = BlobStore(os.path.join(state, "server", "blobs"))
    manager = Manager(manager_settings(settings), blobs, clock)
    runtime = make_runtime(settings, clock)
    hook = Builds.on(runtime, state, registry(os.environ), clock)
    agent = Agent(agent_settings(settings), runtime, blobs, clock, hook=hook)
    return Parts(blobs, manager, agent)


def make_runtime(settings: Settings, clock: Clock) -> Runtime:
    state = settings.server.state
    if settings.server.runtime == "process":
        return ProcessRuntime(os.path.join(state, "kernels"))
    return NativeRuntime(os.path.join(state, "run", "launcher.sock"), state, clock)


def agent_settings(settings: Settings) -> AgentSettings:
    node = settings.node
    return AgentSettings(
        node=node.name or socket.gethostname(),
        state_dir=settings.server.state,
        cpu_overcommit=node.cpu_overcommit,
        mem_reserve_bytes=node.mem_reserve_bytes,
        disk_reserve_bytes=node.disk_reserve_bytes,
    )
