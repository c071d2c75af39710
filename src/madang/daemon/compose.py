"""From settings to parts: which object gets which settings."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Final

from madang.agent import imageregistries
from madang.agent.build import Builds
from madang.agent.registry import registry
from madang.agent.runtime.contract import Runtime
from madang.agent.runtime.native import NativeRuntime
from madang.agent.service import Agent
from madang.agent.settings import AgentSettings
from madang.daemon.settings import Settings
from madang.kit.clock import Clock
from madang.manager.app import Manager, ManagerSettings
from madang.manager.audit.types import AuditSettings
from madang.manager.identity.types import IdentitySettings
from madang.manager.image.types import ImageSettings
from madang.manager.session.types import SessionSettings
from madang.storage import BlobStore
from madang.wire.size import GIB

BUILD_CPU: Final = 2.0
BUILD_MEM_BYTES: Final = 2 * GIB


@dataclass(frozen=True, slots=True)
class Parts:
    """Made, not opened."""

    blobs: BlobStore
    manager: Manager
    agent: Agent


def build(settings: Settings, clock: Clock, registries: str = "") -> Parts:
    """Everything that runs in the server process. *registries*: text of the file of that name."""
    state = settings.server.state
    blobs = BlobStore(os.path.join(state, "server", "blobs"))
    manager = Manager(manager_settings(settings), blobs, clock)
    runtime = make_runtime(settings, clock)
    found = registry(os.environ, imageregistries.parse_file(settings.images.registries, registries))
    hook = Builds.on(runtime, state, found, clock)
    agent = Agent(agent_settings(settings), runtime, blobs, clock, hook=hook)
    return Parts(blobs, manager, agent)


def make_runtime(settings: Settings, clock: Clock) -> Runtime:
    state = settings.server.state
    if settings.server.runtime == "process":
        from madang.agent.runtime.process import ProcessRuntime  # tests alone load it

        return ProcessRuntime(os.path.join(state, "kernels"))
    return NativeRuntime(os.path.join(state, "run", "launcher.sock"), state, clock)


def manager_settings(settings: Settings) -> ManagerSettings:
    sizes, limits, retention = settings.defaults, settings.limits, settings.retention
    state = settings.server.state
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    sessions = SessionSettings(
        cpu=sizes.cpu,
        mem_bytes=min(sizes.mem_bytes, half),
        pids=sizes.pids,
        disk_bytes=sizes.disk_bytes,
        time_s=sizes.time_s,
        log_limit_bytes=limits.log_bytes,
        workspace_limit_bytes=limits.workspace_bytes,
        retention_s=retention.keep_s,
        retention_count=retention.count,
    )
    logins = settings.logins
    url = settings.database.url or f"sqlite:///{os.path.join(state, 'server', 'madang.db')}"
    return ManagerSettings(
        database_url=url,
        durable=settings.database.durable,
        state=state,
        sessions=sessions,
        audit=AuditSettings(retention_s=retention.audit_s),
        identity=IdentitySettings(
            browser_idle_s=logins.browser_idle_s,
            browser_max_s=logins.browser_s,
            login_s=logins.token_s,
            invitation_max_s=logins.invitation_s,
        ),
        secret_key_file=os.path.join(state, "server", "secret.key"),
        widen=settings.sandbox.widen,
        images=ImageSettings(
            mem_bytes=min(BUILD_MEM_BYTES, half),
            cpu=min(BUILD_CPU, os.cpu_count() or 1),
            versions=settings.images.versions,
        ),
    )


def agent_settings(settings: Settings) -> AgentSettings:
    node = settings.node
    return AgentSettings(
        node=node.name or socket.gethostname(),
        group=node.group,
        labels=node.labels,
        state_dir=settings.server.state,
        cpu_overcommit=node.cpu_overcommit,
        disk_overcommit=node.disk_overcommit,
        mem_reserve_bytes=node.mem_reserve_bytes,
        disk_reserve_bytes=node.disk_reserve_bytes,
        freeze_idle_after_s=settings.sessions.freeze_idle_after_s,
    )
