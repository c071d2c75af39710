"""``madang login``, ``logout``, ``whoami``, ``passwd`` and ``totp``."""

from __future__ import annotations

import socket
import sys
import time

import click

from madang.cli.config import load, save_server
from madang.cli.context import connect, json_option, print_json
from madang.cli.printable import printable
from madang.cli.terminal import is_terminal
from madang.client import people
from madang.client.address import Address
from madang.client.sync import Client
from madang.kit.secret import Secret
from madang.wire.errors import InvalidRequest, OtpNeeded
from madang.wire.people import Acceptance, LoginReply, LoginRequest, PasswordChange


@click.command()
@click.argument("url")
@click.option("--user", metavar="NAME", help="Log in with a password.")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@click.option("--otp", metavar="CODE", help="Code of the second factor, or a recovery code.")
@click.option("--invitation", metavar="CODE", help="Choose a name and a password by an invitation.")
@click.option("--token-stdin", is_flag=True, help="Store a token that is read from stdin.")
def login(
    url: str,
    user: str | None,
    password_stdin: bool,
    otp: str | None,
    invitation: str | None,
    token_stdin: bool,
) -> None:
    """Choose the server that commands talk to, and log in.

    A password makes a token for this machine, kept readable by you alone; `madang logout` revokes
    it. Without --user and --token-stdin you are asked.
    """
    address = Address.parse(url)
    if not token_stdin and user is None and invitation is None and is_terminal(0):
        user = str(
            click.prompt("User (empty: give a token)", default="", err=True, show_default=False)
        )
    if invitation is not None:
        reply = _accept(address, invitation, user or "", from_stdin=password_stdin)
    elif user:
        reply = _by_password(address, user, otp or "", from_stdin=password_stdin)
    else:
        reply = None
    if reply is not None and not reply.token:
        print(f"the password of {reply.user} is set; log in with --user {reply.user} --otp CODE")
        return
    token = Secret(reply.token if reply else _read_token(from_stdin=token_stdin))
    with Client(str(address), token) as client:
        who = client.whoami()
    path = save_server(str(address), token=token)
    print(f"logged in to {address} as {who.user} ({who.role}); kept in {path}")


def _by_password(address: Address, user: str, otp: str, *, from_stdin: bool) -> LoginReply:
    password = _read_password("Password", from_stdin=from_stdin)
    with Client(str(address)) as client:
        request = LoginRequest(user=user, password=password, otp=otp, token=_this_machine())
        try:
            return client.call(people.login(request))
        except OtpNeeded:
            if otp or not is_terminal(0):
                raise
        code = str(click.prompt("Code of the second factor", err=True)).strip()
        request = LoginRequest(user=user, password=password, otp=code, token=_this_machine())
        return client.call(people.login(request))


def _accept(address: Address, code: str, user: str, *, from_stdin: bool) -> LoginReply:
    if not user and is_terminal(0) and not from_stdin:
        user = str(
            click.prompt(
                "Name (empty: to set a new password)", default="", err=True, show_default=False
            )
        )
    password = _read_password("New password", from_stdin=from_stdin, twice=True)
    use = Acceptance(code=code, user=user, password=password, token=_this_machine())
    with Client(str(address)) as client:
        return client.call(people.accept(use))


def _this_machine() -> str:
    """Name of the token: where it lies."""
    host = "".join(c for c in socket.gethostname() if c.isascii() and c.isprintable())
    return f"login on {host[:60] or 'a machine'}"


def _read_password(what: str, *, from_stdin: bool, twice: bool = False) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not is_terminal(0):
        raise InvalidRequest("no terminal to ask for the password: use --password-stdin.")
    return str(click.prompt(what, hide_input=True, confirmation_prompt=twice, err=True))


def _read_token(*, from_stdin: bool) -> str:
    if from_stdin:
        text = sys.stdin.readline().strip()
    elif is_terminal(0):
        text = str(click.prompt("Token", hide_input=True, err=True)).strip()
    else:
        raise InvalidRequest("no terminal to ask for the token: use --token-stdin.")
    if not text or not text.isascii() or not text.isprintable():
        raise InvalidRequest("the token is empty or has characters that no token has.")
    return text


@click.command()
def logout() -> None:
    """Revoke the token of this machine, at once, and forget it."""
    config = load()
    if config.token is None:
        raise InvalidRequest("there is no token to revoke; key pairs: `madang token revoke`.")
    if config.borrowed:
        text = (
            "the token is the server's own, in its state folder; only that machine's owner ends it."
        )
        raise InvalidRequest(text)
    with connect(config) as client:
        who = client.whoami()
        client.call(people.logout())
    save_server(config.url, path=config.path)
    print(f"logged out {who.user} from {config.url}; token {printable(who.token)} is revoked")


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Say who the server takes you for, and what your token may do."""
    config = load()
    with connect(config) as client:
        who = client.whoami()
    if as_json:
        print_json(who)
        return
    print(f"{who.user} ({who.role}) with {who.kind} {printable(who.token)} at {config.url}")
    if who.domain:
        print(f"domain    {who.domain}")
    if who.projects:
        print(
            "projects  " + ", ".join(_project(p.project, p.role, who.project) for p in who.projects)
        )
    if who.scopes:
        print("scopes    " + " ".join(who.scopes))
    if who.expires_at is not None:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(who.expires_at))
        print(f"expires   {stamp}")


def _project(name: str, role: str, default: str) -> str:
    notes = [
        note for note, given in (("default", name == default), (role, role == "admin")) if given
    ]
    return f"{name} ({', '.join(notes)})" if notes else name


@click.command()
@click.option("--password-stdin", is_flag=True, help="Read the old and the new one, a line each.")
def passwd(password_stdin: bool) -> None:
    """Change your password; all your other logins end."""
    old = _read_password("Present password (empty: none yet)", from_stdin=password_stdin)
    new = _read_password("New password", from_stdin=password_stdin, twice=True)
    with connect() as client:
        client.call(people.change_password(PasswordChange(old=old, new=new)))
    print("the password is changed; other logins have ended")


@click.group()
def totp() -> None:
    """A second factor: codes of an authenticator at each login."""


@totp.command("on")
@click.option("--password-stdin", is_flag=True, help="Read password and first code, a line each.")
def totp_on(password_stdin: bool) -> None:
    """Set it up; it is in force once its first code was right."""
    password = _read_password("Password", from_stdin=password_stdin)
    with connect() as client:
        draft = client.call(people.start_totp(password))
        print(f"secret  {draft.secret}\nuri     {draft.uri}", flush=True)
        if password_stdin:
            code = sys.stdin.readline().strip()
        else:
            code = str(click.prompt("Code that the authenticator shows", err=True)).strip()
        found = client.call(people.confirm_totp(code))
    print("in force. Recovery codes, each good for one login; keep them apart:")
    for each in found.codes:
        print(f"  {each}")


@totp.command("off")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
def totp_off(password_stdin: bool) -> None:
    """Do without it again."""
    password = _read_password("Password", from_stdin=password_stdin)
    with connect() as client:
        client.call(people.stop_totp(password))
    print("logins need no second factor any more")
