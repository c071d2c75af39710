"""``madang up``, ``down``, ``server``, ``doctor``, ``config``."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NoReturn

import click

from madang.daemon import config as configuration
from madang.daemon.settings import Settings
from madang.kit import codec

_config = click.option(
    "--config", "path", metavar="FILE", help="Settings (TOML); `madang config path` says which."
)
_state = click.option("--state", metavar="DIR", help="State folder.")


def _load(path: str | None, **flags: object) -> configuration.Configuration:
    named = {f"server.{name}": value for name, value in flags.items()}
    return configuration.load(path=path, flags=named)


@click.command()
@_config
@_state
@click.option("--host", metavar="ADDRESS", help="Address to listen on; loopback if not given.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes any free one.")
@click.option("-d", "--detach", is_flag=True, help="Go to the background once it is ready.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground (the default).")
@click.option("--runtime", type=click.Choice(["native", "process"]), hidden=True)
def up(path: str | None, detach: bool, foreground: bool, **flags: object) -> None:
    """Start Madang on this machine.

    Sessions go on when it stops, and are found again when it starts.
    """
    if detach and foreground:
        raise click.UsageError("--detach and --foreground exclude each other.")
    settings = _load(path, **flags).settings
    _warn_open(settings)
    _execute_supervisor(settings, detach)


def _warn_open(settings: Settings) -> None:
    if settings.server.host not in {"127.0.0.1", "::1", "localhost"}:
        text = f"! {settings.server.host}: calls and tokens travel unencrypted; put a TLS proxy"
        click.echo(f"{text} in front, or listen on 127.0.0.1 and use an SSH tunnel.", err=True)
    if settings.server.runtime == "process":
        click.echo("! runtime «process»: sessions are not isolated; for tests only.", err=True)


def _execute_supervisor(settings: Settings, detach: bool) -> NoReturn:
    """Become the supervisor: a fresh interpreter that has loaded nothing else."""
    word = {
        "settings": codec.to_builtins(settings),
        "registries": configuration.registries_text(settings),
        "detach": detach,
        "client": client_file(),
        "at": time.time(),
    }
    fd = os.memfd_create("settings", 0)  # inherited
    os.write(fd, json.dumps(word).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "madang.daemon.supervisor", str(fd)])


def client_file() -> str:
    """Where this user's commands look for their server."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.environ.get("MADANG_CONFIG") or os.path.join(folder, "madang", "client.toml")


@click.command()
@_config
@_state
@click.option("--keep-sessions", is_flag=True, help="Let sessions run on; `up` finds them again.")
@click.option("--timeout", type=click.FloatRange(1, 3600), default=60, show_default=True,
              help="Seconds for sessions to end before they are killed.")  # fmt: skip
def down(path: str | None, state: str | None, keep_sessions: bool, timeout: float) -> None:
    """Stop Madang on this machine, and its sessions."""
    from madang.daemon import stopping

    folder = _load(path, state=state).settings.server.state
    sys.exit(stopping.down(folder, keep_sessions=keep_sessions, timeout_s=timeout))


@click.command()
@_config
@_state
@click.option("--host", metavar="ADDRESS", help="Address to listen on; loopback if not given.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes any free one.")
def server(path: str | None, **flags: object) -> None:
    """Run the server alone: no supervisor, and no sessions on this machine."""
    from madang.daemon import alone

    settings = _load(path, **flags).settings
    _warn_open(settings)
    alone.run(settings)


@click.command()
@_config
@_state
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(path: str | None, state: str | None, as_json: bool) -> None:
    """Say what this machine can and can't do, and how to mend it.

    Exit code 1 if sessions can't run here.
    """
    from madang.daemon import doctor as examination

    findings = examination.examine(_load(path, state=state).settings)
    if as_json:
        click.echo(codec.to_json(findings).decode())
    else:
        for line in examination.report(findings):
            click.echo(line)
    sys.exit(0 if examination.healthy(findings) else 1)


@click.group()
def config() -> None:
    """Settings of the server."""


@config.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(path: str | None, as_json: bool) -> None:
    """All settings: value, where it comes from, meaning."""
    found = configuration.load(path=path).shown()
    if as_json:
        click.echo(codec.to_json(found).decode())
        return
    width = max(len(f"{line.name} = {line.value}") for line in found)
    for line in found:
        click.echo(f"{f'{line.name} = {line.value}':{width}}  [{line.origin}]  {line.meaning}")


@config.command(name="path")
@_config
def show_path(path: str | None) -> None:
    """The file that is read, if it exists."""
    click.echo(path or configuration.default_path(os.environ))


@config.command()
@_config
def check(path: str | None) -> None:
    """Read all settings; exit 122 where one is wrong."""
    found = configuration.load(path=path)
    origin = found.path if os.path.exists(found.path) else "defaults (there is no file)"
    click.echo(f"✓ {origin}")
