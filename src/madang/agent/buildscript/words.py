"""What a build session can do: ``build.pyz WORD …``, its exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from madang.agent.buildscript import archives, bootstrap, main, pull, ship
from madang.agent.buildscript.main import Exit, Places

NEXT_STEP = main.NEXT_STEP | {
    Exit.NETWORK: "The registry can't be reached from builds. One with a private address, or with "
    "http, must be named in the file of the setting images.registries.",
}


def run(arguments: Sequence[str], places: Places | None = None) -> int:
    where = places or Places()
    word, *rest = arguments
    if word == "pip":
        return main.run(rest, where)
    return main.guarded(_WORDS[word](where, rest), NEXT_STEP)


def _pull(places: Places, rest: list[str]) -> Callable[[], None]:
    parser = argparse.ArgumentParser(prog="pull")
    parser.add_argument("reference")
    parser.add_argument("--platform", default="")
    parser.add_argument("--login", action="store_true")
    given = parser.parse_args(rest)
    return lambda: pull.pull(places, given.reference, given.platform, login=given.login)


def _import(places: Places, rest: list[str]) -> Callable[[], None]:
    parser = argparse.ArgumentParser(prog="import")
    parser.add_argument("--reference", default="")
    parser.add_argument("--platform", default="")
    given = parser.parse_args(rest)
    return lambda: archives.take_in(places, given.reference, given.platform)


def _push(places: Places, rest: list[str]) -> Callable[[], None]:
    parser = argparse.ArgumentParser(prog="push")
    parser.add_argument("reference")
    parser.add_argument("--login", action="store_true")
    given = parser.parse_args(rest)
    return lambda: ship.push(places, given.reference, login=given.login)


def _export(places: Places, rest: list[str]) -> Callable[[], None]:
    parser = argparse.ArgumentParser(prog="export")
    parser.add_argument("name")
    given = parser.parse_args(rest)
    return lambda: ship.export(places, given.name)


def _debian(places: Places, rest: list[str]) -> Callable[[], None]:
    parser = argparse.ArgumentParser(prog="debian")
    parser.add_argument("suite")
    given = parser.parse_args(rest)
    return lambda: bootstrap.run(places, given.suite)


def _check(places: Places, rest: list[str]) -> Callable[[], None]:
    return lambda: pull.check(places, rest)


_WORDS: dict[str, Callable[[Places, list[str]], Callable[[], None]]] = {
    "pull": _pull,
    "import": _import,
    "push": _push,
    "export": _export,
    "check": _check,
    "debian": _debian,
}
