"""Rules that count calls or answer them, kept by the guard: see ``notify``."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from madang.agent.launcher.guard_files import Tell
from madang.agent.launcher.notify import Listener, Request, known
from madang.wire.policy import Answer, AnswerRule, CountRule, strictest
from madang.wire.policy_live import MAX_RATE_LIMIT

_UTS_FIELD: Final = 65
_SYSINFO: Final = struct.Struct("=q3Q6QHxxxxxx2QI4x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is so of a session, where no rule says otherwise."""

    hostname: str
    used_bytes: Callable[[], int]
    mem_bytes: int


@dataclass(slots=True)
class _Span:
    """The newest calls that passed under a rule with ``per_s``."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RATE_LIMIT))

    def is_full(self, rule: CountRule, now: float) -> bool:
        assert rule.per_s is not None
        while self.times and self.times[0] <= now - rule.per_s:
            self.times.popleft()
        return len(self.times) >= rule.limit


class Calls:
    def __init__(
        self, listener: Listener, handed_over: Iterable[str], truth: Truth, tell: Tell
    ) -> None:
        self._listener = listener
        self._names = known(tuple(handed_over))
        self._truth = truth
        self._tell = tell
        self._passed: Counter[str] = Counter()
        """In the session's life, whatever the rules were."""
        self._spans: dict[tuple[tuple[str, ...], float], _Span] = {}
        self._counts: tuple[CountRule, ...] = ()
        self._answers: dict[str, AnswerRule] = {}

    def fileno(self) -> int:
        return self._listener.fileno()

    def replace(self, counts: Iterable[CountRule], answers: Iterable[AnswerRule]) -> None:
        """What was counted so far stays counted."""
        self._counts = tuple(strictest(counts))
        keys = {(rule.calls, rule.per_s) for rule in self._counts if rule.per_s is not None}
        self._spans = {key: self._spans.get(key, _Span()) for key in keys}
        self._answers = {}
        for rule in answers:  # The first layer's word stays: a later one can't take it back.
            self._answers.setdefault(rule.call, rule)

    def ready(self) -> None:
        request = self._listener.receive()
        if request is not None:
            self._answer(request, self._names.get(request.number, ""))

    def _answer(self, request: Request, call: str) -> None:
        now = time.monotonic()
        full = (rule for rule in self._counts if call in rule.calls and self._is_full(rule, now))
        rule = next(full, None)
        if rule is not None:
            self._tell(rule, rule.of or call, f"more than {_limit(rule)}", request.tid)
        if rule is not None and rule.answer is not Answer.LOG:
            self._refuse(request, rule)
            return
        self._passed[call] += 1
        for key, span in self._spans.items():
            if call in key[0]:
                span.times.append(now)
        answer = self._answers.get(call)
        if answer is None or not self._give(request, answer):
            self._listener.pass_on(request)

    def _is_full(self, rule: CountRule, now: float) -> bool:
        if rule.per_s is not None:
            return self._spans[rule.calls, rule.per_s].is_full(rule, now)
        return sum(self._passed[call] for call in rule.calls) >= rule.limit

    def _refuse(self, request: Request, rule: CountRule) -> None:
        if rule.answer is Answer.KILL:
            self._kill(request)
        self._listener.fail(request, rule.code)

    def _kill(self, request: Request) -> None:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(_process_of(request.tid))
            try:
                if self._listener.still_waits(request):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    # -- answers -----------------------------------------------------------------------------

    def _give(self, request: Request, rule: AnswerRule) -> bool:
        """False: the call shall be done after all."""
        if rule.call == "uname":
            return self._write(request, request.arguments[0], self._uname(rule), 0)
        if rule.call == "sysinfo":
            return self._write(request, request.arguments[0], self._sysinfo(rule), 0)
        assert rule.cpus is not None
        size = -(-rule.cpus // 64) * 8
        room = request.arguments[1] & 0xFFFF_FFFF
        if room < size or room % 8:
            self._listener.fail(request, errno.EINVAL)
            return True
        mask = ((1 << rule.cpus) - 1).to_bytes(size, "little")
        return self._write(request, request.arguments[2], mask, size)

    def _write(self, request: Request, address: int, data: bytes, value: int) -> bool:
        """Into the caller's own memory, where it said; then the call gives *value*."""
        try:
            memory = os.open(f"/proc/{request.tid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            self._listener.fail(request, errno.EFAULT)
            return True
        try:
            if self._listener.still_waits(request):  # So the descriptor is of who asked.
                os.pwrite(memory, data, address)
                self._listener.give(request, value)
        except (OSError, OverflowError):
            self._listener.fail(request, errno.EFAULT)
        finally:
            os.close(memory)
        return True

    def _uname(self, rule: AnswerRule) -> bytes:
        ours = os.uname()
        shown = (
            ours.sysname,
            rule.nodename or self._truth.hostname,
            rule.release or ours.release,
            rule.version or ours.version,
            ours.machine,
            "(none)",
        )
        return b"".join(text.encode()[: _UTS_FIELD - 1].ljust(_UTS_FIELD, b"\0") for text in shown)

    def _sysinfo(self, rule: AnswerRule) -> bytes:
        total = rule.mem_bytes or self._truth.mem_bytes
        free = max(0, total - self._truth.used_bytes())
        up = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        loads = (int(load * 65536) for load in os.getloadavg())
        return _SYSINFO.pack(up, *loads, total, free, 0, 0, 0, 0, 1, 0, 0, 1)


def _limit(rule: CountRule) -> str:
    return f"{rule.limit}" if rule.per_s is None else f"{rule.limit} in {rule.per_s:.15g} s"


def _process_of(tid: int) -> int:
    with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    raise ProcessLookupError(errno.ESRCH, "no such thread")
