"""The driver over ipykernel, with the one that ``.venv-jupyter`` has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.kit.languages import Languages
from madang.testing.drivers import Driver, Outcome

BIN = Path(__file__).resolve().parents[2] / ".venv-jupyter" / "bin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIN.exists(), reason="no .venv-jupyter: ./test.sh makes it"),
]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    own = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "IPYTHONDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    environment = {**os.environ, **own}
    environment.pop("PYTHONPATH", None)
    with Driver.start(Languages(), "ipykernel", environment) as driver:
        yield driver
        with contextlib.suppress(BrokenPipeError):
            driver.send("quit", "-")
        driver.process.wait(30)


def test_cells_have_state_output_magics_and_figures(driver: Driver) -> None:
    assert driver.ready.startswith("3.")
    ran = driver.run("import sys\nprint('hällo'); print('err', file=sys.stderr)\nx = 41\nx + 1")
    assert (ran.stdout.decode(), ran.stderr, ran.result) == ("hällo\n", b"err\n", "42")
    assert ran.status == "ok"
    assert ran.figures["mem_bytes"] > 1 << 20
    assert driver.run("%who_ls int").result == "['x']"
    plotted = driver.run("import matplotlib.pyplot as p\np.plot([1, 2]); p.show()")
    kinds = {frame.arg: frame for frame in plotted.frames if frame.kind in {"part", "display"}}
    assert kinds["image/png"].payload.startswith(b"\x89PNG")


def test_errors_have_their_line(driver: Driver) -> None:
    failed = driver.run("x = 1\n\n1/0")
    assert failed.status == "error"
    assert failed.error == ("ZeroDivisionError", "division by zero", 3)
    broken = driver.run("def f(:\n    pass")
    assert broken.error is not None
    assert (broken.error[0], broken.error[2]) == ("SyntaxError", 1)
    assert driver.run("x").result == "1"


def test_input_passwords_and_no_answer(driver: Driver) -> None:
    driver.send("input", "stray", "nobody asked")
    asked = driver.run("input('who? ')", "me")
    assert asked.result == "'me'"
    assert [(f.arg, f.text) for f in asked.all("input")] == [("prompt", "who? ")]
    secret = driver.run("import getpass; getpass.getpass('pin ')", "1234")
    assert [f.arg for f in secret.all("input")] == ["password"]
    nobody = driver.run("input()", None)
    assert nobody.error is not None
    assert nobody.error[0] == "EOFError"


def test_a_cell_is_interrupted_and_the_next_one_runs(driver: Driver) -> None:
    def interrupt(outcome: Outcome) -> bool:
        if outcome.stdout:
            driver.interrupt()
        return bool(outcome.stdout)

    stopped = driver.run("import time\nprint('on', flush=True)\ntime.sleep(60)", when=interrupt)
    assert stopped.error is not None
    assert stopped.error[0] == "KeyboardInterrupt"
    assert driver.run("1 + 1").result == "2"


def test_completion_and_inspection(driver: Driver) -> None:
    driver.run("some_name = 1")
    found = driver.ask("complete", "some_n")
    assert "some_name" in found.text.splitlines()
    assert found.arg == "0,6"
    assert driver.ask("inspect", "some_name").arg == "found"
    assert driver.ask("inspect", "no_such_thing").arg == "none"


def test_a_kernel_that_dies_ends_the_driver(driver: Driver) -> None:
    with pytest.raises(EOFError):
        driver.run("import os; os._exit(7)")
    assert driver.process.wait(30) != 0
