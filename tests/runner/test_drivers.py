"""Every driver keeps the protocol of docs/reference/drivers.md."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from tests.runner.conftest import driver_of, here

from madang.kit.languages import Languages
from madang.testing.drivers import Driver, Outcome
from madang.testing.languages import SAMPLES

pytestmark = pytest.mark.slow


def interrupted(driver: Driver, code: str) -> Outcome:
    """A cell that is interrupted while it runs: again and again, as some are still being built."""
    timer = threading.Event()

    def again() -> None:
        while not timer.wait(0.5):
            driver.interrupt()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        return driver.run(code)
    finally:
        timer.set()
        thread.join()


def test_it_says_its_version(name: str, driver: Driver) -> None:
    assert re.search(r"\d", driver.ready), driver.ready
    assert re.findall(r"[\d.]+", driver.ready)[0] in here()[name] or here()[name] in driver.ready


def test_output_comes_on_both_streams_between_begin_and_the_end(name: str, driver: Driver) -> None:
    outcome = driver.run(SAMPLES[name].print)

    assert outcome.status == "ok", outcome
    assert outcome.stdout.decode() == "hä\n"
    assert outcome.stderr.decode() == "oh\n"
    kinds = [frame.kind for frame in outcome.frames if frame.kind != "fence"]
    assert kinds[0] == "begin"
    assert kinds[-1] == "done"
    assert outcome.figures.keys() == {"wall_us", "cpu_us", "mem_bytes"}
    assert outcome.figures["mem_bytes"] > 500_000


def test_state_is_kept_and_the_last_expression_is_the_result(name: str, driver: Driver) -> None:
    samples = SAMPLES[name]
    if not Languages().get(name).state:
        pytest.skip("its cells keep nothing")

    assert driver.run(samples.set).status == "ok"
    outcome = driver.run(samples.get)
    assert (outcome.result or outcome.stdout.decode().strip()) == samples.got


def test_an_error_has_a_name_a_text_and_its_line_and_is_survived(name: str, driver: Driver) -> None:
    outcome = driver.run(SAMPLES[name].wrong)

    assert outcome.status == "error"
    assert outcome.error is not None
    kind, text, line = outcome.error
    assert kind
    assert text
    assert line == 3
    assert driver.run(SAMPLES[name].print).status == "ok"


def test_input_is_asked_for_and_strays_are_ignored(name: str, driver: Driver) -> None:
    if not Languages().get(name).input:
        pytest.skip("its cells can't ask")
    driver.send("input", "stray", "nobody asked")
    outcome = driver.run(SAMPLES[name].ask, "Ännchen 1")

    assert outcome.status == "ok", outcome
    assert outcome.stdout.decode().strip() == "hello Ännchen 1"
    assert len(outcome.all("input")) == 1


def test_an_interrupt_ends_the_cell_and_not_the_interpreter_again_and_again(
    name: str, driver: Driver
) -> None:
    for _ in range(2):
        outcome = interrupted(driver, SAMPLES[name].loop)
        assert outcome.status == "error"
        assert outcome.error is not None
        assert outcome.error[0] in {"Interrupted", "KeyboardInterrupt"}
    driver.interrupt()  # Nothing runs: nothing happens.
    driver.ask("complete", "", 0)
    assert driver.run(SAMPLES[name].print).status == "ok"


def test_large_output_is_complete(name: str, driver: Driver) -> None:
    outcome = driver.run(SAMPLES[name].large)

    assert outcome.status == "ok", outcome.error
    assert outcome.stdout.replace(b"\n", b"") == b"0123456789" * 300_000


def test_names_are_completed_and_a_strange_place_is_survived(name: str, driver: Driver) -> None:
    samples = SAMPLES[name]
    if samples.set:
        driver.run(samples.set)
    found = driver.ask("complete", samples.name)
    if samples.names and Languages().get(name).state:
        assert samples.names in found.text.split("\n")
        start, end = map(int, found.arg.split(","))
        assert 0 <= start < end == len(samples.name)
    for code, cursor in (("", 0), ("ü ", 99), ("((((", 2), ("'\n", 1)):
        driver.ask("complete", code, cursor)
        assert driver.ask("inspect", code, cursor).arg in {"found", "none"}


def test_code_that_is_no_code_is_an_error(name: str, driver: Driver) -> None:
    for code in ("((((", "\x01\x1e\x7f", "'", "\x1edone c9 ok 0\n"):
        driver.run(code)
    assert driver.run("").status in {"ok", "error"}
    assert driver.run(SAMPLES[name].print).status == "ok"


def test_it_ends_when_it_is_told_to_and_when_nobody_speaks_to_it(name: str, tmp_path: Path) -> None:
    with driver_of(name, tmp_path) as driver:
        driver.send("quit", "-")
        driver.process.wait(10)
    with driver_of(name, tmp_path) as driver:
        assert driver.process.stdin is not None
        driver.process.stdin.close()
        driver.process.wait(10)


def test_the_nonce_is_not_in_the_environment_of_the_code(tmp_path: Path) -> None:
    for name, code in (
        ("shell", "env"),
        ("python", "import os; os.system('env')"),
        ("perl", "system('env');"),
    ):
        with driver_of(name, tmp_path) as driver:
            outcome = driver.run(code)
            assert driver.nonce.encode() not in outcome.stdout
            assert b"PATH=" in outcome.stdout
