"""Python's driver as a local process, spoken to as the server does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from madang.kit.languages import Languages
from madang.testing.drivers import Driver, Outcome

PICTURE = """
class Picture:
    def _repr_png_(self): return bytes(range(256)) * 100
    def __repr__(self): return "a picture"
Picture()
"""


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver.start(Languages(), "python") as driver:
        yield driver


def interrupt_once(driver: Driver) -> Callable[[Outcome], bool]:
    """Once the cell says that it goes."""

    def look(outcome: Outcome) -> bool:
        if b"go" not in outcome.stdout:
            return False
        driver.interrupt()
        return True

    return look


def joined(outcome: Outcome, kind: str) -> list[tuple[str, bytes]]:
    """Frames of *kind* with what their ``more`` frames began."""
    begun, found = b"", []
    for frame in outcome.frames:
        if frame.kind == "fence":
            continue  # of the other stream
        if frame.kind == "more":
            begun += frame.payload
            continue
        if frame.kind == kind:
            found.append((frame.arg, begun + frame.payload))
        begun = b""
    return found


def test_the_last_expression_is_the_result_unless_a_semicolon_ends_it(driver: Driver) -> None:
    assert driver.run("x = 41").result is None
    assert driver.run("x + 1").result == "42"
    assert driver.run("_ * 2").result == "84"
    assert driver.run("x;").result is None
    assert driver.run("None").result is None
    assert driver.run("'täst \\N{SNOWMAN}'").result == repr("täst ☃")


def test_an_error_has_its_line_its_source_and_none_of_our_frames(driver: Driver) -> None:
    outcome = driver.run("def f():\n    raise ValueError('a: b')\n\nf()")
    assert outcome.status == "error"
    assert outcome.error == ("ValueError", "a: b", 2)
    trace = outcome.all("error")[0].text
    assert "raise ValueError('a: b')" in trace
    assert "line 2, in f" in trace
    assert "<string>" not in trace
    assert driver.run("1 +").error == ("SyntaxError", "invalid syntax", 1)
    assert driver.run("f()").error == ("ValueError", "a: b", 1)


def test_errors_that_can_not_be_shown_are_told_all_the_same(driver: Driver) -> None:
    bad = "class Bad(Exception):\n    def __str__(self): raise KeyError(1)\nraise Bad()"
    assert driver.run(bad).status == "error"
    deep = driver.run("def f(): f()\nf()")
    assert deep.error is not None
    assert deep.error[0] == "RecursionError"
    assert driver.run("import sys; sys.exit(3)").error == ("SystemExit", "3", 1)
    assert driver.run("import sys; sys.exit()").status == "ok"
    assert driver.run("1").result == "1"


def test_input_and_passwords_are_asked_for(driver: Driver) -> None:
    assert driver.run("input('who? ')", "ada").result == "'ada'"
    outcome = driver.run("import getpass; getpass.getpass('pin: ')", "1234")
    assert outcome.result == "'1234'"
    assert [(f.arg, f.text) for f in outcome.all("input")] == [("password", "pin: ")]
    assert driver.run("import sys; sys.stdin.readline()", "line").result == repr("line\n")


def test_who_does_not_answer_is_the_end_of_input(driver: Driver) -> None:
    driver.send("run", "asks", "input()")
    driver.wait_for("input", "asks")
    driver.send("eof", "asks")
    assert driver.wait_for("error", "asks").text.startswith("EOFError\n")
    driver.wait_for("done", "asks")
    driver.send("input", "asks", "stray")
    assert driver.run("2").result == "2"


def test_an_interrupt_ends_the_cell_and_nothing_else(driver: Driver) -> None:
    driver.interrupt()  # nothing runs: nothing happens
    code = "print('go', flush=True)\nimport time\ntime.sleep(60)"
    outcome = driver.run(code, when=interrupt_once(driver))
    assert outcome.error is not None
    assert (outcome.error[0], outcome.error[2]) == ("KeyboardInterrupt", 3)
    waits = "print('go', flush=True)\nimport asyncio\nawait asyncio.sleep(60)"
    outcome = driver.run(waits, when=interrupt_once(driver))
    assert outcome.error is not None
    assert outcome.error[0] == "KeyboardInterrupt"
    assert driver.run("3").result == "3"


def test_a_cell_that_takes_the_signal_for_itself_keeps_it_for_itself(driver: Driver) -> None:
    driver.run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    code = "print('go', flush=True)\nimport time\ntime.sleep(60)"
    outcome = driver.run(code, when=interrupt_once(driver))
    assert outcome.error is not None
    assert outcome.error[0] == "KeyboardInterrupt"


def test_await_works_at_the_top_and_tasks_go_on_between_cells(driver: Driver) -> None:
    assert driver.run("import asyncio\nawait asyncio.sleep(0, 5)").result == "5"
    code = (
        "async def later():\n    await asyncio.sleep(0.01)\n    done.append(1)\n"
        "done = []\ntask = asyncio.create_task(later())\nawait asyncio.sleep(0)"
    )
    assert driver.run(code).status == "ok"
    deadline = time.monotonic() + 20
    while driver.run("len(done)").result != "1":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert driver.run("asyncio.run(asyncio.sleep(0, 6))").result == "6"


def test_output_of_children_and_of_c_comes_in_order(driver: Driver) -> None:
    code = (
        "import os, subprocess, ctypes\n"
        "print('a', end=''); os.system('printf b')\n"
        "print('c', end=''); subprocess.run(['printf', 'd'])\n"
        "print('e', end='')\n"
        "if os.fork() == 0: os.write(1, b'f'); os._exit(0)\n"
        "os.wait(); ctypes.CDLL(None).printf(b'g')"
    )
    outcome = driver.run(code)
    assert outcome.stdout == b"abcdefg"


def test_a_forked_child_that_goes_on_is_no_second_interpreter(driver: Driver) -> None:
    outcome = driver.run("import os\npid = os.fork()\nprint('child' if pid == 0 else 'parent')")
    driver.run("os.waitpid(pid, 0)")
    assert outcome.status == "ok"
    assert driver.run("1 + 1").result == "2"
    pools = (
        "import multiprocessing\n"
        "def f(x): return x * x\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(f, [1, 2, 3]))"
    )
    assert driver.run(pools).stdout == b"[1, 4, 9]\n"


def test_closed_and_exchanged_streams_hurt_the_cell_alone(driver: Driver) -> None:
    driver.run("import os; os.close(0); os.close(1); os.close(2)")
    assert driver.run("print('still')").stdout == b"still\n"
    driver.run("import sys; sys.stdout.close()")
    assert driver.run("print('here')").stdout == b"here\n"
    driver.run("import io, sys; old = sys.stdout; sys.stdout = io.StringIO(); print('gone')")
    assert driver.run("sys.stdout = old; print('back')").stdout == b"back\n"
    driver.run("del sys.stdout; sys.stderr = None")
    assert driver.run("7").result == "7"


def test_rich_values_are_shown_with_all_that_they_offer(driver: Driver) -> None:
    outcome = driver.run(PICTURE)
    parts = joined(outcome, "part") + joined(outcome, "result")
    assert parts == [("image/png", bytes(range(256)) * 100), ("text/plain", b"a picture")]
    table = (
        "class Table:\n"
        "    def _repr_mimebundle_(self, **_): return {'text/html': '<b>1</b>'}, {'k': 1}\n"
        "display(Table(), display_id='t1').update(2)"
    )
    outcome = driver.run(table)
    metadata, html = joined(outcome, "part")
    assert metadata == ("application/vnd.madang.metadata+json", b'{"k": 1}')
    assert html == ("text/html", b"<b>1</b>")
    assert joined(outcome, "display")[0][0] == "text/plain;display=t1"
    assert joined(outcome, "update") == [("text/plain;display=t1", b"2")]


def test_a_picture_is_whole_while_children_write(driver: Driver) -> None:
    outcome = driver.run(
        "import subprocess\n"
        "loud = ['sh', '-c', 'while :; do echo xxxxxxxx; done']\n"
        "noise = [subprocess.Popen(loud) for _ in '12']\n"
        + PICTURE.replace("Picture()", "[display(Picture()) for _ in range(20)]\n")
        + "\nfor each in noise: each.kill(); each.wait()"
    )
    shown = [payload for arg, payload in joined(outcome, "part") if arg == "image/png"]
    assert shown == [bytes(range(256)) * 100] * 20
    assert set(outcome.stdout) <= set(b"x\n")


def test_figures_of_matplotlib_come_as_pictures_without_a_word(driver: Driver) -> None:
    if driver.run("import matplotlib").status != "ok":
        pytest.skip("the python3 of this machine has no matplotlib")
    outcome = driver.run("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    pictures = [p for arg, p in joined(outcome, "part") if arg == "image/png"]
    assert [p[:4] for p in pictures] == [b"\x89PNG"]
    assert not joined(driver.run("1"), "display")


def test_completion_and_inspection(driver: Driver) -> None:
    driver.run("def area(width, height=2):\n    'How large it is.'\nvalue_of_it = [1]")
    frame = driver.ask("complete", "value_of")
    assert frame.arg == "0,8"
    assert "value_of_it" in frame.text.split("\n")
    frame = driver.ask("complete", "x = value_of_it.app")
    assert (frame.arg, frame.text) == ("16,19", "append")
    assert "collections" in driver.ask("complete", "import collec").text.split("\n")
    frame = driver.ask("inspect", "area(1, ")
    assert frame.arg == "found"
    assert "area(width, height=2)" in frame.text
    assert "How large it is." in frame.text
    assert driver.ask("inspect", "nothing_of_it").arg == "none"


def test_a_cell_that_comes_twice_runs_once(driver: Driver) -> None:
    driver.run("n = 0")
    driver.send("run", "same", "n += 1")
    driver.send("run", "same", "n += 1")
    driver.wait_for("done", "same")
    assert driver.run("n").result == "1"


def test_main_is_the_users_own_and_pickles(driver: Driver) -> None:
    code = "import pickle\nclass A: x = 1\npickle.loads(pickle.dumps(A())).x"
    assert driver.run(code).result == "1"
    assert driver.run("__name__").result == "'__main__'"
    names = driver.run("sorted(n for n in globals() if not n.startswith('_'))").result
    assert names == "['A', 'pickle']"
    assert driver.run(
        "import os; 'MADANG_NONCE' in os.environ or 'DRIVER' in os.environ"
    ).result == ("False")


def test_threads_write_after_their_cell(driver: Driver) -> None:
    driver.run(
        "import threading\ngo = threading.Event()\n"
        "def work(): go.wait(); print('from a thread')\n"
        "thread = threading.Thread(target=work); thread.start()"
    )
    outcome = driver.run("go.set(); thread.join()")
    assert outcome.stdout == b"from a thread\n"


def test_figures_of_a_cell_are_measured(driver: Driver) -> None:
    figures = driver.run("data = bytearray(60 << 20)\nfor _ in range(10**6): pass").figures
    assert figures["mem_bytes"] > 60 << 20
    assert figures["wall_us"] > 1000
    assert set(figures) == {"wall_us", "cpu_us", "mem_bytes"}


def test_large_output_and_results_are_bounded_or_whole(driver: Driver) -> None:
    assert len(driver.run("print('x' * 5_000_000)").stdout) == 5_000_001
    [(_, text)] = joined(driver.run("'y' * 3_000_000"), "result")
    assert len(text) < 1_100_000
    assert text.endswith(b"characters more)")


def test_quit_and_the_end_of_input_end_it(driver: Driver) -> None:
    driver.run("import atexit; atexit.register(print, 'bye')")
    driver.send("quit", "-")
    assert driver.process.wait(20) == 0


def test_an_exit_in_the_cell_ends_the_process(driver: Driver) -> None:
    driver.send("run", "c", "import os; os._exit(4)")
    assert driver.process.wait(20) == 4
