"""Jupyter's server API on a real platform, by the protocol alone."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator

import aiohttp
import pytest

from madang.client import Client
from madang.manager.jupyter.rules.frames import V1
from madang.manager.jupyter.rules.ids import session_id
from madang.testing.jupyter import Channels, Jupyter, Run
from madang.testing.platform import Platform
from madang.wire.session import SessionStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]


@pytest.fixture
async def jupyter(platform: Platform) -> AsyncIterator[Jupyter]:
    async with Jupyter(platform.url, platform.token) as jupyter:
        yield jupyter


@pytest.mark.parametrize("protocols", [(V1,), ()])
async def test_cells_run_in_either_protocol_as_ipykernel_tells_them(
    jupyter: Jupyter, protocols: tuple[str, ...]
) -> None:
    kernel = await jupyter.start()
    async with jupyter.channels(kernel, protocols=protocols) as channels:
        info = await channels.ask("kernel_info", {})
        assert info["language_info"]["name"] == "python"
        assert info["language_info"]["version"].startswith("3.")
        run = await channels.run("import sys\nprint('hi')\nx = 20\nx + 1")
        assert run.told == [
            "busy", "execute_input", "stream", "execute_result", "execute_reply", "idle",
        ]  # fmt: skip
        assert (run.text, run.result) == ("hi\n", "21")
        assert {m.parent["session"] for m in run.messages} == {channels.client}
        failed = await channels.run("1/0")
        assert failed.reply["ename"] == "ZeroDivisionError"
        assert failed.reply["execution_count"] == 2
        found = await channels.ask("complete", {"code": "sys.maxs", "cursor_pos": 8})
        assert found["matches"] == ["maxsize"] or found["matches"] == ["sys.maxsize"]
        assert (await channels.ask("inspect", {"code": "sys", "cursor_pos": 2}))["found"]
        history = await channels.ask("history", {"hist_access_type": "tail", "n": 1})
        assert history["history"] == [[0, 2, "1/0"]]
        assert (await channels.ask("is_complete", {"code": "1"}))["status"] == "unknown"
        assert (await channels.ask("comm_info", {}))["comms"] == {}
    await jupyter.ask("DELETE", f"/api/kernels/{kernel}", 204)
    await jupyter.ask("GET", f"/api/kernels/{kernel}", 404)


async def test_cells_ask_the_client_that_ran_them(jupyter: Jupyter) -> None:
    async with jupyter.kernel() as mine, jupyter.channels(mine.kernel) as other:
        await other.ask("kernel_info", {})
        request = await mine.execute("import getpass\ninput('who? ') + getpass.getpass('pin ')")
        asked = await mine.until("input_request")
        assert asked.content == {"prompt": "who? ", "password": False}
        await mine.send("stdin", "input_reply", {"value": "me"})
        secret = await mine.until("input_request")
        assert secret.content == {"prompt": "pin ", "password": True}
        await mine.send("stdin", "input_reply", {"value": "123"})
        assert (await mine.until_idle(request)).result == "'me123'"
        seen = await other.until_idle(request, replies=0)
        assert seen.told == ["busy", "execute_input", "execute_result", "idle"]


async def test_a_client_that_comes_back_gets_what_it_missed_once(jupyter: Jupyter) -> None:
    async with jupyter.kernel() as first:
        await first.run("import time")
        request = await first.execute(
            "for i in range(5):\n    print(i, flush=True); time.sleep(.2)"
        )
        begun = await first.until("stream")
        await first.socket.close()
        await asyncio.sleep(0.5)
        async with jupyter.channels(first.kernel, client=first.client) as again:
            run = await again.until_idle(request)
            assert begun.content["text"] + run.text == "0\n1\n2\n3\n4\n"
            assert run.told[-2:] == ["execute_reply", "idle"]
        async with jupyter.channels(first.kernel, client=first.client) as later:
            told = (await later.run("'anew'")).told
            assert told == ["busy", "execute_input", "execute_result", "execute_reply", "idle"]


async def test_a_server_that_is_killed_loses_no_cell(platform: Platform, jupyter: Jupyter) -> None:
    async with jupyter.kernel() as first:
        await first.run("import time")
        request = await first.execute("for i in range(4):\n    print(i, flush=True); time.sleep(1)")
        await first.until("stream")
        platform.kill("server")
        with pytest.raises(ConnectionError):
            while True:
                await first.next()
        run = await _until_done(jupyter, first, request)
        assert run.reply["status"] == "ok"
        assert run.text == "0\n1\n2\n3\n"
        assert run.told.count("clear_output") == 1
        async with jupyter.channels(first.kernel) as after:
            assert (await after.run("i")).result == "3"


async def _until_done(jupyter: Jupyter, first: Channels, request: str) -> Run:
    """As a client would that connects until there is a server again."""
    async with asyncio.timeout(60):
        while True:
            try:
                async with jupyter.channels(first.kernel, client=first.client) as again:
                    return await again.until_idle(request)
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)


@pytest.mark.parametrize("by", ["rest", "control"])
async def test_a_cell_is_interrupted(jupyter: Jupyter, by: str) -> None:
    async with jupyter.kernel() as channels:
        request = await channels.execute("import time\nprint('on', flush=True)\ntime.sleep(60)")
        await channels.until("stream")
        if by == "rest":
            await jupyter.ask("POST", f"/api/kernels/{channels.kernel}/interrupt", 204)
        else:
            await channels.send("control", "interrupt_request", {})
        assert (await channels.until_idle(request)).reply["ename"] == "KeyboardInterrupt"


@pytest.mark.parametrize("by", ["rest", "control"])
async def test_a_restart_keeps_files_and_forgets_the_rest(jupyter: Jupyter, by: str) -> None:
    async with jupyter.kernel() as channels:
        await channels.run("x = 1\nopen('kept', 'w').write('yes')")
        if by == "rest":
            await jupyter.ask("POST", f"/api/kernels/{channels.kernel}/restart", 200, json={})
        else:
            assert (await channels.ask("shutdown", {"restart": True}, "control"))["restart"]
        assert (await channels.run("open('kept').read()")).result == "'yes'"
        assert (await channels.run("x")).reply["ename"] == "NameError"


async def test_an_interpreter_that_dies_is_started_again(jupyter: Jupyter) -> None:
    async with jupyter.kernel() as channels:
        await channels.execute("import os\nos._exit(3)")
        await channels.until("restarting")
        assert (await channels.run("40 + 2")).result == "42"


async def test_a_shutdown_ends_the_session(jupyter: Jupyter, client: Client) -> None:
    async with jupyter.kernel() as channels:
        assert (await channels.run("1")).result == "1"
        await channels.send("control", "shutdown_request", {"restart": False})
        await channels.until("dead")
        done = await asyncio.to_thread(
            client.wait_session,
            session_id(channels.kernel),
            until=[SessionStatus.TERMINATED],
            timeout_s=30,
        )
        assert done.ended is not None
        assert done.ended.reason == "user"


async def test_a_session_that_can_not_start_says_why_in_the_cell(
    jupyter: Jupyter, client: Client
) -> None:
    async with jupyter.kernel() as channels:
        await channels.ask("kernel_info", {})
        await asyncio.to_thread(client.stop, session_id(channels.kernel), grace_s=0)
        await channels.until("dead")
        run = await channels.run("1")
        assert "error" in run.told
        assert "stopped by admin" in run.reply["evalue"]


async def test_nobody_runs_code_without_the_right_token(
    platform: Platform, jupyter: Jupyter
) -> None:
    kernel = await jupyter.start()
    paths = ["/api", "/api/kernels", f"/api/kernels/{kernel}/channels", "/api/contents/x"]
    async with aiohttp.ClientSession() as http:
        for path in paths:
            for more in (
                {},
                {"params": {"token": "mdg_" + "x" * 43}},
                {"headers": {"Origin": "x"}},
            ):
                async with http.get(jupyter.base + path, **more) as answer:  # type: ignore[arg-type]
                    assert answer.status == 401, path
                    assert "Access-Control-Allow-Origin" not in answer.headers
        async with http.get(jupyter.base + "/api", params={"token": platform.token}) as answer:
            assert answer.status == 200
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        async with http.options(jupyter.base + "/api/kernels", headers=preflight) as answer:
            assert answer.status == 405
            assert "Access-Control-Allow-Origin" not in answer.headers
    other = Jupyter(platform.url, platform.token, "somebody")
    async with other:
        told = await other.ask("GET", "/api/kernels", 403)
        assert "/jupyter/admin" in told["message"]
    await jupyter.ask("DELETE", f"/api/kernels/{kernel}", 204)


async def test_garbage_closes_its_own_connection_alone(jupyter: Jupyter) -> None:
    async with jupyter.kernel() as good:
        for data in (b"\x01" * 40, b"", "text that is none"):
            async with jupyter.channels(good.kernel) as bad:
                if isinstance(data, bytes):
                    await bad.socket.send_bytes(data)
                else:
                    await bad.socket.send_str(data)
                with pytest.raises(ConnectionError, match="CLOSE"):
                    while True:
                        await bad.next()
        unknown = await good.ask("execute_in_moonlight", {})
        assert unknown["status"] == "error"
        nothing = await good.until_idle(await good.send("shell", "execute_request", {}))
        assert nothing.reply["status"] == "error"
        await good.send("shell", "comm_open", {"comm_id": "c", "target_name": "t", "data": {}})
        assert (await good.until("comm_close")).content["comm_id"] == "c"
        assert (await good.run("2 + 2")).result == "4"


async def test_sessions_belong_to_notebooks(jupyter: Jupyter) -> None:
    body = {"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": {"name": "python"}}
    made = await jupyter.ask("POST", "/api/sessions", 201, json=body)
    again = await jupyter.ask("POST", "/api/sessions", 201, json=body)
    assert again["kernel"]["id"] == made["kernel"]["id"]
    assert (made["path"], made["name"], made["kernel"]["name"]) == ("a.ipynb", "a", "python")
    kernels = await jupyter.ask("GET", "/api/kernels")
    assert [kernel["id"] for kernel in kernels] == [made["kernel"]["id"]]
    moved = await jupyter.ask("PATCH", f"/api/sessions/{made['id']}", json={"path": "b.ipynb"})
    assert moved["path"] == "b.ipynb"
    assert (await jupyter.ask("GET", "/api/sessions"))[0]["path"] == "b.ipynb"
    other = {"kernel": {"name": "python.small"}}
    changed = await jupyter.ask("PATCH", f"/api/sessions/{made['id']}", json=other)
    assert (changed["path"], changed["kernel"]["name"]) == ("b.ipynb", "python.small")
    await jupyter.ask("GET", f"/api/sessions/{made['id']}", 404)
    await jupyter.ask("DELETE", f"/api/sessions/{changed['id']}", 204)
    assert await jupyter.ask("GET", "/api/sessions") == []
    for wrong in ({}, {"path": 1}, {"path": "x", "kernel": []}, {"path": "x", "env": {"a": 1}}):
        await jupyter.ask("POST", "/api/sessions", 400, json=wrong)
    missing = {"path": "x", "kernel": {"name": "cobol"}}
    assert "cobol" in (await jupyter.ask("POST", "/api/sessions", 404, json=missing))["message"]


async def test_files_of_a_session_are_read_and_written(jupyter: Jupyter, client: Client) -> None:
    async with jupyter.kernel() as channels:
        await channels.run("import os; os.mkdir('d'); os.mkfifo('pipe')")
        session = await asyncio.to_thread(client.get_session, session_id(channels.kernel))
        root = f"/api/contents/{session.name}"
        listed = await jupyter.ask("GET", "/api/contents")
        assert [entry["path"] for entry in listed["content"]] == [session.name]
        note = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        body = {"type": "notebook", "format": "json", "content": note}
        assert (await jupyter.ask("PUT", f"{root}/d/n.ipynb", json=body))["path"].endswith(
            "n.ipynb"
        )
        assert (await jupyter.ask("GET", f"{root}/d/n.ipynb"))["content"] == note
        data = bytes(range(256))
        binary = {"type": "file", "format": "base64", "content": base64.b64encode(data).decode()}
        await jupyter.ask("PUT", f"{root}/b.bin", json=binary)
        assert (
            await channels.run("open('b.bin','rb').read() == bytes(range(256))")
        ).result == "True"
        read = await jupyter.ask("GET", f"{root}/b.bin")
        assert base64.b64decode(read["content"]) == data
        assert (await jupyter.ask("GET", f"{root}/b.bin?content=0"))["content"] is None
        made = await jupyter.ask("POST", root, 201, json={"type": "notebook"})
        assert made["name"] == "Untitled.ipynb"
        copied = await jupyter.ask("POST", root, 201, json={"copy_from": made["path"]})
        assert copied["name"] == "Untitled-Copy.ipynb"
        new = {"path": f"{session.name}/e/moved.ipynb"}
        await jupyter.ask("PATCH", f"{root}/Untitled.ipynb", json=new)
        await jupyter.ask("PATCH", f"{root}/b.bin", 409, json=new)
        await jupyter.ask("PATCH", f"{root}/b.bin", 400, json={"path": "elsewhere/b.bin"})
        await jupyter.ask("DELETE", f"{root}/d", 204)
        names = [entry["name"] for entry in (await jupyter.ask("GET", root))["content"]]
        assert sorted(names) == ["Untitled-Copy.ipynb", "b.bin", "e"]
        await jupyter.ask("GET", f"{root}/gone", 404)
        await jupyter.ask("GET", f"{root}/pipe", 409)
        for path in ("..", "../x", f"{session.name}/../../etc/passwd"):
            url = path.replace("..", "%2e%2e")
            await jupyter.ask("GET", f"/api/contents/{url}", 400)
        await jupyter.ask("PUT", "/api/contents/top.txt", 400, json=binary)
        await jupyter.ask("DELETE", root, 400)
