"""The description says what the server does, checked by schemathesis against a live one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

from madang.manager.app import ManagerSettings
from madang.testing.manager import ScriptedAgent, manager_box
from madang.testing.patience import PATIENCE_S

EXAMPLES = 12
"""For each operation; the whole takes some fifteen seconds."""
OUTSIDE = [
    positive_data_acceptance,  # names, sizes and paths have rules that JSON Schema can't say
    negative_data_rejection,  # unknown fields of a body are ignored: newer clients may send them
]
STREAMS = r"/v1/(run|events|logout)|.*/(attach|exec|logs|file|files|archive)$"
"""And the one call after which no other is let in."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server in a thread of its own, with a machine that runs everything to its end."""
    folder: Path = tmp_path_factory.mktemp("openapi")
    ready: Future[tuple[str, str]] = Future()
    stop: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        done = asyncio.Event()
        async with manager_box(ManagerSettings(database_url=f"sqlite:///{folder}/m.db")) as box:
            agent = ScriptedAgent()
            agent.auto = True
            await box.add_agent(agent)
            stop.set_result((asyncio.get_running_loop(), done))
            ready.set_result((box.url, box.token))
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield ready.result(PATIENCE_S)
    loop, done = stop.result()
    loop.call_soon_threadsafe(done.set)
    thread.join(PATIENCE_S)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_are_as_described(live: tuple[str, str]) -> None:
    url, token = live
    described = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
    found: Any = described.exclude(path_regex=STREAMS).get_all_operations()
    operations = [result.ok() for result in found]
    assert len(operations) >= 15

    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            case.query.pop("wait", None)  # up to a minute, and nothing happens
            case.call_and_validate(
                headers={"Authorization": f"Bearer {token}"}, excluded_checks=OUTSIDE
            )

        check()
