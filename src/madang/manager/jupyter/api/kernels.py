"""Kernelspecs, kernels, Jupyter's sessions, and what clients ask of a server first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import madang
from madang.manager.http import Call
from madang.manager.jupyter.api.route import Reply, body_of, route, text_of
from madang.manager.jupyter.rules import kernels as rules
from madang.manager.jupyter.rules import specs
from madang.manager.jupyter.rules.messages import utc
from madang.manager.jupyter.service.kernels import Kernels
from madang.manager.jupyter.types import Kernel
from madang.wire.errors import InvalidRequest

VERSION: Final = "2.0.0"
"""Of Jupyter Server's REST API, which this speaks."""
_ALONE: Final = "MADANG_ALONE_S"
"""Variable of a request for a kernel: seconds without a client after which its session ends."""

_Call = Call[dict[str, str], Any]


class KernelApi:
    def __init__(self, kernels: Kernels) -> None:
        self._kernels: Final = kernels

    @route("GET", "/api")
    async def jupyter_version(self, _call: _Call) -> Any:
        """Which API this is."""
        return {"version": VERSION, "madang": madang.__version__}

    @route("GET", "/api/status")
    async def jupyter_status(self, call: _Call) -> Any:
        """How many kernels there are, and when one was last active."""
        kernels = await self._kernels.list_kernels(call.caller)
        began = self._kernels.began_at
        return {
            "started": utc(began),
            "last_activity": utc(max((k.active_at for k in kernels), default=began)),
            "kernels": len(kernels),
            "connections": sum(kernel.clients for kernel in kernels),
        }

    @route("GET", "/api/me")
    async def jupyter_me(self, call: _Call) -> Any:
        """Who the caller is."""
        user = call.caller.user
        identity: dict[str, str | None] = {"username": user, "name": user, "display_name": user}
        identity |= {"initials": user[:2].upper(), "avatar_url": None, "color": None}
        return {"identity": identity, "permissions": {}}

    # Kernelspecs

    @route("GET", "/api/kernelspecs")
    async def jupyter_kernelspecs(self, call: _Call) -> Any:
        """What can be started: languages of images, in sizes."""
        found = await self._kernels.specs(call.caller)
        default = found[0].name if found else ""
        return {"default": default, "kernelspecs": {c.name: specs.model(c) for c in found}}

    @route("GET", "/api/kernelspecs/{name}")
    async def jupyter_kernelspec(self, call: _Call) -> Any:
        """One kernelspec."""
        return specs.model(await self._kernels.spec(call.caller, call.path("name")))

    # Kernels

    @route("GET", "/api/kernels")
    async def jupyter_kernels(self, call: _Call) -> Any:
        """Those that have not ended."""
        return [
            rules.kernel_model(kernel) for kernel in await self._kernels.list_kernels(call.caller)
        ]

    @route("POST", "/api/kernels", status=201)
    async def jupyter_start_kernel(self, call: _Call) -> Any:
        """A session with an interpreter."""
        body = await body_of(call)
        kernel = await self._start(call, body, text_of(body, "name") or "")
        place = f"/jupyter/{call.caller.user}/api/kernels/{kernel.id}"
        return Reply(rules.kernel_model(kernel), {"Location": place})

    @route("GET", "/api/kernels/{kernel}")
    async def jupyter_get_kernel(self, call: _Call) -> Any:
        """One kernel."""
        return rules.kernel_model(await self._kernels.get(call.caller, call.path("kernel")))

    @route("DELETE", "/api/kernels/{kernel}", status=204)
    async def jupyter_stop_kernel(self, call: _Call) -> Any:
        """Its session ends."""
        await self._kernels.stop(call.caller, call.path("kernel"))

    @route("POST", "/api/kernels/{kernel}/interrupt", status=204)
    async def jupyter_interrupt_kernel(self, call: _Call) -> Any:
        """As Ctrl-C would."""
        await self._kernels.interrupt(call.caller, call.path("kernel"))

    @route("POST", "/api/kernels/{kernel}/restart")
    async def jupyter_restart_kernel(self, call: _Call) -> Any:
        """The interpreter anew, in the same session."""
        return rules.kernel_model(await self._kernels.restart(call.caller, call.path("kernel")))

    # Jupyter's sessions: a kernel and the notebook that it is for

    @route("GET", "/api/sessions")
    async def jupyter_sessions(self, call: _Call) -> Any:
        """One for each kernel."""
        return [
            rules.session_model(kernel) for kernel in await self._kernels.list_kernels(call.caller)
        ]

    @route("POST", "/api/sessions", status=201)
    async def jupyter_start_session(self, call: _Call) -> Any:
        """The one of that path, or a new kernel for it."""
        body = await body_of(call)
        path = text_of(body, "path") or ""
        if not path:
            raise InvalidRequest("path: a session needs the path of its notebook.", field="path")
        wanted = _object(body, "kernel")
        if given := text_of(wanted, "id"):
            kernel = await self._kernels.get(call.caller, given)
            await self._kernels.rename(call.caller, kernel.id, path, text_of(body, "name"))
            return rules.session_model(await self._kernels.get(call.caller, given))
        for kernel in await self._kernels.list_kernels(call.caller):
            if kernel.path == path[: rules.MAX_LABEL] and kernel.kind == _kind(body):
                return rules.session_model(kernel)
        name = text_of(wanted, "name") or ""
        return rules.session_model(await self._start(call, body, name))

    @route("GET", "/api/sessions/{kernel}")
    async def jupyter_get_session(self, call: _Call) -> Any:
        """One of them."""
        return rules.session_model(await self._kernels.get(call.caller, call.path("kernel")))

    @route("PATCH", "/api/sessions/{kernel}")
    async def jupyter_change_session(self, call: _Call) -> Any:
        """Another path or name; another kernel takes the place of this one."""
        kernel, body = call.path("kernel"), await body_of(call)
        wanted = _object(body, "kernel")
        name, given = text_of(wanted, "name"), text_of(wanted, "id")
        now = await self._kernels.get(call.caller, kernel)
        if given and given != kernel:
            await self._kernels.rename(call.caller, given, now.path, now.title)
            return rules.session_model(await self._kernels.get(call.caller, given))
        if name and not given and name != now.spec:
            body = {"path": now.path, "name": now.title, "type": now.kind} | body
            started = await self._start(call, body, name)
            await self._kernels.stop(call.caller, kernel)
            return rules.session_model(started)
        path, title = text_of(body, "path"), text_of(body, "name")
        await self._kernels.rename(call.caller, kernel, path, title)
        return rules.session_model(await self._kernels.get(call.caller, kernel))

    @route("DELETE", "/api/sessions/{kernel}", status=204)
    async def jupyter_stop_session(self, call: _Call) -> Any:
        """Its kernel ends."""
        await self._kernels.stop(call.caller, call.path("kernel"))

    async def _start(self, call: _Call, body: dict[str, Any], name: str) -> Kernel:
        env = _environment(_object(body, "env"))
        return await self._kernels.start(
            call.caller,
            name,
            path=text_of(body, "path") or "",
            title=text_of(body, "name") or "" if "kernel" in body else "",
            kind=_kind(body),
            alone_s=env.pop(_ALONE, ""),
            env=env,
        )


def _kind(body: Mapping[str, Any]) -> str:
    kind = body.get("type")
    return kind if isinstance(kind, str) and kind else "notebook"


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object.", field=name)
    return value


def _environment(given: dict[str, Any]) -> dict[str, str]:
    """Variables for the session, without what gateway clients say of their own machine."""
    for name, value in given.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"env: {name[:60]!r} must be a text.", field="env")
    return {name: value for name, value in given.items() if not name.startswith("KERNEL_")}
