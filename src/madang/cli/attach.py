"""``madang attach``, ``exec`` and ``shell``."""

from __future__ import annotations

import click

from madang.cli.config import ClientConfig, load
from madang.cli.context import connect
from madang.cli.follow import Follower, feeds_stdin
from madang.cli.options import environment, parse_environment
from madang.cli.phases import explain_end, show_end
from madang.cli.terminal import Notes, is_terminal, window
from madang.client.requests import exec_spec
from madang.wire import exits
from madang.wire.kernel import WORK_DIR, ExecSpec
from madang.wire.size import parse_bytes

_CONTEXT = "4k"
_SHELL = ("sh", "-c", "command -v bash >/dev/null && exec bash; exec sh -i")


@click.command()
@click.argument("name")
@click.option(
    "--tail", metavar="SIZE", default=_CONTEXT, show_default=True, help="Begin so far back."
)
@click.option("--all", "everything", is_flag=True, help="Begin with the first output kept.")
@click.option("--no-stdin", is_flag=True, help="Only watch.")
def attach(name: str, tail: str, everything: bool, no_stdin: bool) -> int:
    """Follow a session's program: its output, and our input if it takes any.

    With a terminal (run -t), Ctrl-P Ctrl-Q detaches; otherwise Ctrl-C asks.
    """
    config = load()
    notes = Notes(plain=config.plain)
    tail_bytes = None if everything else parse_bytes(tail, field="tail")
    with connect(config) as client:
        session = client.get_session(name)
        stdin = session.stdin and not no_stdin and (is_terminal(0) or feeds_stdin(None))
        with client.attach(session.id, tail_bytes=tail_bytes) as stream:
            if session.tty and is_terminal(0):
                stream.resize(*window(0))
            left = Follower(stream, notes, stdin=stdin, tty=session.tty).follow()
            if left is not None:
                return left
            session = stream.wait()
    show_end(notes, session)
    return exits.of_session(session)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option(
    "-i/ ", "--stdin/--no-stdin", default=None, help="Feed our stdin. Default: if a pipe."
)
@click.option("--cwd", default=WORK_DIR, show_default=True, help="Its working directory.")
@environment
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    tty: bool,
    stdin: bool | None,
    cwd: str,
    env: tuple[str, ...],
    name: str,
    command: tuple[str, ...],
) -> int:
    """Run one more program in a running session; its exit code is ours.

    \b
    madang exec calm-otter -- nvidia-smi
    """
    config = load()
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("no command: madang exec NAME -- COMMAND.")
    spec = exec_spec(
        command,
        env=parse_environment(env, terminal=config.terminal if tty else None),
        cwd=cwd,
        tty=tty,
        stdin=stdin is not False and (tty or feeds_stdin(stdin)),
        window=window(0),
    )
    return _execute(config, name, spec)


@click.command()
@click.argument("name")
def shell(name: str) -> int:
    """Open a shell in a running session (bash, or sh where there is none)."""
    config = load()
    tty = is_terminal(0)
    env = {"TERM": config.terminal} if tty else {}
    spec = exec_spec(_SHELL, env=env, tty=tty, stdin=True, window=window(0))
    return _execute(config, name, spec)


def _execute(config: ClientConfig, name: str, spec: ExecSpec) -> int:
    with connect(config) as client, client.exec_spec(name, spec) as stream:
        notes = Notes(plain=config.plain)
        left = Follower(stream, notes, stdin=spec.stdin, tty=spec.tty).follow()
        if left is not None:
            return left
        ended = stream.wait()
    if explanation := explain_end(ended):
        notes.line("why", explanation)
    return exits.of_ended(ended)
