"""Writes the generated part of the reference before each build: what the code says."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from aiohttp.test_utils import TestClient, TestServer
from sphinx.application import Sphinx

from madang.cli.root import root
from madang.daemon import config
from madang.kit.clock import SystemClock
from madang.manager.app import Manager, ManagerSettings
from madang.manager.session.types import LIFE
from madang.storage import BlobStore
from madang.wire.errors import catalogue
from madang.wire.size import format_duration


def commands() -> Iterator[str]:
    yield from _command(root, click.Context(root, info_name="madang"), 2)


def _command(command: click.Command, context: click.Context, depth: int) -> Iterator[str]:
    if context.parent is not None:
        yield f"{'#' * min(depth, 4)} `{context.command_path}`\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield _prose(inspect.cleandoc(command.help or "")) + "\n"
    rows = [p.get_help_record(context) for p in command.get_params(context)]
    options = [(name, text) for name, text in filter(None, rows) if name != "--help"]
    if options:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{name}` | {_cell(text)} |" for name, text in options)
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            if sub is not None and not sub.hidden:
                inner = click.Context(sub, info_name=name, parent=context)
                yield from _command(sub, inner, depth + 1 if context.parent else depth)


def settings() -> Iterator[str]:
    section = ""
    for key in config.keys().values():
        if key.section != section:
            section = key.section
            yield f"\n## `[{section}]`\n"
            yield "| key | default | environment | meaning |\n|---|---|---|---|"
        name = key.name.partition(".")[2]
        yield f"| `{name}` | `{key.show(key.default)}` | `{key.variable}` | {_cell(key.meaning)} |"


def errors() -> Iterator[str]:
    for code, kind in catalogue().items():
        yield f"## `{code}`\n\nHTTP {kind.http_status}, retry: {kind.retry}. {kind.help_text}\n"


def states() -> Iterator[str]:
    yield "| status | next | owner | deadline |\n|---|---|---|---|"
    for status, rule in LIFE.items():
        following = ", ".join(sorted(rule.next)) or "final"
        deadline = "" if rule.deadline_s is None else format_duration(rule.deadline_s)
        yield f"| {status} | {following} | {rule.owner} | {deadline} |"


logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


async def _description() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = ManagerSettings(database_url=f"sqlite:///{folder}/madang.db")
        manager = Manager(settings, BlobStore(folder), SystemClock())
        async with TestClient(TestServer(manager.web_app())) as client:
            answer = await client.get("/v1/openapi.json")
            found: dict[str, Any] = await answer.json()
            return found


def api() -> Iterator[str]:
    document = asyncio.run(_description())
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if isinstance(operation, dict):
                yield from _operation(path, method, operation)


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    text = operation.get("description") or operation.get("summary", "")
    yield f"## `{method.upper()} {path}`\n\n{_prose(text)}\n"
    parameters = operation.get("parameters", [])
    if parameters:
        yield "| parameter | in | type | meaning |\n|---|---|---|---|"
        for item in parameters:
            kind = item.get("schema", {}).get("type", "")
            text = _cell(item.get("description", ""))
            yield f"| `{item['name']}` | {item['in']} | {kind} | {text} |"
        yield ""
    yield "| answer | |\n|---|---|"
    for status, answer in operation.get("responses", {}).items():
        yield f"| {status} | {_cell(answer.get('description', ''))} |"
    yield ""


def _prose(text: str) -> str:
    return re.sub(r"``", "`", text.replace("\b\n", "")).strip()


def _cell(text: object) -> str:
    return _prose(str(text)).replace("|", "\\|").replace("\n", " ")


PAGES = {"cli": commands, "settings": settings, "errors": errors, "states": states, "api": api}


def write(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "reference" / "generated"
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        text = "\n".join(page()) + "\n"
        target = folder / f"{name}.md"
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
