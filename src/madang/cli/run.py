"""``madang run``."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click

from madang.cli.config import load
from madang.cli.context import connect, print_json
from madang.cli.follow import Follower, feeds_stdin
from madang.cli.languages import SET_OFF, LanguageOrCommand, command_of, image_of, talks
from madang.cli.options import (
    environment,
    parse_environment,
    parse_grace,
    parse_labels,
    read_policy,
)
from madang.cli.outputs import fetch_outputs
from madang.cli.phases import Phases, describe_size, show_end
from madang.cli.printable import printable
from madang.cli.syncing import Syncing
from madang.cli.terminal import Notes, is_terminal, window
from madang.cli.wishes import wishes, with_wishes
from madang.client.requests import encode_argv, network_request, session_spec, size_request
from madang.client.sync import Client
from madang.kit.codec import to_json
from madang.wire import exits
from madang.wire.errors import InvalidRequest, WorkspaceIncomplete
from madang.wire.session import HOST_IMAGE, RootMode, Session, SessionSpec, SessionStatus


@click.command(
    cls=LanguageOrCommand,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
@click.option(
    "--image", metavar="NAME", help="Image to run from. Default: host, the machine's own."
)
@click.option("--preset", metavar="NAME", help="A size by name, like small; see `preset ls`.")
@click.option("--cpu", metavar="N", help="Cores, like 0.5 or 2.")
@click.option("--mem", metavar="SIZE", help="Memory, like 512m or 2g.")
@click.option("--pids", type=int, metavar="N", help="Processes and threads at once.")
@click.option("--disk", metavar="SIZE", help="Disk for everything it writes, like 10g.")
@click.option("--time", "time_limit", metavar="TIME", help="Stop it after this long, like 2h.")
@click.option("--grace", metavar="TIME", help="Between SIGTERM and SIGKILL when it is stopped.")
@click.option("--name", help="Name of the session; made up if not given.")
@click.option("--project", metavar="NAME", help="Project it belongs to. Default: yours.")
@environment
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Label; may be repeated.")
@click.option("--policy", metavar="FILE", help="Sandbox policy that makes it stricter.")
@click.option("--runtime", metavar="NAME", help="What starts its programs, like crun.")
@click.option("--writable", is_flag=True, help="Let it change its image's root, for itself.")
@click.option("--root", is_flag=True, help="The same, and programs believe they are root.")
@click.option("--network", type=click.Choice(["none", "full"]), help="Network. Default: none.")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="Network: only this; repeat.")
@click.option("--bandwidth", metavar="RATE", help="Bits/s of the network each way, like 100mbit.")
@wishes
@click.option("--learn", is_flag=True, help="Write down what it uses, for `policy learn`.")
@click.option("--entry", is_flag=True, help="Run the image's own program; ours are arguments.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal. Ctrl-P Ctrl-Q detaches.")
@click.option(
    "-i/ ",
    "--stdin/--no-stdin",
    default=None,
    help="Feed our stdin. Default: if it is a pipe. Without a command: a console.",
)
@click.option("-d", "--detach", is_flag=True, help="Start it and print its name.")
@click.option("--sync/--no-sync", default=None, help="Send the working directory. Default: yes.")
@click.option("--sync-limit", metavar="SIZE", default="512m", show_default=True, help="Largest.")
@click.option("--output", metavar="DIR", help="Where outputs go. Default: runs/NAME.")
@click.option("--no-output", is_flag=True, help="Leave outputs in the session.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="No lines of ours but errors.")
@click.option("--json", "as_json", is_flag=True, help="The session as JSON at the end, on stderr.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    image: str | None,
    preset: str | None,
    cpu: str | None,
    mem: str | None,
    pids: int | None,
    disk: str | None,
    time_limit: str | None,
    grace: str | None,
    name: str | None,
    project: str | None,
    env: tuple[str, ...],
    labels: tuple[str, ...],
    policy: str | None,
    runtime: str | None,
    writable: bool,
    root: bool,
    network: str | None,
    allow: tuple[str, ...],
    bandwidth: str | None,
    learn: bool,
    entry: bool,
    tty: bool,
    stdin: bool | None,
    detach: bool,
    sync: bool | None,
    sync_limit: str,
    output: str | None,
    no_output: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    command: tuple[str, ...],
    **asked: Any,
) -> int:
    """Run a program in a session of its own and follow it.

    The working directory is sent along (see .madangignore), the program's output and exit code are
    the command's, and what it leaves in $MADANG_OUTPUTS comes back to runs/NAME. Without a
    command the session is idle: use exec, shell, put and get.

    LANGUAGE -c CODE runs a piece of code, LANGUAGE FILE… [-- ARGUMENT…] builds and runs files, with
    --build-options and --run-options before them; `madang languages` lists them. The image that has
    the language's name is chosen, if there is one. After `--` stands a command. -i alone, or with a
    LANGUAGE, opens a console (see `madang console`) in a session that ends with it.

    \b
    madang run -i --image torch
    madang run -- python3 train.py
    madang run r -c 'print(1+1)'
    madang run c --build-options '-O2 -lm' main.c util.c -- 10
    madang run --preset small --time 2h -- python3 train.py
    madang run --cpu 2 --mem 4g --image torch -- python3 train.py --epochs 3
    madang run -t -- bash
    madang run --image tool --entry -- --help
    madang run --allow data.example.org:443 --allow files.example.org:443 -- python fetch.py
    """
    config = load()
    grace_s = parse_grace(grace)
    spec = session_spec(
        name=name,
        project=project or "",
        image=image or HOST_IMAGE,
        size=size_request(cpu=cpu, mem=mem, pids=pids, disk=disk, time=time_limit),
        preset=preset or "",
        env=parse_environment(env, terminal=config.terminal if tty else None),
        labels=parse_labels(labels),
        tty=tty,
        stdin=not detach and stdin is not False and (tty or feeds_stdin(stdin)),
        window=window(0) if is_terminal(0) else window(2),
        grace_s=10.0 if grace_s is None else grace_s,
        policy=_policy(policy, learn=learn),
        runtime=runtime or "",
        network=network_request(network, allow, bandwidth),
    )
    spec = replace(with_wishes(spec, **asked), root=_root(writable=writable, root=root))
    notes = Notes(quiet=quiet or as_json, plain=config.plain)
    syncing = Syncing(config, notes, asked=sync, limit=sync_limit)
    set_off = click.get_current_context().meta[SET_OFF]
    with connect(config) as client:
        language = talks(client, command, set_off=set_off) if stdin and not detach else None
        if language is not None:
            command = ()
        meant = command_of(client, command, set_off=set_off, sync=sync is not False)
        words, encoding = encode_argv(meant.argv)
        spec = replace(spec, argv=words, argv_encoding=encoding)
        if image is None and (named := language or meant.language) is not None:
            spec = replace(spec, image=image_of(client, named))
        if entry:
            spec = _with_entry(client, spec)
        if dry_run:
            return _dry_run(client, spec, as_json=as_json)
        where = None if no_output else (output or "")

        def go(spec: SessionSpec) -> int:
            if language is not None:
                return _converse(client, spec, language.name, notes, output=where)
            if detach or not spec.argv:
                return _start(client, spec, notes, as_json=as_json)
            return _follow(client, spec, notes, output=where, as_json=as_json)

        try:
            return go(_with_source(syncing.apply(client, spec), meant.source, asked=sync))
        except WorkspaceIncomplete:  # not there any more, or this is another server
            return go(syncing.apply(client, spec, again=True))


def _with_entry(client: Client, spec: SessionSpec) -> SessionSpec:
    """Run what the image says: its entry point, with our arguments or else its own."""
    said = client.get_image(spec.image).config
    entry, usual = (
        tuple(text.encode().decode(spec.argv_encoding) for text in texts)
        for texts in (said.entrypoint, said.cmd)
    )
    argv = (*entry, *(spec.argv or usual))
    if not argv:
        raise InvalidRequest(f"image {spec.image} says no program to run; give one after --.")
    return replace(spec, argv=argv)


def _root(*, writable: bool, root: bool) -> RootMode:
    if root:
        return RootMode.FAKE
    return RootMode.WRITABLE if writable else RootMode.READ_ONLY


def _with_source(spec: SessionSpec, source: str, *, asked: bool | None) -> SessionSpec:
    """Refuses to run a source file that was not sent along."""
    if source and asked is None and spec.workspace is None:
        raise InvalidRequest(f"{source} was not sent. Put it into a folder of its own, or --sync.")
    return spec


def _policy(path: str | None, *, learn: bool) -> str:
    """The text of the session's own layer."""
    text = "" if path is None else read_policy(path)
    if learn:
        from madang.kit.learning import with_learning

        text = with_learning(text)
    return text


def _dry_run(client: Client, spec: SessionSpec, *, as_json: bool) -> int:
    from madang.cli.queue import describe

    session = client.create_session(spec, dry_run=True)
    if as_json:
        print_json(session)
        return 0
    network = f" · network {session.network}" if session.network else ""
    print(f"plan   {session.image} · {describe_size(session.size)}{network}")
    for label, text in describe(client.preview(spec)):
        print(f"{label:<6} {printable(text)}")
    return 0


def _start(client: Client, spec: SessionSpec, notes: Notes, *, as_json: bool) -> int:
    """Create and leave: the name alone on stdout."""
    session = client.create_session(replace(spec, stdin=False))
    if as_json:
        print_json(session)
        return 0
    Phases(notes).show(session)
    print(session.name)
    notes.line("next", f"madang logs -f {session.name} · madang stop {session.name}")
    return 0


def _converse(
    client: Client, spec: SessionSpec, language: str, notes: Notes, *, output: str | None
) -> int:
    """A session that lives as long as somebody types into it."""
    from madang.cli.console import Console

    session = client.create_session(replace(spec, stdin=False))
    phases = Phases(notes)
    detached = False
    try:
        session = client.wait_session(session.id, until=[SessionStatus.RUNNING])
        phases.show(session)
        if session.status is not SessionStatus.RUNNING:
            show_end(notes, session)
            return exits.of_session(session)
        with client.cells(session.id, language) as cells:
            console = Console(client, cells, notes)
            code = console.run()
            detached = console.detached
    finally:
        if not detached:
            client.stop(session.id, grace_s=1.0)
    if detached:
        notes.line("next", f"madang console {session.name} · madang stop {session.name}")
        return code
    session = client.wait_session(session.id)
    if output is not None:
        fetch_outputs(client, session, output, notes)
    return code


def _follow(
    client: Client, spec: SessionSpec, notes: Notes, *, output: str | None, as_json: bool
) -> int:
    phases = Phases(notes)
    with client.run_spec(spec) as stream:
        follower = Follower(
            stream,
            notes,
            stdin=spec.stdin,
            tty=spec.tty,
            on_session=phases.show,
            on_tick=phases.tick,
        )
        left = follower.follow()
        if left is not None:
            return left
        session = stream.wait()
    show_end(notes, session)
    if output is not None:
        fetch_outputs(client, session, output, notes)
    return _finish(session, as_json=as_json)


def _finish(session: Session, *, as_json: bool) -> int:
    if as_json:
        sys.stderr.write(to_json(session).decode() + "\n")
    return exits.of_session(session)
