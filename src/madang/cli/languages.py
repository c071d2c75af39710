"""``madang run LANGUAGE …`` and ``madang languages``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import click

from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, print_table
from madang.client.sync import Client
from madang.wire.errors import InvalidRequest
from madang.wire.image import ImageStatus
from madang.wire.languages import Language
from madang.wire.session import HOST_IMAGE

SET_OFF: Final = "madang.set_off"
"""In the context of a command: whether ``--`` came before its words."""
_OPTIONS: Final = ("--build-options", "--run-options")


class LanguageOrCommand(click.Command):
    """Tells a command that was set off by ``--`` from words that may be a language's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        rest = super().parse_args(ctx, args)
        command = ctx.params.get("command") or ()
        before = words[: len(words) - len(command)]
        ctx.meta[SET_OFF] = before[-1:] == ["--"]
        return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What follows the language's name."""

    code: str | None = None
    files: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    build_options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()


def talks(client: Client, words: tuple[str, ...], *, set_off: bool) -> Language | None:
    """The language of a console, where *words* name no more than that; None: a command."""
    if set_off or len(words) > 1:
        return None
    from madang.kit.languages import find

    language = find(client.list_languages(), words[0] if words else "python")
    return language if language is not None and language.cells else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """What the words of a command mean."""

    argv: tuple[str, ...]
    source: str = ""
    """A file that it needs, if any."""
    language: Language | None = None
    """None: it is a command."""


def command_of(client: Client, words: tuple[str, ...], *, set_off: bool, sync: bool) -> Meant:
    """Of *words*: a language if ``-c`` or a source file comes after its name, else a command."""
    if set_off or len(words) < 2 or not _may_be_code(words[1]):
        return Meant(argv=words)
    from madang.kit.languages import code_command, file_command, find

    language = find(client.list_languages(), words[0])
    if language is None:
        return Meant(argv=words)
    found = read_code(language, words[1:], sync=sync)
    if found is None:
        return Meant(argv=words)
    if found.code is not None:
        argv = code_command(language, found.code, found.arguments)
        return Meant(argv=argv, language=language)
    argv = file_command(
        language,
        found.files,
        found.arguments,
        build_options=found.build_options,
        run_options=found.run_options,
    )
    return Meant(argv=argv, source=found.files[0], language=language)


def image_of(client: Client, language: Language) -> str:
    """The image that has its recipe's name, if there is one and it is ready; else the host's."""
    wanted = language.image or language.name
    ready = (x.name for x in client.list_images() if x.status is ImageStatus.READY)
    return wanted if wanted in ready else HOST_IMAGE


def _may_be_code(word: str) -> bool:
    """Whether it is worth asking the server for its languages."""
    option = word == "-c" or word.partition("=")[0] in _OPTIONS
    return option or (not word.startswith("-") and ("." in word or os.path.isfile(word)))


def read_code(language: Language, words: Sequence[str], *, sync: bool) -> Code | None:
    """None if it is no code of *language* but options of a program of that name."""
    options: dict[str, tuple[str, ...]] = {}
    files: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, given, value = word.partition("=")
        if word == "-c" and not files:
            if not rest:
                raise InvalidRequest("-c: the code is missing.")
            if options:
                raise InvalidRequest(f"{next(iter(options))} is for files, not for -c.")
            return Code(code=rest[0], arguments=_arguments(rest[1:]))
        if name in _OPTIONS:
            if not given and not rest:
                raise InvalidRequest(f"{name}: the options are missing.")
            options[name] = _split(name, value if given else rest.pop(0))
        elif word == "--":
            rest.insert(0, word)
            break
        elif files and (word.startswith("-") or not _is_source(language, word, sync=sync)):
            raise InvalidRequest(
                f"{word!r} is no file here. Arguments of the program come after `--`, options of "
                "the compiler with --build-options."
            )
        elif word.startswith("-") or not _is_source(language, word, sync=sync):
            return None
        else:
            files.append(_inside(word))
            if not language.build:
                break
    if not files:
        return None
    return Code(
        files=tuple(files),
        arguments=_arguments(rest),
        build_options=options.get("--build-options", ()),
        run_options=options.get("--run-options", ()),
    )


def _arguments(rest: Sequence[str]) -> tuple[str, ...]:
    return tuple(rest[1:] if rest[:1] == ["--"] else rest)


def _split(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise InvalidRequest(f"{option}: {text!r} can't be split into words: {exc}.") from exc


def _is_source(language: Language, word: str, *, sync: bool) -> bool:
    if os.path.isfile(word):
        return True
    named = word.endswith(language.suffixes)
    if named and sync:
        raise InvalidRequest(f"{word} is not here. Name a {language.title} file.")
    return named


def _inside(word: str) -> str:
    """As the session sees it."""
    path = os.path.relpath(word)
    if path.startswith("../"):
        raise InvalidRequest(
            f"{word} lies outside the working directory, so it is not sent. Go to its folder."
        )
    return path


@click.command()
@click.option("--image", metavar="NAME", help="Say which versions this image has.")
@json_option
def languages(image: str | None, as_json: bool) -> None:
    """List the languages that `madang run LANGUAGE` knows.

    With --image, a session looks which of them that image has; `--image host` is the machine's
    own system.
    """
    with connect(load()) as client:
        found = client.list_languages()
        versions = None if image is None else _versions(client, found, image)
    if as_json:
        print_json(found if versions is None else versions)
    elif versions is None:
        print_table(("LANGUAGE", "TITLE", "ALIASES", "FILES", "CELLS"), [_row(x) for x in found])
    else:
        print_table(("LANGUAGE", "VERSION"), sorted(versions.items()))


def _row(language: Language) -> tuple[str, ...]:
    cells = "-" if not language.cells else "with state" if language.state else "each alone"
    return (
        language.name,
        language.title,
        " ".join(language.aliases) or "-",
        " ".join(language.suffixes),
        cells,
    )


def _versions(client: Client, languages: Sequence[Language], image: str) -> dict[str, str]:
    from madang.kit.languages import version_command

    with client.run(version_command(languages), image=image or HOST_IMAGE) as run:
        text = b"".join(record.data for record in run).decode(errors="replace")
        run.wait()
    lines = [line.partition("\t") for line in text.splitlines()]
    return {name: version.strip() for name, tab, version in lines if tab}
