"""``madang login`` and ``whoami``."""

from __future__ import annotations

import sys

import click

from madang.cli.config import load, save_server
from madang.cli.context import connect, json_option, print_json
from madang.cli.terminal import is_terminal
from madang.client.address import Address
from madang.client.sync import Client
from madang.kit.secret import Secret
from madang.wire.errors import InvalidRequest


@click.command()
@click.argument("url")
@click.option("--token-stdin", is_flag=True, help="Read the token from stdin.")
def login(url: str, token_stdin: bool) -> None:
    """Choose the server that commands talk to, and store its token (0600)."""
    address = Address.parse(url)
    token = Secret(_read_token(from_stdin=token_stdin))
    with Client(str(address), token) as client:
        who = client.whoami()
    path = save_server(str(address), token=token)
    print(f"logged in to {address} as {who.user} ({who.role}); kept in {path}")


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
@json_option
def whoami(as_json: bool) -> None:
    """Say who the server takes you for."""
    config = load()
    with connect(config) as client:
        who = client.whoami()
    if as_json:
        print_json(who)
    else:
        print(f"{who.user} ({who.role}) with token {who.token} at {config.url}")
