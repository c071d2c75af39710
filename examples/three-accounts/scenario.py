"""Three accounts share one machine: limits, borrowing, giving back, priorities, refusals.

For a server of your own that nobody else uses meanwhile, with one machine: `madang up`, then with
the address and an administrator's token in the environment

    MADANG_URL=… MADANG_TOKEN=… python3 scenario.py

Ann is in the project vision, Ben and Cleo are in speech; each project deserves half of the machine.
What was changed for the scenario is put back at its end; the accounts stay, disabled.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import ExitStack

from madang.client import Client, people
from madang.wire.errors import PlatformError
from madang.wire.limits import LimitsDraft
from madang.wire.people import Acceptance, ProjectDraft, UserChange, UserDraft
from madang.wire.queue import Why
from madang.wire.session import Session, SessionSpec, SessionStatus, SizeRequest

GROUP = """
priority_max = 5
reserve_after = "1s"
[preempt]
min_run = "1s"
grace = "1s"
"""
SHARE = 'version = 1\n[[deserved]]\ncpu = "{cpu}"\n'
STUDENT = 'version = 1\nsessions = 3\n[session]\ncpu = "{cpu}"\n'
WAIT_S = 60.0


def say(text: str) -> None:
    print(text, flush=True)


def start(client: Client, name: str, cpu: float, priority: int | None = None) -> Session:
    size = SizeRequest(cpu=cpu, mem_bytes=64 << 20, disk_bytes=64 << 20, pids=32)
    argv = ("sleep", "600")
    return client.create_session(SessionSpec(argv=argv, name=name, size=size, priority=priority))


def settle(client: Client, name: str, *wanted: SessionStatus) -> Session:
    """The session once it is in one of these statuses."""
    session = client.wait_session(name, until=wanted, timeout_s=WAIT_S)
    if session.status not in wanted:
        why = f": {session.pending.text}" if session.pending is not None else ""
        raise SystemExit(f"{name} is {session.status}, not {' or '.join(wanted)}{why}")
    return session


def explained(client: Client, name: str) -> Why:
    """Why it waits, once the scheduler has looked at it."""
    until = time.monotonic() + WAIT_S
    while (why := client.why(name)).pending is None and time.monotonic() < until:
        time.sleep(0.05)
    return why


def refused(client: Client, name: str, cpu: float, priority: int | None = None) -> None:
    try:
        start(client, name, cpu, priority)
    except PlatformError as exc:
        say(f"  refused ({exc.code}): {exc.text}")
    else:
        raise SystemExit(f"{name} was not refused")


class Yard:
    """What the administrator sets up, and takes down again."""

    def __init__(self, admin: Client, url: str, stack: ExitStack) -> None:
        self.admin = admin
        self.url = url
        self.stack = stack
        self.mark = secrets.token_hex(2)
        (node,) = admin.list_nodes()
        self.half = int(node.capacity.cpu * 500) / 1000

    def rules(self) -> None:
        self.stack.callback(self._set_group, self.admin.get_group("default").text)
        self._set_group(GROUP)

    def _set_group(self, text: str) -> None:
        version = self.admin.get_group("default").version
        self.admin.put_group("default", text, version=version)

    def limits(self, name: str, text: str, target: str) -> None:
        name = f"{name}-{self.mark}"
        self.admin.apply_limits(name, LimitsDraft(text=text, note="three accounts"))
        self.stack.callback(self.admin.remove_limits, name)
        self.admin.assign_limits(target, name)
        self.stack.callback(self.admin.assign_limits, target, None)

    def project(self, name: str) -> str:
        """With half of the machine as its share."""
        name = f"{name}-{self.mark}"
        self.admin.call(people.add_project(ProjectDraft(name=name)))
        self.limits(name, SHARE.format(cpu=self.half), f"project:{name}")
        return name

    def account(self, name: str, project: str) -> Client:
        """Somebody who has used the invitation that the administrator gave them."""
        name = f"{name}-{self.mark}"
        made = self.admin.call(people.add_user(UserDraft(name=name, project=project)))
        self.stack.callback(
            self.admin.call, people.change_user(name, UserChange(disabled=True), version=None)
        )
        password = secrets.token_urlsafe(16)
        use = Acceptance(code=made.code, password=password, token="laptop")  # noqa: S106 - a name
        with Client(self.url) as nobody:
            token = nobody.call(people.accept(use)).token
        client = self.stack.enter_context(Client(self.url, token))
        self.stack.callback(self._remove_sessions, client)
        return client

    def _remove_sessions(self, client: Client) -> None:
        for session in client.list_sessions(ended=True):
            client.remove(session.id, force=True)


def scenario(yard: Yard) -> None:
    yard.rules()
    half = yard.half
    vision, speech = yard.project("vision"), yard.project("speech")
    ann, ben, cleo = (
        yard.account(name, project)
        for name, project in (("ann", vision), ("ben", speech), ("cleo", speech))
    )
    yard.limits("student", STUDENT.format(cpu=half), f"user:cleo-{yard.mark}")
    say(f"two projects, each deserves {half:g} cores: ann in vision, ben and cleo in speech")

    say("borrowing: nobody else is here, so ben has the whole machine")
    for name in ("first", "second"):
        start(ben, name, half)
        settle(ben, name, SessionStatus.RUNNING)
    say(f"  ben's first and second run with {half:g} cores each")

    say("giving back: ann asks for what vision deserves")
    start(ann, "mine", half)
    settle(ann, "mine", SessionStatus.RUNNING)
    for session in ben.list_sessions(ended=True):
        if session.status is not SessionStatus.RUNNING:
            ended = settle(ben, session.name, SessionStatus.TERMINATED).ended
            assert ended is not None
            say(f"  ann's mine runs; ben's {session.name} ended ({ended.reason}): {ended.text}")

    say("refusals: cleo's limits and the group's say no at once, and why")
    refused(cleo, "huge", half * 2)
    refused(cleo, "urgent", half, priority=99)

    say("the queue: two wait; ben asked later, with a higher priority")
    start(cleo, "patient", half)
    start(ben, "important", half, priority=5)
    for client, name in ((ben, "important"), (cleo, "patient")):
        why = explained(client, name)
        text = why.pending.text if why.pending is not None else ""
        say(f"  place {why.place} of {why.waiting}: {name}: {text}")
        for option in why.options:
            say(f"    {option.text}")

    say("ann leaves: the first in the queue starts, and is told in whose share")
    ann.stop("mine")
    settle(ben, "important", SessionStatus.RUNNING)
    say("  ben's important runs; cleo's patient waits on")

    say("who used what, as the ledger has it")
    for line in yard.admin.get_usage(("project", "user")).lines:
        if yard.mark in line.by["project"]:
            whose = f"{line.by['project']}, {line.by['user']}"
            say(f"  {whose}: {line.intervals} runs, {line.cpu_core_s:.1f} core-seconds")


def main() -> None:
    url, token = os.environ["MADANG_URL"], os.environ["MADANG_TOKEN"]
    with ExitStack() as stack:
        admin = stack.enter_context(Client(url, token))
        scenario(Yard(admin, url, stack))


if __name__ == "__main__":
    main()
