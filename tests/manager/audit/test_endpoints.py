"""Every endpoint that changes something writes a record: who, from where, by which request."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
import sqlalchemy as sa

from madang.kit.link import MemoryStream
from madang.manager.audit.types import Actor
from madang.manager.http.endpoint import Endpoint
from madang.manager.identity.rules import totp
from madang.manager.identity.tables import users
from madang.manager.image import store as image_store
from madang.manager.image.types import Owner
from madang.testing.manager import SUCCESS, ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.audit import verify
from madang.wire.kernel import Assignment
from madang.wire.link import (
    ExecStarted,
    FileEntry,
    FilesWritten,
    LayerSaved,
    ListFiles,
    ReadLog,
    SaveLayer,
    SendSignal,
    StartExec,
    StatFile,
    StreamRequest,
)

ID: Final = "the-request"
HEADERS: Final = {"X-Request-Id": ID}
POLICY: Final = "version = 1\n[[deny]]\ncalls = ['ptrace']\n"

SILENT: Final = {
    ("POST", "/v1/policies/review"): "changes nothing",
    ("POST", "/v1/policies/test"): "changes nothing",
    ("POST", "/v1/policies/replay"): "changes nothing",
    ("POST", "/v1/queue/preview"): "changes nothing",
    ("POST", "/v1/queue/replay"): "changes nothing",
    ("POST", "/v1/workspaces"): "content by its hash; counts once a session is created with it",
    ("PUT", "/v1/workspaces/blobs"): "content by its hash",
    ("POST", "/jupyter/{user}/api/contents"): "always refused",
    ("POST", "/jupyter/{user}/api/kernels/{kernel}/interrupt"): "as that of an interpreter",
    ("POST", "/jupyter/{user}/api/kernels/{kernel}/restart"): "as that of an interpreter",
}


class World:
    """A server with a machine and a running session of the caller."""

    def __init__(self, box: ManagerBox, agent: ScriptedAgent) -> None:
        self.box: Final = box
        self.agent: Final = agent

    async def call(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        headers = {**HEADERS, **more.pop("headers", {})}
        return await self.box.call(method, path, body, headers=headers, **more)

    async def running(self, spec: dict[str, Any] | None = None) -> Assignment:
        session = await self.box.call("POST", "/v1/sessions", spec or {"argv": ["true"]})
        assignment = await self.agent.assigned(session["id"])
        await self.agent.running(assignment)
        await self.box.until(session["id"], "RUNNING")
        return assignment

    async def ended(self) -> Assignment:
        assignment = await self.running()
        await self.agent.ended(assignment)
        await self.box.until(assignment.kernel.session, "TERMINATED")
        return assignment

    async def talk(self, path: str, first: dict[str, Any]) -> None:
        """The first message of a WebSocket, and what answers it."""
        async with self.box.http.ws_connect(path, headers=HEADERS) as socket:
            await socket.send_json(first)
            await socket.receive(timeout=PATIENCE_S)


Act = Callable[[World], Awaitable[object]]


@dataclass(frozen=True)
class Acted:
    action: str
    do: Act
    actor: str
    key: str


ACTS: Final[dict[tuple[str, str], Acted]] = {}


def act(
    method: str, path: str, action: str, *, actor: str = "admin", key: str = "first"
) -> Callable[[Act], Act]:
    """*key*: the name of the token that *actor* comes with."""

    def keep(do: Act) -> Act:
        ACTS[method, path] = Acted(action, do, actor, key)
        return do

    return keep


@act("POST", "/v1/sessions", "session.created")
async def create(world: World) -> None:
    await world.call("POST", "/v1/sessions", {"argv": ["sh", "-c", "echo swordfish"]})


@act("GET", "/v1/run", "session.created")
async def run(world: World) -> None:
    await world.talk("/v1/run", {"op": "run", "spec": {"argv": ["true"]}})


@act("GET", "/v1/sessions/{ref}/attach", "session.attached")
async def attach(world: World) -> None:
    session = (await world.running()).kernel.session
    await world.talk(f"/v1/sessions/{session}/attach", {"op": "attach"})


@act("GET", "/v1/sessions/{ref}/exec", "session.exec_started")
async def start_exec(world: World) -> None:
    session = (await world.running()).kernel.session
    spec = {"argv": ["/bin/psql", "--password=swordfish"]}
    await world.talk(f"/v1/sessions/{session}/exec", {"op": "exec", "exec": spec})


ONE: Final = "/v1/sessions/{ref}/interpreters/{interpreter}"


async def with_interpreter(world: World) -> str:
    """Path of an interpreter of a session; its program says nothing and ends by a signal."""
    session = (await world.running()).kernel.session
    signalled = asyncio.Event()

    async def starts(request: StreamRequest, stream: MemoryStream) -> None:
        if isinstance(request, StartExec):
            signalled.clear()
            await stream.send(ExecStarted(exec_id="x1"))
        elif isinstance(request, SendSignal):
            signalled.set()
        elif isinstance(request, ReadLog):
            await signalled.wait()
            await stream.send(SUCCESS)
        else:
            await world.agent._serve(request, stream)

    world.agent.serve = starts
    made = await world.box.call("POST", f"/v1/sessions/{session}/interpreters", {})
    return f"/v1/sessions/{session}/interpreters/{made['id']}"


@act("POST", "/v1/sessions/{ref}/interpreters", "session.exec_started")
async def start_interpreter(world: World) -> None:
    session = (await world.running()).kernel.session
    body = {"env": {"PASSWORD": "swordfish"}}
    await world.call("POST", f"/v1/sessions/{session}/interpreters", body, status=404)


@act("DELETE", ONE, "session.attached")
async def stop_interpreter(world: World) -> None:
    await world.call("DELETE", await with_interpreter(world))


@act("POST", ONE + "/restart", "session.exec_started")
async def restart_interpreter(world: World) -> None:
    await world.call("POST", await with_interpreter(world) + "/restart")


@act("POST", ONE + "/interrupt", "session.attached")
async def interrupt_interpreter(world: World) -> None:
    await world.call("POST", await with_interpreter(world) + "/interrupt")


@act("POST", ONE + "/cells", "session.attached")
async def execute_cell(world: World) -> None:
    body = {"code": "login('swordfish')"}
    await world.call("POST", await with_interpreter(world) + "/cells", body)


@act("POST", ONE + "/input", "session.attached")
async def answer_input(world: World) -> None:
    path = await with_interpreter(world) + "/input"
    await world.call("POST", path, {"text": "swordfish"}, status=409)


@act("POST", ONE + "/complete", "session.attached")
async def complete_code(world: World) -> None:
    path = await with_interpreter(world) + "/complete"
    await world.call("POST", path, {"code": "swordfish", "cursor": 99}, status=400)


@act("POST", ONE + "/inspect", "session.attached")
async def inspect_code(world: World) -> None:
    path = await with_interpreter(world) + "/inspect"
    await world.call("POST", path, {"code": "swordfish", "cursor": 99}, status=400)


@act("GET", ONE + "/channel", "session.attached")
async def open_channel(world: World) -> None:
    await world.talk(await with_interpreter(world) + "/channel", {"op": "interrupt", "reply": "r"})


@act("POST", "/v1/sessions/{ref}/stop", "session.stopped")
async def stop(world: World) -> None:
    session = (await world.running()).kernel.session
    await world.call("POST", f"/v1/sessions/{session}/stop", {})


@act("POST", "/v1/sessions/{ref}/freeze", "session.frozen")
async def freeze(world: World) -> None:
    assignment = await world.running()
    session = assignment.kernel.session
    call = asyncio.create_task(world.call("POST", f"/v1/sessions/{session}/freeze"))
    await world.agent.until(lambda: world.agent.wanted[assignment.kernel].frozen)
    told = world.agent.wanted[assignment.kernel]
    await world.agent.running(told, frozen_since=5.0, freeze_revision=told.freeze_revision)
    await call


@act("POST", "/v1/sessions/{ref}/thaw", "session.thawed")
async def thaw(world: World) -> None:
    assignment = await world.running()
    before = assignment.freeze_revision
    session = assignment.kernel.session
    call = asyncio.create_task(world.call("POST", f"/v1/sessions/{session}/thaw"))
    wanted = world.agent.wanted
    await world.agent.until(lambda: wanted[assignment.kernel].freeze_revision > before)
    told = wanted[assignment.kernel]
    await world.agent.running(told, freeze_revision=told.freeze_revision)
    await call


@act("POST", "/v1/sessions/{ref}/signal", "session.signalled")
async def signal(world: World) -> None:
    session = (await world.running()).kernel.session
    await world.call("POST", f"/v1/sessions/{session}/signal", {"signal": 10})


@act("DELETE", "/v1/sessions/{ref}", "session.removed")
async def remove(world: World) -> None:
    session = (await world.ended()).kernel.session
    await world.call("DELETE", f"/v1/sessions/{session}")


async def _takes_files(request: StreamRequest, stream: Any) -> None:
    await stream.send(FilesWritten(files=1, bytes=1))


@act("PUT", "/v1/sessions/{ref}/file", "session.files_written")
async def put_file(world: World) -> None:
    session = (await world.running()).kernel.session
    world.agent.serve = _takes_files
    await world.call("PUT", f"/v1/sessions/{session}/file?path=/work/a&mode=420", data=b"x")


@act("PUT", "/v1/sessions/{ref}/archive", "session.files_written")
async def put_archive(world: World) -> None:
    session = (await world.running()).kernel.session
    world.agent.serve = _takes_files
    await world.call("PUT", f"/v1/sessions/{session}/archive?path=/work", data=b"x")


@act("PUT", "/v1/sessions/{ref}/policy", "policy.applied")
async def set_session_policy(world: World) -> None:
    session = await world.box.call("POST", "/v1/sessions", {"argv": ["a"], "size": {"cpu": 4}})
    await world.call("PUT", f"/v1/sessions/{session['id']}/policy", {"text": POLICY})


@act("PUT", "/v1/policies/{target}", "policy.applied")
async def apply_policy(world: World) -> None:
    await world.call("PUT", "/v1/policies/site", {"text": POLICY, "note": "no debuggers"})


@act("POST", "/v1/images", "image.build_started")
async def build(world: World) -> None:
    secret = "tool @ https://swordfish@example.org/tool.whl"
    await world.call("POST", "/v1/images", {"name": "lab", "requirements": ["rich", secret]})


@act("DELETE", "/v1/images/{name}", "image.removed")
async def remove_image(world: World) -> None:
    await world.box.call("POST", "/v1/images", {"name": "lab", "requirements": ["rich"]})
    (build,) = (await world.box.call("GET", "/v1/sessions"))["items"]
    await world.box.call("DELETE", f"/v1/sessions/{build['id']}?force=1")
    await world.call("DELETE", "/v1/images/lab")


async def with_images(world: World, *layers: str) -> None:
    """Versions of the admin's image ``root``, as if pulled, the last one in force."""
    manager = world.box.manager
    async with manager.database.read() as tx:
        admin = await tx.one(sa.select(users.c.id).where(users.c.name == "admin"))
    assert admin is not None
    owner = Owner(user_id=admin.id, user="admin", project_id="default")
    for layer in layers:
        last = layer == layers[-1]
        row = manager.images.new_row(
            owner,
            None,
            name="root",
            kind="root",
            status="READY" if last else "KEPT",
            digest=layer * 64,
            layers=f'[{{"digest":"{layer * 64}","name":"l","version":"1","size_bytes":1}}]',
            action="pull",
            asked='{"reference":"registry.example.org/tool:v1"}',
            refresh_us=0,
        )
        async with manager.database.begin() as tx:
            await image_store.add(tx, row)


@act("POST", "/v1/images/pull", "image.pull_started")
async def pull(world: World) -> None:
    await world.call("POST", "/v1/images/pull", {"name": "lab", "reference": "tool"})


@act("POST", "/v1/images/import", "image.import_started")
async def import_image(world: World) -> None:
    await world.call("POST", "/v1/images/import", {"name": "lab"})


JUPYTER: Final = "/jupyter/{user}/api"
KERNELS: Final = "/jupyter/admin/api/kernels"
NOTEBOOK: Final = {
    "path": "a.ipynb",
    "name": "a.ipynb",
    "type": "notebook",
    "kernel": {"name": "python"},
}


@act("POST", JUPYTER + "/kernels", "session.created")
async def start_kernel(world: World) -> None:
    await world.call("POST", KERNELS, {"name": "python"})


@act("POST", JUPYTER + "/sessions", "session.created")
async def start_notebook(world: World) -> None:
    await world.call("POST", "/jupyter/admin/api/sessions", NOTEBOOK)


@act("DELETE", JUPYTER + "/kernels/{kernel}", "session.stopped")
async def stop_kernel(world: World) -> None:
    made = await world.box.call("POST", KERNELS, {})
    await world.call("DELETE", f"{KERNELS}/{made['id']}")


@act("DELETE", JUPYTER + "/sessions/{kernel}", "session.stopped")
async def stop_notebook(world: World) -> None:
    made = await world.box.call("POST", KERNELS, {})
    await world.call("DELETE", f"/jupyter/admin/api/sessions/{made['id']}")


@act("PATCH", JUPYTER + "/sessions/{kernel}", "session.created")
async def change_kernel(world: World) -> None:
    made = await world.box.call("POST", "/jupyter/admin/api/sessions", NOTEBOOK)
    await world.box.call("PUT", "/v1/presets/small", {"size": {"cpu": 1}})
    body = {"kernel": {"name": "python.small"}}
    await world.call("PATCH", f"/jupyter/admin/api/sessions/{made['id']}", body)


async def _has_files(request: StreamRequest, stream: MemoryStream) -> None:
    if isinstance(request, StatFile):
        kind = "dir" if request.path == "/work" else "file"
        found = FileEntry(path="a", kind=kind, size_bytes=1, mode=0o644, modified_at=1.0)
        await stream.send(found)
    elif not isinstance(request, ListFiles):
        await stream.send(FilesWritten(files=1, bytes=1))


async def with_files(world: World) -> str:
    """Where Jupyter finds a session's."""
    session = await world.box.call("GET", f"/v1/sessions/{(await world.running()).kernel.session}")
    world.agent.serve = _has_files
    return f"/jupyter/admin/api/contents/{session['name']}"


@act("PUT", JUPYTER + "/contents/{path:.*}", "session.files_written")
async def save_file(world: World) -> None:
    body = {"type": "file", "format": "text", "content": "x"}
    await world.call("PUT", await with_files(world) + "/a", body)


@act("POST", JUPYTER + "/contents/{path:.*}", "session.files_written")
async def make_file(world: World) -> None:
    await world.call("POST", await with_files(world), {"type": "file"})


@act("PATCH", JUPYTER + "/contents/{path:.*}", "session.files_written")
async def move_file(world: World) -> None:
    path = await with_files(world)
    target = path.rpartition("/")[2] + "/b"
    await world.call("PATCH", path + "/a", {"path": target})


@act("DELETE", JUPYTER + "/contents/{path:.*}", "session.files_written")
async def remove_file(world: World) -> None:
    await world.call("DELETE", await with_files(world) + "/a")


@act("POST", "/v1/images/recipes", "image.recipe_started")
async def build_recipe(world: World) -> None:
    recipe = 'base = "debian:bookworm"\ndebian = ["jq"]\n'
    await world.call("POST", "/v1/images/recipes", {"name": "lab", "recipe": recipe})


async def _saves_layer(request: StreamRequest, stream: MemoryStream) -> None:
    if isinstance(request, SaveLayer):
        await stream.send(LayerSaved(digest="c" * 64, size_bytes=1))


@act("POST", "/v1/sessions/{ref}/commit", "image.commit_started")
async def commit(world: World) -> None:
    await with_images(world, "a")
    spec = {"argv": ["true"], "image": "root", "root": "writable"}
    session = (await world.running(spec)).kernel.session
    world.agent.serve = _saves_layer
    await world.call("POST", f"/v1/sessions/{session}/commit", {"name": "lab"})


@act("POST", "/v1/images/check", "session.created", key="")
async def check_images(world: World) -> None:
    await with_images(world, "a")
    await world.call("POST", "/v1/images/check")


@act("POST", "/v1/images/prune", "image.pruned")
async def prune(world: World) -> None:
    await with_images(world, "a", "b")
    await world.call("POST", "/v1/images/prune")


@act("POST", "/v1/images/{name}/push", "image.pushed")
async def push(world: World) -> None:
    await with_images(world, "a")
    await world.call("POST", "/v1/images/root/push", {"reference": "registry.example.org/x"})


@act("POST", "/v1/images/{name}/export", "image.exported")
async def export(world: World) -> None:
    await with_images(world, "a")
    await world.call("POST", "/v1/images/root/export")


@act("POST", "/v1/images/{name}/tag", "image.tagged")
async def tag(world: World) -> None:
    await with_images(world, "a")
    await world.call("POST", "/v1/images/root/tag", {"target": "stable"})


@act("POST", "/v1/images/{name}/rollback", "image.rolled_back")
async def roll_back(world: World) -> None:
    await with_images(world, "a", "b")
    await world.call("POST", "/v1/images/root/rollback", {})


@act("POST", "/v1/images/{name}/follow", "image.followed")
async def follow(world: World) -> None:
    await with_images(world, "a")
    await world.call("POST", "/v1/images/root/follow", {"refresh_s": 3600})


@act("POST", "/v1/usage/intervals/{id}/correct", "usage.corrected")
async def correct(world: World) -> None:
    session = (await world.ended()).kernel.session
    await world.call("POST", f"/v1/usage/intervals/{session}.1/correct", {"reason": "free"})


@act("PUT", "/v1/groups/{name}", "group.created")
async def add_group(world: World) -> None:
    await world.call("PUT", "/v1/groups/big", {"text": 'order = "fair"'})


@act("DELETE", "/v1/groups/{name}", "group.removed")
async def remove_group(world: World) -> None:
    await world.box.call("PUT", "/v1/groups/big", {"text": ""})
    await world.call("DELETE", "/v1/groups/big")


@act("PATCH", "/v1/nodes/{name}", "node.moved")
async def move_node(world: World) -> None:
    await world.box.call("PUT", "/v1/groups/big", {"text": ""})
    await world.call("PATCH", "/v1/nodes/n1", {"group": "big"})


RESERVATION: Final = {"name": "course", "starts_at": 4e9, "ends_at": 4.00001e9}


@act("POST", "/v1/reservations", "reservation.created")
async def reserve(world: World) -> None:
    await world.call("POST", "/v1/reservations", RESERVATION)


@act("DELETE", "/v1/reservations/{name}", "reservation.removed")
async def unreserve(world: World) -> None:
    await world.box.call("POST", "/v1/reservations", RESERVATION)
    await world.call("DELETE", "/v1/reservations/course")


LIMITS: Final = {"text": "version = 1\nsessions = 50\n[[idle]]\nkind = 'cpu'\nafter = '1h'"}


@act("PUT", "/v1/limits/{name}", "limits.applied")
async def apply_limits(world: World) -> None:
    await world.call("PUT", "/v1/limits/lab", LIMITS)


@act("DELETE", "/v1/limits/{name}", "limits.removed")
async def remove_limits(world: World) -> None:
    await world.box.call("PUT", "/v1/limits/lab", LIMITS)
    await world.call("DELETE", "/v1/limits/lab")


@act("PUT", "/v1/limits-of/{target}", "limits.assigned")
async def assign_limits(world: World) -> None:
    await world.box.call("PUT", "/v1/limits/lab", LIMITS)
    await world.call("PUT", "/v1/limits-of/user:*", {"name": "lab"})


@act("POST", "/v1/sessions/{ref}/protect", "session.protected")
async def protect(world: World) -> None:
    await world.box.call("PUT", "/v1/limits/lab", LIMITS)
    await world.box.call("PUT", "/v1/limits-of/user:*", {"name": "lab"})
    session = await world.box.call("POST", "/v1/sessions", {"argv": ["true"]})
    await world.call("POST", f"/v1/sessions/{session['id']}/protect", {})


@act("PUT", "/v1/presets/{name}", "preset.set")
async def set_preset(world: World) -> None:
    await world.call("PUT", "/v1/presets/tiny", {"size": {"cpu": 0.1}})


@act("DELETE", "/v1/presets/{name}", "preset.removed")
async def remove_preset(world: World) -> None:
    await world.call("DELETE", "/v1/presets/small")


@act("POST", "/v1/usage/prices", "price.set")
async def set_price(world: World) -> None:
    price = {"group": "*", "slot": "cpu", "price": "0.05", "currency": "EUR"}
    await world.call("POST", "/v1/usage/prices", price)


PASSWORD: Final = "a password for swordfish"
SECRET: Final = {"password": PASSWORD}


@act("POST", "/v1/domains", "domain.created")
async def add_domain(world: World) -> None:
    await world.call("POST", "/v1/domains", {"name": "arts"})


@act("PATCH", "/v1/domains/{domain}", "domain.disabled")
async def disable_domain(world: World) -> None:
    await world.box.call("POST", "/v1/domains", {"name": "arts"})
    await world.call("PATCH", "/v1/domains/arts", {"disabled": True})


@act("POST", "/v1/projects", "project.created")
async def add_project(world: World) -> None:
    await world.call("POST", "/v1/projects", {"name": "lab"})


@act("PATCH", "/v1/projects/{project}", "project.disabled")
async def disable_project(world: World) -> None:
    await world.box.call("POST", "/v1/projects", {"name": "lab"})
    await world.call("PATCH", "/v1/projects/lab", {"disabled": True})


@act("PUT", "/v1/projects/{project}/members/{user}", "project.joined")
async def add_member(world: World) -> None:
    await world.box.new_user("ann")
    await world.box.call("POST", "/v1/projects", {"name": "lab"})
    await world.call("PUT", "/v1/projects/lab/members/ann", {"role": "member"})


@act("DELETE", "/v1/projects/{project}/members/{user}", "project.left")
async def remove_member(world: World) -> None:
    await world.box.new_user("ann")
    await world.call("DELETE", "/v1/projects/default/members/ann")


@act("POST", "/v1/users", "user.created")
async def add_user(world: World) -> None:
    await world.call("POST", "/v1/users", {"name": "ann"})


@act("PATCH", "/v1/users/{user}", "user.changed")
async def change_user(world: World) -> None:
    await world.box.new_user("ann")
    await world.call("PATCH", "/v1/users/ann", {"role": "monitor"})


@act("POST", "/v1/invitations", "invitation.created")
async def invite(world: World) -> None:
    await world.call("POST", "/v1/invitations", {})


@act("DELETE", "/v1/invitations/{invitation}", "invitation.withdrawn")
async def withdraw_invitation(world: World) -> None:
    made = await world.box.call("POST", "/v1/invitations", {})
    await world.call("DELETE", f"/v1/invitations/{made['invitation']['id']}")


@act("POST", "/v1/invitations/accept", "login.succeeded", actor="ann", key="laptop")
async def accept_invitation(world: World) -> None:
    made = await world.box.call("POST", "/v1/invitations", {})
    body = {"code": made["code"], "user": "ann", "token": "laptop", **SECRET}
    await world.call("POST", "/v1/invitations/accept", body, headers={"Authorization": ""})


@act("PUT", "/v1/account/password", "user.password_changed")
async def change_password(world: World) -> None:
    await world.call("PUT", "/v1/account/password", {"new": PASSWORD})


@act("POST", "/v1/login", "login.succeeded", key="laptop")
async def login(world: World) -> None:
    await world.box.call("PUT", "/v1/account/password", {"new": PASSWORD})
    body = {"user": "admin", "token": "laptop", **SECRET}
    await world.call("POST", "/v1/login", body, headers={"Authorization": ""})


@act("POST", "/v1/logout", "token.revoked", key="other")
async def logout(world: World) -> None:
    made = await world.box.call("POST", "/v1/tokens", {"name": "other"})
    other = {"Authorization": f"Bearer {made['secret']}"}
    await world.call("POST", "/v1/logout", headers=other)


@act("POST", "/v1/tokens", "token.created")
async def add_token(world: World) -> None:
    await world.call("POST", "/v1/tokens", {"name": "other"})


@act("DELETE", "/v1/tokens/{token}", "token.revoked")
async def revoke_token(world: World) -> None:
    made = await world.box.call("POST", "/v1/tokens", {"name": "other"})
    await world.call("DELETE", f"/v1/tokens/{made['token']['id']}")


async def _start_totp(world: World) -> Any:
    await world.box.call("PUT", "/v1/account/password", {"new": PASSWORD})
    return await world.call("POST", "/v1/account/totp", SECRET)


async def _confirm_totp(world: World) -> None:
    secret = base64.b32decode((await _start_totp(world))["secret"])
    code = totp.code_at(secret, totp.step_of(time.time()))
    await world.call("PUT", "/v1/account/totp", {"otp": code})


act("POST", "/v1/account/totp", "user.totp_started")(_start_totp)
act("PUT", "/v1/account/totp", "user.totp_on")(_confirm_totp)


@act("POST", "/v1/account/totp/off", "user.totp_off")
async def stop_totp(world: World) -> None:
    await _confirm_totp(world)
    await world.call("POST", "/v1/account/totp/off", SECRET)


def declared(box: ManagerBox) -> dict[tuple[str, str], Endpoint]:
    found: dict[tuple[str, str], Endpoint] = {}
    for route in box.manager.web_app().router.routes():
        for cell in route.handler.__closure__ or ():
            if isinstance(cell.cell_contents, Endpoint):
                found[cell.cell_contents.method, cell.cell_contents.path] = cell.cell_contents
    return found


async def test_no_endpoint_that_changes_something_is_forgotten(box: ManagerBox) -> None:
    """Add a new one to ACTS, or to SILENT with the reason."""
    found = declared(box)
    assert len(found) > 30
    changing = {key for key, each in found.items() if key[0] != "GET" or each.websocket}

    assert changing == ACTS.keys() | SILENT.keys()


@pytest.mark.parametrize(("method", "path"), ACTS)
async def test_a_change_is_written_down(box: ManagerBox, method: str, path: str) -> None:
    acted = ACTS[method, path]
    action = acted.action
    world = World(box, await box.add_agent())

    await acted.do(world)

    page = await box.call("GET", f"/v1/audit?action={action}")
    found = [each for each in page["items"] if each["request_id"] == ID]
    assert [each["action"] for each in found] == [action]
    (record,) = found
    by = (record["actor"], record["key"], record["source"])
    assert by == (acted.actor, acted.key, "127.0.0.1")
    kind = action.partition(".")[0]
    assert record["kind"] == {"login": "user"}.get(kind, kind)
    assert record["id"]
    assert record["name"]
    async with box.http.get("/v1/audit/export") as response:
        data = await response.read()
    assert b"swordfish" not in data
    assert verify(data.splitlines(keepends=True)).problem == ""


async def test_a_dry_run_a_refusal_and_a_repeated_call_leave_no_record(box: ManagerBox) -> None:
    await box.call("POST", "/v1/sessions?dry_run=1", {"argv": ["true"]})
    await box.call("POST", "/v1/sessions", {"argv": ["true"], "image": "no"}, status=404)
    for _ in range(2):
        key = {"Idempotency-Key": "k"}
        await box.call("POST", "/v1/sessions", {"argv": ["true"]}, headers=key)
    for _ in range(2):
        await box.call("PUT", "/v1/policies/site", {"text": POLICY})

    actions = [each["action"] for each in (await box.call("GET", "/v1/audit"))["items"]]
    assert actions == ["policy.applied", "session.created", "token.created"]


async def test_who_reads_what_is_somebody_else_s_is_written_down(box: ManagerBox) -> None:
    agent = await box.add_agent()
    ann = await box.new_user("ann")
    session = await box.call("POST", "/v1/sessions", {"argv": ["true"]}, headers=ann)
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment)
    await box.until(session["id"], "RUNNING")

    await box.call("GET", f"/v1/sessions/{session['id']}/logs", headers=ann)
    await box.call("GET", f"/v1/sessions/{session['id']}/logs")

    (record,) = (await box.call("GET", "/v1/audit?action=session.read"))["items"]
    assert (record["actor"], record["after"]) == ("admin", {"output": True, "owner": "ann"})


async def test_only_administrators_and_monitors_read_the_log(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    for path in ("/v1/audit", "/v1/audit/head", "/v1/audit/export"):
        await box.call("GET", path, headers=ann, status=403)
        async with box.http.get(path) as response:
            assert response.status == 200


async def test_an_administrator_of_a_domain_reads_what_concerns_it(box: ManagerBox) -> None:
    dora = await box.new_user("dora")
    async with box.manager.database.begin() as tx:
        await tx.execute(sa.update(users).where(users.c.name == "dora"), role="domain_admin")
    others = Actor(name="eve", domain_id="elsewhere")
    async with box.manager.database.begin() as tx:
        log = box.manager.audit
        await log.record(tx, actor=others, action="x.y", kind="x", id="1", name="theirs")
        await log.record(
            tx, actor=others, action="x.y", kind="x", id="2", name="ours", domain="default"
        )

    page = await box.call("GET", "/v1/audit?action=x", headers=dora)
    assert [each["name"] for each in page["items"]] == ["ours"]
    for path in ("/v1/audit/head", "/v1/audit/export"):
        await box.call("GET", path, headers=dora, status=403)


async def test_the_list_can_be_narrowed_and_read_page_by_page(box: ManagerBox) -> None:
    names = ("aa", "bb", "cc")
    for name in names:
        await box.call("POST", "/v1/sessions", {"argv": ["true"], "name": name})
    await box.call("POST", "/v1/sessions/bb/stop", {})

    async def names_of(query: str) -> list[str]:
        page = await box.call("GET", f"/v1/audit?{query}")
        return [f"{each['action']} {each['name']}" for each in page["items"]]

    assert await names_of("object=bb") == ["session.stopped bb", "session.created bb"]
    assert await names_of("action=session.stopped") == ["session.stopped bb"]
    assert len(await names_of("actor=admin&kind=session")) == 4
    assert await names_of("actor=nobody") == []
    assert await names_of("since=99999999999") == []
    assert await names_of("until=5") == []
    first = await box.call("GET", "/v1/audit?limit=2&action=session")
    rest = await box.call("GET", f"/v1/audit?limit=5&action=session&cursor={first['next']}")
    assert [each["name"] for each in first["items"] + rest["items"]] == ["bb", "cc", "bb", "aa"]
    assert rest["next"] is None
    for query in ("action=Session", "limit=0", "cursor=0", f"cursor={10**30}", "since=-1"):
        await box.call("GET", f"/v1/audit?{query}", status=400)
