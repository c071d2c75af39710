"""The root command: a table of commands that are imported when used, and errors in words."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import Final

import click

from madang import __version__
from madang.cli.printable import print_error_text, printable
from madang.wire import exits
from madang.wire.errors import PlatformError

SECTIONS: Final = {
    "Run": {
        "run": ("madang.cli.run:run", "Run a program in a session of its own."),
        "languages": ("madang.cli.languages:languages", "List languages that `run` knows."),
        "exec": ("madang.cli.attach:exec_command", "Run one more program in a session."),
        "console": ("madang.cli.console:console", "Type cells into an interpreter of a session."),
        "shell": ("madang.cli.attach:shell", "Open a shell in a session."),
        "attach": ("madang.cli.attach:attach", "Follow a session: output, input, window."),
    },
    "Sessions": {
        "ps": ("madang.cli.sessions:ps", "List sessions."),
        "show": ("madang.cli.sessions:show", "Show one session: state, limits, history."),
        "logs": ("madang.cli.logs:logs", "Print a session's output."),
        "top": ("madang.cli.top:top", "Watch what sessions use."),
        "freeze": ("madang.cli.sessions:freeze", "Freeze sessions: no CPU until input comes."),
        "thaw": ("madang.cli.sessions:thaw", "Let frozen sessions go on."),
        "protect": ("madang.cli.idling:protect", "Keep sessions from being stopped as idle."),
        "queue": ("madang.cli.queue:queue", "List waiting sessions, with reasons and estimates."),
        "why": ("madang.cli.queue:why", "Say why a session waits, how long, what would help."),
        "stop": ("madang.cli.sessions:stop", "Stop sessions."),
        "rm": ("madang.cli.sessions:rm", "Remove ended sessions with their files."),
    },
    "Files and images": {
        "put": ("madang.cli.files:put", "Copy files into a session."),
        "get": ("madang.cli.files:get", "Copy files out of a session."),
        "ls": ("madang.cli.files:ls", "List files of a session."),
        "image": ("madang.cli.image:image", "List, build and remove images."),
        "commit": ("madang.cli.recipes:commit", "Save what a session changed as an image."),
        "jupyter": ("madang.cli.jupyter:jupyter", "Sessions as kernels of Jupyter clients."),
    },
    "Administration": {
        "user": ("madang.cli.people:user", "List, invite, change and disable users."),
        "project": ("madang.cli.people:project", "Make projects, and let people into them."),
        "domain": ("madang.cli.people:domain", "List, make and disable domains."),
        "policy": ("madang.cli.policy:policy", "Show, try and apply sandbox policies."),
        "limits": ("madang.cli.limits:limits", "Who may have how much: show, write, assign."),
        "preset": ("madang.cli.presets:preset", "Sizes with a name, for `run --preset`."),
        "group": ("madang.cli.group:group", "Groups of machines and how their queues are run."),
        "reserve": ("madang.cli.reserve:reserve", "Keep machines for a project by calendar."),
        "replay": ("madang.cli.replay:replay", "Plan the past again under other settings."),
        "node": ("madang.cli.group:node", "List machines and put them into groups."),
        "audit": ("madang.cli.audit:audit", "Who did what: list, check and export the log."),
        "usage": ("madang.cli.usage:usage", "Sum up what was used, and what it costs."),
    },
    "Server": {
        "up": ("madang.daemon.commands:up", "Start Madang on this machine."),
        "down": ("madang.daemon.commands:down", "Stop Madang on this machine."),
        "server": ("madang.daemon.commands:server", "Run the server alone."),
        "doctor": ("madang.daemon.commands:doctor", "Say what this machine can do, and the mend."),
        "config": ("madang.daemon.commands:config", "Show and check the server's settings."),
    },
    "Account and help": {
        "login": ("madang.cli.account:login", "Choose a server and log in."),
        "logout": ("madang.cli.account:logout", "Revoke and forget this machine's token."),
        "whoami": ("madang.cli.account:whoami", "Say who the server takes you for."),
        "token": ("madang.cli.people:token", "List, make and revoke tokens and key pairs."),
        "passwd": ("madang.cli.account:passwd", "Change your password."),
        "totp": ("madang.cli.account:totp", "Set up a second factor, or do without."),
        "explain": ("madang.cli.explain:explain", "Explain an error code or the exit codes."),
    },
}
COMMANDS: Final = {name: row for rows in SECTIONS.values() for name, row in rows.items()}


class LazyGroup(click.Group):
    """Knows its commands' names and one line of help each; imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(_unknown(name))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for section, rows in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(f"{name:{width}}", text) for name, (_, text) in rows.items()])


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    guess = f" Do you mean `madang {near[0]}`?" if near else ""
    return f"no command {name!r}.{guess} `madang --help` lists all."


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="First steps: `madang up`, then `madang run -- python3 train.py`.",
)
@click.version_option(__version__, prog_name="madang")
def root() -> None:
    """Share machines for machine learning: isolated sessions that start in milliseconds."""


def run(args: list[str]) -> int:
    """Do one command line; the exit code."""
    _open_standard_streams()
    try:
        result = root.main(args, prog_name="madang", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    except PlatformError as exc:
        print_error(exc)
        return exits.of_error(exc)
    except OSError as exc:
        return _failed(exc)
    return result if isinstance(result, int) else 0


def _open_standard_streams() -> None:
    """Give closed ones a null device, or a socket of ours would get their number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - for as long as we live
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def print_error(error: PlatformError) -> None:
    """What failed, and where to read more."""
    print_error_text(error.text)
    sys.stderr.write(f"       more: madang explain {printable(error.code)}\n")


def _closed_pipe() -> int:
    """Whoever read our output has gone: end as other programs do, without a traceback."""
    _drop_output()
    return exits.CLOSED_PIPE


def _failed(error: OSError) -> int:
    """This machine refused something, such as room for our output: no fault of the server."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    with contextlib.suppress(OSError):
        print_error_text(f"{where}{error.strerror or error} (on this machine)")
        sys.stderr.flush()
    _drop_output()
    return exits.INTERNAL


def _drop_output() -> None:
    """What is still buffered goes nowhere, or the interpreter would fail again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
