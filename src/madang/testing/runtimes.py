"""What every runtime must do, as tests: subclass ``RuntimeConformance`` and give it ``sessions``.

>>> class TestNative(RuntimeConformance):
...     @pytest.fixture
...     async def sessions(self) -> AsyncIterator[Sessions]: ...

Guarantees that a runtime does not claim (``RuntimeFacts.enforced``) are not asked for; the test is
skipped with that reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from madang.agent import files
from madang.agent.keepers import KeeperNews
from madang.agent.launcher import registry
from madang.agent.launcher.offers import (
    PROCESS_COUNTS,
    PROGRAMS_ALONE,
    RAW_ARGUMENTS,
    WHOLE_WRITES,
)
from madang.agent.refusals import read_refusals
from madang.agent.runtime import layout
from madang.agent.runtime.contract import Found
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import HOST, PYTHON, Sessions, read_output, spec
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import (
    Conflict,
    HostLacks,
    InvalidRequest,
    NetworkRefused,
    PlatformError,
    PolicyUnkept,
    RuntimeFailed,
    SessionNotRunning,
)
from madang.wire.kernel import ExecSpec, KernelId
from madang.wire.link import Resize, StdinEnd
from madang.wire.network import Network, NetworkMode
from madang.wire.policy import NO_SANDBOX, FileRule, Sandbox
from madang.wire.session import Reason
from madang.wire.size import KIB, MIB

SLEEP = ("/bin/sleep", "1000")
UNKNOWN = KernelId("0123456789abcdef", 1)


def need(sessions: Sessions, limit: str) -> None:
    """Skip unless the runtime enforces *limit*."""
    if not sessions.holds(limit):
        how = sessions.facts.enforced.get(limit, "none")
        pytest.skip(f"this runtime does not hold {limit} here ({how})")


def need_promise(sessions: Sessions, promise: str) -> None:
    """Skip if the runtime can't keep *promise* (see ``offers.LACKS``)."""
    if why := sessions.lacks(promise):
        pytest.skip(f"{sessions.chosen} lacks {promise}: {why}")


class RuntimeConformance:
    """The contract, one promise a test."""

    # -- a program and its end -------------------------------------------------------------------

    async def test_a_program_runs_and_its_streams_stay_apart(self, sessions: Sessions) -> None:
        done = await sessions.run("/bin/sh", "-c", "echo out; echo err >&2; exit 7")

        assert (done.out, done.err) == (b"out\n", b"err\n")
        assert (done.ended.reason, done.code, done.ended.signal) == (Reason.EXIT, 7, None)
        assert 0 <= done.ended.duration_s < PATIENCE_S
        assert abs(done.ended.at - time.time()) < PATIENCE_S

    async def test_a_signal_is_told_as_a_shell_would(self, sessions: Sessions) -> None:
        done = await sessions.run("/bin/sh", "-c", "kill -SEGV $$")

        assert (done.ended.reason, done.code) == (Reason.SIGNAL, 128 + signal.SIGSEGV)
        assert done.ended.signal == signal.SIGSEGV
        assert "SIGSEGV" in done.ended.text

    @pytest.mark.parametrize(
        ("argv", "cwd", "code", "text"),
        [
            (("no-such-program",), "/work", 127, "no such program: no-such-program"),
            (("/no/such/program",), "/work", 127, "no such program"),
            (("/etc/hostname",), "/work", 126, "can't execute"),
            (("/usr",), "/work", 126, "can't execute"),
            (("true",), "/no/such/folder", 126, "working directory"),
            (("",), "/work", 127, "no such program"),
        ],
    )
    async def test_what_can_not_be_executed_ends_like_in_a_shell(
        self, sessions: Sessions, argv: tuple[str, ...], cwd: str, code: int, text: str
    ) -> None:
        done = await sessions.run(*argv, cwd=cwd)

        assert (done.ended.reason, done.code) == (Reason.EXIT, code)
        assert text in done.ended.text

    async def test_arguments_and_variables_arrive_byte_for_byte(self, sessions: Sessions) -> None:
        need_promise(sessions, RAW_ARGUMENTS)
        raw = bytes(range(1, 256)).decode("latin-1")
        show = "import os, sys; os.write(1, os.fsencode(sys.argv[1]) + os.environb[b'V'])"

        done = await sessions.run(
            *PYTHON, show, raw, argv_encoding="latin-1", env={"V": "grüße", "MADANG": "0"}
        )

        assert done.out == bytes(range(1, 256)) + "grüße".encode()

    async def test_arguments_and_variables_arrive_as_text(self, sessions: Sessions) -> None:
        text = "grüße, 日本語 \U0001f40d \"'\\ \n\t\x01\x7f"
        show = "import os, sys; os.write(1, os.fsencode(sys.argv[1]) + os.environb[b'V'])"

        done = await sessions.run(*PYTHON, show, text, env={"V": text})

        assert done.out == text.encode() * 2

    async def test_output_is_kept_byte_for_byte(self, sessions: Sessions) -> None:
        code = (
            "import sys\n"
            "for n in range(40):\n"
            "    file = (sys.stdout, sys.stderr)[n % 2].buffer\n"
            "    file.write(bytes(range(256)) * 1000)\n"
            "    file.flush()"
        )
        done = await sessions.python(code)

        assert done.out == done.err == bytes(range(256)) * 20_000

    async def test_a_write_is_not_cut_short(self, sessions: Sessions) -> None:
        need_promise(sessions, WHOLE_WRITES)
        done = await sessions.python(
            "import os, sys\nfor n in range(40): os.write(1 + n % 2, bytes(range(256)) * 1000)"
        )

        assert done.out == done.err == bytes(range(256)) * 20_000

    async def test_large_arguments_pass_and_larger_ones_are_refused(
        self, sessions: Sessions
    ) -> None:
        most = [100_000 * "x"] * 10
        done = await sessions.python("import sys; print(sum(map(len, sys.argv)))", *most)
        assert int(done.out) > 1_000_000

        with pytest.raises(PlatformError, match="bytes"):
            await sessions.python("pass", *most * 10)

    @pytest.mark.parametrize("bad", [("a\0b",), ("true", "x\0")])
    async def test_a_nul_byte_is_refused(self, sessions: Sessions, bad: tuple[str, ...]) -> None:
        with pytest.raises(InvalidRequest, match="NUL"):
            await sessions.run(*bad)

    async def test_the_environment_tells_where_things_are(self, sessions: Sessions) -> None:
        done = await sessions.run(
            "/bin/sh", "-c", "touch $MADANG_OUTPUTS/a $HOME/b ./c && echo $MADANG $OMP_NUM_THREADS",
            cpu=1.5,
        )  # fmt: skip
        assert done.out == b"1 2\n"

    # -- input, terminal -------------------------------------------------------------------------

    async def test_without_stdin_the_input_is_at_its_end(self, sessions: Sessions) -> None:
        assert (await sessions.run("/bin/cat")).code == 0

    async def test_input_reaches_the_program_and_ends(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/usr/bin/sha256sum", stdin=True)
        data = os.urandom(3 * MIB)

        feed = await sessions.keepers.stdin(sessions.io(kernel))
        await feed.write(data)
        await feed.write(StdinEnd())
        done = await sessions.outcome(kernel)
        await feed.close()

        assert done.out.split()[0].decode() == hashlib.sha256(data).hexdigest()

    async def test_a_terminal_has_a_size_that_can_change(self, sessions: Sessions) -> None:
        script = "trap 'stty size; exit 5' WINCH; test -t 0 && stty size; while :; do sleep 1; done"
        kernel = await sessions.start("/bin/bash", "-c", script, tty=True, stdin=True, rows=30)
        await sessions.until(kernel, b"30 80")

        feed = await sessions.keepers.stdin(sessions.io(kernel))
        await feed.write(Resize(rows=50, cols=132))
        done = await sessions.outcome(kernel)
        await feed.close()

        assert b"50 132" in done.out
        assert done.code == 5

    async def test_typing_into_a_terminal_interrupts(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/cat", tty=True, stdin=True)
        feed = await sessions.keepers.stdin(sessions.io(kernel))
        await feed.write(b"hello\n")
        await sessions.until(kernel, b"hello")

        await feed.write(b"\x03")
        done = await sessions.outcome(kernel)
        await feed.close()

        assert done.ended.signal == signal.SIGINT

    # -- stopping --------------------------------------------------------------------------------

    async def test_a_program_that_ignores_sigterm_is_killed_after_the_grace(
        self, sessions: Sessions
    ) -> None:
        kernel = await sessions.start("/bin/sh", "-c", "trap '' TERM; echo on; sleep 1000 & wait")
        await sessions.until(kernel, b"on")

        await sessions.keepers.stop(
            sessions.io(kernel), reason="user", text="stopped by ada", grace_s=0.2
        )
        done = await sessions.outcome(kernel)

        assert done.ended.reason == Reason.USER
        assert "ada" in done.ended.text
        assert done.ended.duration_s < 10

    async def test_a_program_may_end_itself_in_the_grace(self, sessions: Sessions) -> None:
        script = "trap 'echo saved; exit 4' TERM; echo on; while :; do sleep 0.05; done"
        kernel = await sessions.start("/bin/sh", "-c", script)
        await sessions.until(kernel, b"on")

        await sessions.keepers.stop(sessions.io(kernel), reason="user", text="", grace_s=20)
        done = await sessions.outcome(kernel)

        assert (done.ended.reason, done.code) == (Reason.USER, 4)
        assert done.out == b"on\nsaved\n"

    async def test_the_time_limit_stops_it(self, sessions: Sessions) -> None:
        done = await sessions.run(*SLEEP, time_s=0.3, grace_s=5)

        assert done.ended.reason == Reason.TIMEOUT
        assert "--time" in done.ended.text
        assert 0.3 <= done.ended.duration_s < 10

    async def test_kill_ends_everything_at_once(self, sessions: Sessions) -> None:
        kernel = await sessions.start(
            "/bin/sh", "-c", "(setsid sleep 1000 &) ; echo on; sleep 1000"
        )
        await sessions.until(kernel, b"on")

        await sessions.runtime.kill(kernel)
        done = await sessions.outcome(kernel)
        await sessions.runtime.kill(kernel)

        assert done.ended.signal == signal.SIGKILL
        assert not await running(sessions, kernel)

    async def test_what_detaches_itself_ends_with_the_main_program(
        self, sessions: Sessions
    ) -> None:
        code = (
            "import os, time\n"
            "if os.fork(): os.wait(); os._exit(0)\n"
            "os.setsid()\n"
            "if os.fork(): os._exit(0)\n"
            "for fd in (0, 1, 2): os.close(fd)\n"
            "while True: open('alive', 'w'); time.sleep(0.01)"
        )
        done = await sessions.python(code)

        assert done.code == 0
        assert done.ended.duration_s < 10

    async def test_a_program_that_closes_its_output_goes_on(self, sessions: Sessions) -> None:
        done = await sessions.run("/bin/sh", "-c", "exec >&- 2>&- ; sleep 0.3; touch kept; exit 6")
        assert done.code == 6
        assert done.ended.duration_s >= 0.3

    async def test_output_of_a_background_process_does_not_hold_the_end(
        self, sessions: Sessions
    ) -> None:
        done = await sessions.run("/bin/sh", "-c", "sleep 1000 & echo started")

        assert done.out == b"started\n"
        assert done.ended.duration_s < 10

    # -- output without end ----------------------------------------------------------------------

    async def test_much_output_is_bounded_and_the_last_is_kept(self, sessions: Sessions) -> None:
        limit = 8 * MIB
        kernel = await sessions.start(
            "/bin/sh", "-c", "head -c 60000000 /dev/zero; echo the end", log_limit_bytes=limit
        )
        done = await sessions.outcome(kernel)
        kept = sum(path.stat().st_size for path in Path(sessions.io(kernel), "log").iterdir())

        assert done.code == 0
        assert done.out.endswith(b"the end\n")
        assert kept <= limit + MIB

    # -- doing it twice, doing it wrong ----------------------------------------------------------

    async def test_prepare_and_start_again_change_nothing(self, sessions: Sessions) -> None:
        asked = spec("/bin/sh", "-c", "echo x >> count; echo on; sleep 1000")
        kernel = await sessions.prepare(asked)
        await sessions.runtime.prepare(kernel, asked)
        first = await sessions.runtime.start(kernel, asked)
        await sessions.until(kernel, b"on")

        again = await asyncio.gather(*(sessions.runtime.start(kernel, asked) for _ in range(3)))
        await sessions.runtime.prepare(kernel, asked)

        assert {started.at for started in again} == {first.at}
        assert await content(sessions, kernel, "count") == b"x\n"

    async def test_a_start_after_the_end_does_not_run_it_again(self, sessions: Sessions) -> None:
        asked = spec("/bin/sh", "-c", "echo x >> count")
        kernel = await sessions.prepare(asked)
        await sessions.runtime.start(kernel, asked)
        await sessions.gone(kernel)
        await sessions.runtime.start(kernel, asked)
        await sessions.outcome(kernel)

        with pytest.raises(PlatformError):
            await sessions.runtime.start(kernel, asked)

        assert await content(sessions, kernel, "count") == b"x\n"

    async def test_what_is_unknown_is_an_error_in_words(self, sessions: Sessions) -> None:
        for failing in (
            sessions.runtime.start(UNKNOWN, spec("true")),
            sessions.runtime.settle(UNKNOWN),
            sessions.runtime.files(UNKNOWN),
        ):
            with pytest.raises(PlatformError, match=str(UNKNOWN)):
                await failing
        await sessions.runtime.kill(UNKNOWN)
        await sessions.runtime.remove(UNKNOWN)

    async def test_settle_again_tells_the_same_end(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/sh", "-c", "exit 9")
        await sessions.gone(kernel)

        ends = [await sessions.runtime.settle(kernel) for _ in range(2)]

        assert ends[0] == ends[1]
        assert ends[0].exit_code == 9

    async def test_remove_ends_and_deletes_and_may_be_repeated(self, sessions: Sessions) -> None:
        kernel = await sessions.start(*SLEEP)
        folder = sessions.runtime.kernel_dir(kernel)

        await asyncio.gather(*(sessions.runtime.remove(kernel) for _ in range(3)))
        await sessions.runtime.remove(kernel)

        assert not os.path.exists(folder)
        assert kernel not in {found.kernel for found in await sessions.runtime.adopt()}

    async def test_a_prepared_kernel_can_be_removed(self, sessions: Sessions) -> None:
        kernel = await sessions.prepare(spec("true"))
        await sessions.runtime.remove(kernel)
        assert not os.path.exists(sessions.runtime.kernel_dir(kernel))

    # -- execs -----------------------------------------------------------------------------------

    async def test_an_exec_runs_beside_the_main_program(self, sessions: Sessions) -> None:
        kernel = await sessions.start(*SLEEP, env={"A": "main", "B": "main"})

        done = await sessions.exec(
            kernel, "one", "/bin/sh", "-c", "echo $A $B; touch seen; exit 3", env={"B": "exec"}
        )

        assert (done.out, done.code) == (b"main exec\n", 3)
        assert await content(sessions, kernel, "seen") == b""
        assert await running(sessions, kernel)

    async def test_an_idle_kernel_lives_and_takes_execs(self, sessions: Sessions) -> None:
        kernel = await sessions.start()

        done = await asyncio.gather(
            *(sessions.exec(kernel, f"e{n}", "/bin/sh", "-c", f"exit {n}") for n in range(1, 5))
        )
        found = await find(sessions, kernel)
        await sessions.runtime.kill(kernel)
        ended = (await sessions.outcome(kernel)).ended

        assert [outcome.code for outcome in done] == [1, 2, 3, 4]
        assert set(found.execs) == {"e1", "e2", "e3", "e4"}
        assert ended.signal == signal.SIGKILL

    async def test_an_exec_that_can_not_be_executed_says_why(self, sessions: Sessions) -> None:
        kernel = await sessions.start()
        done = await sessions.exec(kernel, "bad", "no-such-program")
        assert (done.code, done.ended.text) == (127, "no such program: no-such-program")

    async def test_an_exec_where_nothing_runs_is_refused(self, sessions: Sessions) -> None:
        kernel = await sessions.prepare(spec("true"))
        with pytest.raises(SessionNotRunning):
            await sessions.runtime.exec(kernel, "early", ExecSpec(argv=("true",)))

        await sessions.runtime.start(kernel, spec("true"))
        await sessions.outcome(kernel)
        with pytest.raises(SessionNotRunning):
            await sessions.runtime.exec(kernel, "late", ExecSpec(argv=("true",)))

    async def test_an_exec_ends_with_its_kernel(self, sessions: Sessions) -> None:
        kernel = await sessions.start()
        await sessions.runtime.exec(kernel, "long", ExecSpec(argv=SLEEP))

        await sessions.runtime.kill(kernel)
        done = await sessions.outcome(kernel, "long")
        await sessions.outcome(kernel)

        assert done.ended.signal == signal.SIGKILL

    # -- files -----------------------------------------------------------------------------------

    async def test_files_can_be_put_in_before_the_start(
        self, sessions: Sessions, tmp_path: Path
    ) -> None:
        code = b"print('from the workspace')\n"
        digest = hashlib.sha256(code).hexdigest()
        (tmp_path / digest).write_bytes(code)
        file = WorkspaceFile(path="src/main.py", kind="file", size_bytes=len(code), digest=digest)
        asked = spec("/usr/bin/python3", "-I", "-S", "src/main.py")
        kernel = await sessions.prepare(asked)

        async def fetch(digest: str) -> str:
            return str(tmp_path / digest)

        await files.materialise(
            await sessions.runtime.files(kernel), WorkspaceManifest(files=(file,)), fetch
        )
        await sessions.runtime.start(kernel, asked)

        assert (await sessions.outcome(kernel)).out == b"from the workspace\n"

    async def test_files_are_shared_with_the_running_program(self, sessions: Sessions) -> None:
        script = "echo on; while ! test -s answer; do sleep 0.02; done; cat answer"
        kernel = await sessions.start("/bin/sh", "-c", script)
        await sessions.until(kernel, b"on")

        await files.write_file(await sessions.runtime.files(kernel), "answer", stream(b"42"))

        assert (await sessions.outcome(kernel)).out == b"on\n42"

    async def test_files_outlive_the_program_until_removed(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/sh", "-c", "echo model > $MADANG_OUTPUTS/model.pt")
        await sessions.outcome(kernel)

        assert await content(sessions, kernel, "/outputs/model.pt") == b"model\n"
        await sessions.runtime.remove(kernel)
        with pytest.raises(PlatformError, match=str(kernel)):
            await sessions.runtime.files(kernel)

    # -- looking ---------------------------------------------------------------------------------

    async def test_adopt_tells_what_is_there(self, sessions: Sessions) -> None:
        prepared = await sessions.prepare(spec("true"))
        live = await sessions.start(*SLEEP)
        over = await sessions.start("/bin/sh", "-c", "exit 2")
        await sessions.outcome(over)

        found = {each.kernel: each for each in await sessions.runtime.adopt()}

        assert found[prepared].prepared
        assert not found[prepared].running
        assert found[live].running
        assert found[live].started_at == pytest.approx(time.time(), abs=PATIENCE_S)
        assert not found[over].running
        ended = found[over].ended
        assert ended is not None
        assert ended.exit_code == 2

    async def test_a_change_is_hinted_at(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/sh", "-c", "sleep 0.1")
        async with asyncio.timeout(PATIENCE_S):
            while await running(sessions, kernel):
                await sessions.runtime.wait_change()

    async def test_usage_is_measured(self, sessions: Sessions) -> None:
        hold = "x = bytearray(50 << 20); print('on', flush=True)\nwhile True: pass"
        kernel = await sessions.start(*PYTHON, hold)
        await sessions.until(kernel, b"on")

        usage = await sessions.runtime.usage(kernel)

        assert (usage.mem_bytes or 0) > 40 * MIB
        assert usage.pids == 1 or sessions.lacks(PROCESS_COUNTS)
        if sessions.holds("cpu"):
            assert (usage.cpu_s or 0) > 0

    async def test_freeze_stops_and_thaw_goes_on(self, sessions: Sessions) -> None:
        need(sessions, "cpu")
        tick = "n = 0\nwhile True: n += 1; print(n, flush=True); time.sleep(0.005)"
        kernel = await sessions.start(*PYTHON, f"import time\n{tick}")
        await sessions.until(kernel, b"5\n")

        await sessions.runtime.freeze(kernel)
        frozen = read_output(sessions.io(kernel))
        await asyncio.sleep(0.2)
        still = read_output(sessions.io(kernel))
        await sessions.runtime.thaw(kernel)
        await sessions.until(kernel, f"\n{len(still[0].split()) + 20}\n".encode())

        assert len(still[0]) - len(frozen[0]) <= 20
        await sessions.runtime.freeze(kernel)
        await sessions.runtime.remove(kernel)

    async def test_what_is_frozen_uses_no_cpu_and_goes_on_when_thawed(
        self, sessions: Sessions
    ) -> None:
        count = "n = 0\nwhile True:\n  n += 1\n  if n % 100000 == 0: print(n, flush=True)"
        kernel = await sessions.start(*PYTHON, count)
        await sessions.until(kernel, b"00000\n")

        for _ in range(2):  # doing it again changes nothing
            await freeze(sessions, kernel)
        frozen = await cpu_s(sessions, kernel)
        await asyncio.sleep(0.5)  # what stands still must be watched for a while
        still = await cpu_s(sessions, kernel)
        assert await is_frozen(sessions, kernel)
        for _ in range(2):
            await sessions.runtime.thaw(kernel)
        written = len(sessions.output(kernel)[0].split())
        while len(sessions.output(kernel)[0].split()) < written + 3:
            await sessions.until(kernel, b"00000\n")

        assert still - frozen <= 0.03
        assert not await is_frozen(sessions, kernel)
        assert await cpu_s(sessions, kernel) > still

    async def test_a_frozen_session_still_gives_its_files(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/sh", "-c", "echo hello > note; echo on; sleep 1000")
        await sessions.until(kernel, b"on")
        await freeze(sessions, kernel)

        found = await listed(sessions, kernel)

        assert "note" in found
        assert await is_frozen(sessions, kernel)

    async def test_the_time_limit_goes_on_while_frozen_and_is_told(
        self, sessions: Sessions
    ) -> None:
        kernel = await sessions.start(*SLEEP, time_s=2, grace_s=20)
        await freeze(sessions, kernel)

        async with asyncio.timeout(PATIENCE_S):
            async with aclosing(sessions.keepers.watch(sessions.io(kernel))) as told:
                async for news in told:
                    if news.stopping:
                        break
            async with aclosing(sessions.keepers.watch(sessions.io(kernel))) as again:
                assert any([news.stopping async for news in first(again, 2)])
        await sessions.runtime.thaw(kernel)
        done = await sessions.outcome(kernel)

        assert (done.ended.reason, done.code) == (Reason.TIMEOUT, 143)

    async def test_what_does_not_run_can_not_be_frozen(self, sessions: Sessions) -> None:
        kernel = await sessions.start("/bin/true")
        await sessions.outcome(kernel)

        with pytest.raises(Conflict):
            await sessions.runtime.freeze(kernel)

    async def test_a_network_is_given_or_refused_in_words(self, sessions: Sessions) -> None:
        """Never left out in silence."""
        asked = spec("/bin/true", network=Network(mode=NetworkMode.FULL))
        with pytest.raises((NetworkRefused, HostLacks), match="network"):
            await sessions.prepare(asked)

    # -- live rules ------------------------------------------------------------------------------

    async def test_live_rules_come_and_go_while_it_runs(self, sessions: Sessions) -> None:
        look = "if cat secret 2> error > seen; then echo open; else echo shut; fi"
        script = f"echo x > secret; while sleep 0.02; do {look}; done"
        kernel = await sessions.start("/bin/sh", "-c", script)
        await sessions.until(kernel, b"open")
        rule = FileRule(layer="site", line=3, patterns=("/work/secret",))

        try:
            later = await sessions.runtime.guard(kernel, Sandbox(files=(rule,), label="site 1"))
        except (PolicyUnkept, HostLacks) as exc:
            assert await running(sessions, kernel)
            pytest.skip(exc.text)
        assert later == ()
        done = await sessions.exec(kernel, "once", "/bin/cat", "/work/secret")
        assert (done.code, done.out) == (1, b""), "it was in force at once"
        await sessions.until(kernel, b"shut")
        assert await sessions.runtime.guard(kernel, NO_SANDBOX) == ()
        await sessions.until(kernel, b"shut\nopen")

        await sessions.runtime.kill(kernel)
        await sessions.outcome(kernel)
        (found,) = read_refusals(sessions.io(kernel))
        assert (found.layer, found.line, found.object) == ("site", 3, "/work/secret")

    async def test_no_live_rules_are_kept_anywhere_and_none_once_it_has_ended(
        self, sessions: Sessions
    ) -> None:
        kernel = await sessions.start(*SLEEP)
        assert await sessions.runtime.guard(kernel, NO_SANDBOX) == ()
        await sessions.runtime.kill(kernel)
        await sessions.outcome(kernel)
        with pytest.raises(Conflict):
            await sessions.runtime.guard(kernel, NO_SANDBOX)

    async def test_many_at_once_all_come_through(self, sessions: Sessions) -> None:
        done = await asyncio.gather(
            *(sessions.run("/bin/sh", "-c", f"echo {n}; exit {n}") for n in range(12))
        )
        assert [(each.out, each.code) for each in done] == [(b"%d\n" % n, n) for n in range(12)]

    async def test_sessions_have_files_of_their_own(self, sessions: Sessions) -> None:
        first = await sessions.start("/bin/sh", "-c", "echo secret > mine; echo on; sleep 1000")
        await sessions.until(first, b"on")

        second = await sessions.run("/bin/sh", "-c", "ls -A")

        assert second.out == b""

    # -- limits ----------------------------------------------------------------------------------

    async def test_the_memory_limit_is_told_with_limit_and_peak(self, sessions: Sessions) -> None:
        need(sessions, "mem")
        done = await sessions.python("x = bytearray(200 << 20)", mem_bytes=64 * MIB)

        assert (done.ended.reason, done.code) == (Reason.OOM, 137)
        assert done.ended.oom_kills == 1
        assert "64 MiB" in done.ended.text
        assert "--mem" in done.ended.text
        assert 60 * MIB < (done.ended.mem_peak_bytes or 0) <= 65 * MIB

    async def test_a_child_killed_for_memory_is_told_too(self, sessions: Sessions) -> None:
        need(sessions, "mem")
        need_promise(sessions, PROGRAMS_ALONE)
        code = (
            "import os\n"
            "if os.fork() == 0: x = bytearray(200 << 20)\n"
            "print(os.waitstatus_to_exitcode(os.wait()[1]))"
        )
        done = await sessions.python(code, mem_bytes=64 * MIB)

        assert (done.ended.reason, done.code, done.out) == (Reason.EXIT, 0, b"-9\n")
        assert "1 child process was killed" in done.ended.text

    async def test_shared_memory_counts(self, sessions: Sessions) -> None:
        need(sessions, "mem")
        done = await sessions.run(
            "/bin/sh", "-c", "head -c 200m /dev/zero > /dev/shm/x", mem_bytes=64 * MIB
        )
        assert done.code != 0
        assert (done.ended.mem_peak_bytes or 0) <= 65 * MIB

    async def test_a_fork_bomb_is_held_and_told(self, sessions: Sessions) -> None:
        need(sessions, "pids")
        need_promise(sessions, PROCESS_COUNTS)
        code = (
            "import os, time\n"
            "made = 0\n"
            "try:\n"
            "    while True:\n"
            "        if os.fork() == 0: time.sleep(1000)\n"
            "        made += 1\n"
            "finally: print(made)"
        )
        done = await sessions.python(code, pids=20)

        assert (done.ended.reason, done.out) == (Reason.PIDS, b"19\n")
        assert done.ended.pids_denied >= 1
        assert "--pids" in done.ended.text

    async def test_threads_count_as_processes(self, sessions: Sessions) -> None:
        need(sessions, "pids")
        need_promise(sessions, PROCESS_COUNTS)
        code = (
            "import threading, time\n"
            "for n in range(100):\n"
            "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        )
        pids = max(10, sessions.least.pids)
        assert (await sessions.python(code, pids=pids)).ended.reason == Reason.PIDS

    async def test_the_disk_limit_is_held_and_told(self, sessions: Sessions) -> None:
        need(sessions, "disk")
        done = await sessions.run("/bin/sh", "-c", "head -c 100m /dev/zero > big")

        assert done.ended.reason == Reason.DISK
        assert "--disk" in done.ended.text
        assert b"No space left" in done.err
        assert (done.ended.disk_used_bytes or 0) > 15 * MIB

    @pytest.mark.parametrize("folder", ["/work", "/outputs", "/home/user", "/tmp", "/var/tmp"])
    async def test_all_writable_folders_share_the_disk_limit(
        self, sessions: Sessions, folder: str
    ) -> None:
        need(sessions, "disk")
        done = await sessions.run("/bin/sh", "-c", f"head -c 100m /dev/zero > {folder}/big")
        assert done.ended.reason == Reason.DISK

    async def test_the_cpu_limit_is_held(self, sessions: Sessions) -> None:
        need(sessions, "cpu")
        burn = "import time\nend = time.time() + 1\nwhile time.time() < end: pass"
        began = time.monotonic()
        done = await sessions.python(burn, cpu=0.2)
        took_s = time.monotonic() - began  # With what the runtime itself takes.

        assert 0.05 < (done.ended.cpu_s or 0) < 0.2 * took_s + 0.2

    # -- things that are missing -----------------------------------------------------------------

    async def test_a_missing_layer_is_an_error_in_words(self, sessions: Sessions) -> None:
        need(sessions, "network")
        image = replace(HOST, name="mine", kind="layers", layers=("0" * 64,))
        asked = replace(spec("true"), image=image)
        kernel = await sessions.prepare(asked)

        with pytest.raises(RuntimeFailed, match="layer"):
            await sessions.runtime.start(kernel, asked)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("cpu", 0.0), ("cpu", math.nan), ("cpu", 1e30), ("mem_bytes", 0), ("pids", -1)],
    )
    async def test_a_size_without_sense_is_refused(
        self, sessions: Sessions, field: str, value: float
    ) -> None:
        with pytest.raises((PlatformError, ValueError)):
            await sessions.run("true", **{field: value})

    async def test_a_small_size_still_runs(self, sessions: Sessions) -> None:
        least = sessions.least
        done = await sessions.run(
            "/bin/true", cpu=0.05, mem_bytes=max(16 * MIB, least.mem_bytes),
            pids=max(4, least.pids), disk_bytes=4 * MIB, log_limit_bytes=64 * KIB,
        )  # fmt: skip
        assert done.code == 0, done.ended.text


async def find(sessions: Sessions, kernel: KernelId) -> Found:
    return next(found for found in await sessions.runtime.adopt() if found.kernel == kernel)


async def freeze(sessions: Sessions, kernel: KernelId) -> None:
    """Skip where this machine can't, and the runtime says so."""
    try:
        await sessions.runtime.freeze(kernel)
    except HostLacks as exc:
        pytest.skip(exc.text)


async def is_frozen(sessions: Sessions, kernel: KernelId) -> bool:
    return (await find(sessions, kernel)).frozen


async def listed(sessions: Sessions, kernel: KernelId) -> list[str]:
    """Names in the working directory."""
    sock = await sessions.runtime.files(kernel)
    async with aclosing(files.list_files(sock, ".")) as entries:
        return [entry.path async for entry in entries]


async def first(news: AsyncIterator[KeeperNews], count: int) -> AsyncIterator[KeeperNews]:
    """The first *count*."""
    async for each in news:
        yield each
        count -= 1
        if count == 0:
            return


async def cpu_s(sessions: Sessions, kernel: KernelId) -> float:
    """CPU time of its programs: as the runtime counts it, or else the machine for each process."""
    used = (await sessions.runtime.usage(kernel)).cpu_s
    if used is not None:
        return used
    record = registry.load(sessions.runtime.kernel_dir(kernel))
    assert record is not None
    assert record.init is not None
    total = 0
    for pid in layout.descendants(record.init.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def running(sessions: Sessions, kernel: KernelId) -> bool:
    return (await find(sessions, kernel)).running


async def content(sessions: Sessions, kernel: KernelId, path: str) -> bytes:
    """Of a file in the session; empty if it is not there."""
    sock = await sessions.runtime.files(kernel)
    try:
        async with aclosing(files.read_file(sock, path)) as items:
            return b"".join([item async for item in items if isinstance(item, bytes)])
    except PlatformError:
        return b""


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
