"""Run by a Python that has JupyterLab and Playwright: JupyterLab in a browser over a gateway.

``lab.py URL TOKEN FOLDER CHROMIUM``; prints what was seen, leaves a picture in FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Page, async_playwright

URL, TOKEN, FOLDER, CHROMIUM = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
PATIENCE_MS = 90_000
OF_CHROMIUM = (
    "--no-sandbox", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--disable-breakpad", "--disable-crash-reporter",
)  # fmt: skip
CELLS = {
    "print": "x = 20 + 1\nprint('hello', x * 2)",
    "html": "class Bold:\n    def _repr_html_(self): return '<b>bold</b>'\nBold()",
    "plot": "try:\n    import matplotlib.pyplot as plt\n    plt.plot([1, 3, 2])\n"
    "    plt.show()\nexcept ImportError:\n    print('no matplotlib')",
    "sleep": "import time\nprint('asleep', flush=True)\ntime.sleep(120)",
    "count": "for i in range(8):\n    print(f'tick{i}', flush=True); time.sleep(0.5)",
    "gone": "x",
}
STATUS = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"


def write_notebook() -> None:
    kernel = {"name": "python", "display_name": "Python", "language": "python"}
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "id": name, "metadata": {}, "outputs": [], "execution_count": None,
         "source": source}
        for name, source in CELLS.items()
    ]  # fmt: skip
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}
    (FOLDER / "a.ipynb").write_text(json.dumps({**notebook, "cells": cells}))


@asynccontextmanager
async def lab() -> AsyncIterator[str]:
    """Address of a JupyterLab whose kernels are the gateway's."""
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--expose-app-in-browser", "--ServerApp.port=0", "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=lab", f"--ServerApp.root_dir={FOLDER}",
        f"--gateway-url={URL}", f"--GatewayClient.auth_token={TOKEN}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = FOLDER / "lab.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab\?", log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.2)
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Notebook:
    """The notebook that the page shows."""

    def __init__(self, page: Page) -> None:
        self._page = page

    async def state(self, wanted: str) -> None:
        await self._page.wait_for_function(f"() => {STATUS} === '{wanted}'", timeout=PATIENCE_MS)

    async def run(self, name: str) -> None:
        """One cell; its output is not waited for."""
        await self.choose(name)
        await self.command("notebook:run-cell")

    async def choose(self, name: str) -> None:
        at = list(CELLS).index(name)
        await self._page.evaluate(
            f"window.jupyterapp.shell.currentWidget.content.activeCellIndex = {at}"
        )

    async def command(self, name: str) -> None:
        await self._page.evaluate(f"() => {{ window.jupyterapp.commands.execute('{name}'); }}")

    async def shows(self, name: str, text: str, what: str = ".jp-OutputArea-output") -> None:
        """Wait until the cell's output has *text*."""
        cell = self._page.locator(".jp-CodeCell").nth(list(CELLS).index(name))
        await cell.locator(what, has_text=text).first.wait_for(timeout=PATIENCE_MS)

    async def output(self, name: str) -> str:
        cell = self._page.locator(".jp-CodeCell").nth(list(CELLS).index(name))
        return "".join(await cell.locator(".jp-OutputArea-output").all_inner_texts())


async def watch(page: Page, address: str) -> None:
    await page.goto(f"{address}/lab/tree/a.ipynb?token=lab")
    notebook = Notebook(page)
    await notebook.state("idle")
    print("a kernel started", flush=True)
    await notebook.run("print")
    await notebook.shows("print", "hello 42")
    await notebook.run("html")
    await notebook.shows("html", "bold", "b")
    await notebook.run("plot")
    plot = page.locator(".jp-CodeCell").nth(list(CELLS).index("plot"))
    picture = plot.locator(".jp-OutputArea-output img, .jp-OutputArea-output:has-text('no mat')")
    await picture.first.wait_for(timeout=PATIENCE_MS)
    print(f"cells ran, {await plot.locator('img').count()} pictures", flush=True)
    await page.screenshot(path=str(FOLDER / "lab.png"))
    await notebook.run("sleep")
    await notebook.shows("sleep", "asleep")
    await notebook.command("notebook:interrupt-kernel")
    await notebook.shows("sleep", "KeyboardInterrupt")
    print("a cell was interrupted", flush=True)
    await notebook.run("count")
    await notebook.shows("count", "tick1")
    print("please kill the server", flush=True)
    assert (await asyncio.to_thread(sys.stdin.readline)) == "killed\n"
    await notebook.state("idle")
    await notebook.shows("count", "tick7")
    print(f"reconnected: {' '.join((await notebook.output('count')).split())}", flush=True)
    await notebook.run("print")
    await notebook.shows("print", "hello 42")
    await notebook.command("notebook:restart-kernel")
    await page.locator(".jp-Dialog .jp-mod-accept").click(timeout=PATIENCE_MS)
    await notebook.state("idle")
    await notebook.run("gone")
    await notebook.shows("gone", "NameError")
    print("the kernel was restarted", flush=True)


async def main() -> None:
    write_notebook()
    async with lab() as address, async_playwright() as playwright:
        browser: Any = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(OF_CHROMIUM)
        )
        page = await browser.new_page(viewport={"width": 1200, "height": 1400})
        try:
            await watch(page, address)
        except BaseException:
            await page.screenshot(path=str(FOLDER / "failed.png"))
            print((FOLDER / "lab.log").read_text()[-4000:], file=sys.stderr)
            raise
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
