"""Run by a Python that has Jupyter: kernels of this machine that are sessions of the server.

``local_kernel.py KERNELSPEC``; the client's configuration is in the environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from nbclient import NotebookClient

from madang.cli.context import connect
from madang.wire.session import SessionStatus

NAME = sys.argv[1]
PATIENCE_S = 60.0


def sessions() -> list[str]:
    """Ids of those that run."""
    with connect() as client:
        return [s.id for s in client.list_sessions(status=SessionStatus.RUNNING)]


async def until_no_session(within_s: float) -> None:
    end = time.monotonic() + within_s
    while sessions():
        assert time.monotonic() < end, "a session is left"
        await asyncio.sleep(0.2)


class Runner:
    """A client that remembers what a cell has printed."""

    def __init__(self, client: AsyncKernelClient) -> None:
        self._client = client
        self.text = ""

    async def run(self, code: str, **more: Any) -> dict[str, Any]:
        """Content of the reply."""
        self.text = ""
        reply: dict[str, Any] = await self._client.execute_interactive(
            code, timeout=PATIENCE_S, output_hook=self._hear, **more
        )
        content: dict[str, Any] = reply["content"]
        return content

    def _hear(self, message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            self.text += content["text"]
        elif message["msg_type"] == "execute_result":
            self.text += content["data"]["text/plain"]


async def main() -> None:
    manager = AsyncKernelManager(kernel_name=NAME)
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=PATIENCE_S)
    runner = Runner(client)
    await check_cells(runner)
    await check_interrupt(manager, client, runner)
    await check_restart(manager, client, runner)
    before = sessions()
    assert len(before) == 1, before
    client.stop_channels()
    await manager.shutdown_kernel()
    await until_no_session(20)
    print("a shutdown ended the session")
    await check_notebook()
    await check_killed()


async def check_cells(runner: Runner) -> None:
    assert (await runner.run("x = 40\nprint('hi')\nx + 2"))["status"] == "ok"
    assert runner.text == "hi\n42", runner.text
    assert (await runner.run("1/0"))["ename"] == "ZeroDivisionError"
    print("cells ran")


async def check_interrupt(
    manager: AsyncKernelManager, client: AsyncKernelClient, runner: Runner
) -> None:
    running = asyncio.ensure_future(
        runner.run("import time\nprint('on', flush=True)\ntime.sleep(60)")
    )
    while runner.text != "on\n":
        await asyncio.sleep(0.05)
    await manager.interrupt_kernel()
    assert (await running)["ename"] == "KeyboardInterrupt"
    print("a cell was interrupted")


async def check_restart(
    manager: AsyncKernelManager, client: AsyncKernelClient, runner: Runner
) -> None:
    """With the provisioner the session stays; a plain kernel.json gets another."""
    await runner.run("open('kept', 'w').write('x')")
    before = sessions()
    await manager.restart_kernel()
    await client.wait_for_ready(timeout=PATIENCE_S)
    assert (await runner.run("x"))["ename"] == "NameError"
    await runner.run("import os; print(os.path.exists('kept'))")
    same = sessions() == before
    assert runner.text == f"{same}\n", (runner.text, before, sessions())
    print("the session stayed over a restart" if same else "a restart made another session")


async def check_notebook() -> None:
    """As nbclient, nbconvert and papermill run notebooks."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("a = 6"), nbformat.v4.new_code_cell("a * 7")]
    await NotebookClient(notebook, kernel_name=NAME, timeout=60).async_execute()
    (output,) = notebook.cells[1].outputs
    assert output.data["text/plain"] == "42"
    await until_no_session(20)
    print("nbclient ran a notebook")


async def check_killed() -> None:
    """Whoever is killed tells nobody: the bridge sees it, and ends the session."""
    code = (
        "from jupyter_client import BlockingKernelClient, KernelManager\n"
        f"m = KernelManager(kernel_name={NAME!r}); m.start_kernel(); c = m.client()\n"
        "c.start_channels(); c.wait_for_ready(timeout=60); print('up', flush=True)\n"
        "import time; time.sleep(60)"
    )
    frontend = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert frontend.stdout is not None
    assert frontend.stdout.readline() == b"up\n"
    assert sessions()
    os.kill(frontend.pid, signal.SIGKILL)
    frontend.wait()
    frontend.stdout.close()
    await until_no_session(20)
    print("a frontend that was killed left no session")


if __name__ == "__main__":
    asyncio.run(main())
