"""Languages: manifests are read, and become commands of a session.

The shipped ones lie in ``runner/languages``; a server may have more in a folder of its own, each
``NAME.toml`` with its driver beside it. How one is written: docs/howto/add-a-language.md.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, Final

import madang.runner
from madang.wire.errors import InvalidRequest, LanguageInvalid, LanguageUnknown
from madang.wire.languages import Language

SHIPPED: Final = os.path.join(os.path.dirname(madang.runner.__file__), "languages")
DRIVERS: Final = os.path.join(os.path.dirname(madang.runner.__file__), "drivers")
MAX_MANIFEST_BYTES: Final = 16 * 1024
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
"""Linux takes no longer argument or variable of the environment."""

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")
_ALIAS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+#-]{0,30}")
_DRIVER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
_PROGRAM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+|-]{0,90}")
_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9+]{1,10}")
_LISTS: Final = re.compile(r"\$(FILES|OPTIONS)\b")
_KEYS: Final = {key.name: key for key in fields(Language)}

log = logging.getLogger(__name__)


def parse(text: str, name: str) -> Language:
    """A manifest; *name* is its file's, without the suffix. Raises LanguageInvalid."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise LanguageInvalid(f"language {name!r}: {exc}.") from exc
    if unknown := table.keys() - _KEYS.keys() - {"name"}:
        known = ", ".join(key for key in _KEYS if key != "name")
        raise LanguageInvalid(
            f"language {name!r}: there is no key {min(unknown)!r}. Keys are {known}."
        )
    if table.setdefault("name", name) != name:
        raise LanguageInvalid(f"language {name!r}: its name differs from its file's.")
    for key in _KEYS.values():
        if key.name not in table:
            if key.default is MISSING:
                raise LanguageInvalid(f"language {name!r}: {key.name} is missing.")
            continue
        table[key.name] = _value(name, key.name, str(key.type), table[key.name])
    return _checked(Language(**table))


def _value(name: str, key: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise LanguageInvalid(f"language {name!r}: {key} must be a list of texts.")
        return tuple(value)
    if not isinstance(value, bool if kind == "bool" else str):
        must = "true or false" if kind == "bool" else "a text"
        raise LanguageInvalid(f"language {name!r}: {key} must be {must}.")
    return value


def _checked(language: Language) -> Language:
    def check(kind: re.Pattern[str], key: str, values: Iterable[str]) -> None:
        for value in values:
            if kind.fullmatch(value) is None:
                raise LanguageInvalid(
                    f"language {language.name[:40]!r}: {key}: {value[:40]!r} can't stand there."
                )

    check(_NAME, "name", [language.name])
    check(_ALIAS, "aliases", language.aliases)
    check(_SUFFIX, "suffixes", language.suffixes)
    check(_PROGRAM, "needs", language.needs)
    check(_DRIVER, "driver", [language.driver] if language.driver else [])
    if not language.title.strip() or not language.title.isprintable():
        raise LanguageInvalid(f"language {language.name!r}: its title can't be printed.")
    if not language.suffixes:
        raise LanguageInvalid(f"language {language.name!r}: suffixes must not be empty.")
    if bool(language.driver) != bool(language.cells):
        raise LanguageInvalid(f"language {language.name!r}: cells and driver go together.")
    return language


class Languages:
    """The shipped languages and those of *folder*, which is looked at again whenever it changed."""

    def __init__(self, folder: str = "") -> None:
        self._folder: Final = folder
        self._seen: object = None
        self._all: dict[str, tuple[str, Language]] = {}

    def all(self) -> tuple[Language, ...]:
        """By name."""
        return tuple(language for _, language in self._now().values())

    def get(self, word: str) -> Language:
        """By name or alias. Raises LanguageUnknown."""
        language = find(self.all(), word)
        if language is None:
            raise LanguageUnknown(f"there is no language {word[:40]!r}. `madang languages` lists.")
        return language

    def driver(self, language: Language) -> str:
        """The text of its driver. Raises LanguageInvalid."""
        folder, _ = self._now()[language.name]
        for place in (folder, DRIVERS):
            try:
                return _read(os.path.join(place, language.driver), MAX_ARGUMENT_BYTES)
            except FileNotFoundError:
                continue
        raise LanguageInvalid(
            f"language {language.name!r}: no driver {language.driver!r} is there."
        )

    def _now(self) -> dict[str, tuple[str, Language]]:
        state = _state(self._folder)
        if self._seen != state:
            found = {**_manifests(SHIPPED), **(_manifests(self._folder) if state else {})}
            self._all = dict(sorted(found.items()))
            self._seen = state
        return self._all


def _state(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a manifest of *folder* does."""
    try:
        with os.scandir(folder or os.devnull) as found:
            stats = [(entry.name, entry.stat()) for entry in found]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))


def _manifests(folder: str) -> dict[str, tuple[str, Language]]:
    """One that can't be read is left out, with a warning."""
    found = {}
    for file in sorted(os.listdir(folder)):
        name, dot, suffix = file.rpartition(".")
        if not dot or suffix != "toml":
            continue
        try:
            language = parse(_read(os.path.join(folder, file), MAX_MANIFEST_BYTES), name)
        except (OSError, LanguageInvalid) as exc:
            log.warning(
                "language not readable",
                extra={"file": os.path.join(folder, file), "error": str(exc)},
            )
            continue
        found[name] = (folder, language)
    return found


def _read(path: str, limit: int) -> str:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LanguageInvalid(f"{path} is too long; the limit is {limit} bytes.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise LanguageInvalid(f"{path} is not UTF-8 text.") from exc


def find(languages: Iterable[Language], word: str) -> Language | None:
    """By name or alias; a name counts for more."""
    found = list(languages)
    for language in found:
        if language.name == word:
            return language
    return next((language for language in found if word in language.aliases), None)


def code_command(language: Language, code: str, arguments: Sequence[str] = ()) -> tuple[str, ...]:
    """What a session runs for a piece of code."""
    if len(code.encode("utf-8", "surrogateescape")) > MAX_ARGUMENT_BYTES:
        raise InvalidRequest(
            f"the code is longer than {MAX_ARGUMENT_BYTES} bytes. Put it into a file: "
            f"`madang run {language.name} main{language.suffixes[0]}`."
        )
    script = f"{_guard(language)}{_folder(language.code)}CODE=$1; shift\n{language.code}"
    return _shell(language, script, (code, *arguments))


def file_command(
    language: Language,
    files: Sequence[str],
    arguments: Sequence[str] = (),
    *,
    build_options: Sequence[str] = (),
    run_options: Sequence[str] = (),
) -> tuple[str, ...]:
    """What a session runs to build and run source files, named from its working directory."""
    if not files:
        raise InvalidRequest(f"{language.title}: name a file to run.")
    if not language.build and build_options:
        raise InvalidRequest(f"{language.title} is not built: --build-options has no use.")
    if not language.build and len(files) > 1:
        raise InvalidRequest(
            f"{language.title} runs one file; arguments of the program come after `--`."
        )
    files = [f"./{file}" if file.startswith("-") else file for file in files]
    script = _guard(language) + _folder(language.build + language.run)
    script += f"FILE={shlex.quote(files[0])}\n"
    if language.build:
        built = _with_lists(language.build, files, build_options)
        script += f"(\n{built}\n) || exit\n"
    script += _with_lists(language.run, files, run_options)
    return _shell(language, script, arguments)


def cells_command(language: Language) -> str:
    """Starts its driver, for ``/bin/sh -c``; see docs/reference/drivers.md."""
    text = f"{_guard(language)}{_folder(language.cells)}"
    if "$CODE_COMMAND" in language.cells:
        text += f"CODE_COMMAND={shlex.quote(code_command(language, '')[2])}\n"
    return text + language.cells


def version_command(languages: Iterable[Language]) -> tuple[str, ...]:
    """Prints a line ``NAME TAB VERSION`` for each language that is there."""
    lines = "\n".join(
        f'({{\n{_guard(language)}v=$({language.version}\n) && v=$(echo "$v" | head -n 1)\n}}'
        ' </dev/null 2>/dev/null && [ -n "$v" ] && '
        f"printf '%s\\t%s\\n' {language.name} \"$v\")"
        for language in languages
    )
    return ("/bin/sh", "-c", f"{lines}\ntrue")


def _shell(language: Language, script: str, arguments: Sequence[str]) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, language.name, *arguments)


def _guard(language: Language) -> str:
    """Finds its programs; says in words what is missing, rather than leave it to the shell."""
    return "".join(
        f"{'NEEDED' if number else 'PROGRAM'}=$({_look_for(need)}) || "
        f"{{ echo {shlex.quote(_missing(language, need))} >&2; exit 127; }}\n"
        for number, need in enumerate(language.needs)
    )


def _look_for(need: str) -> str:
    return " || ".join(f"command -v {program}" for program in need.split("|"))


def _missing(language: Language, need: str) -> str:
    return (
        f"madang: {language.title} is not in this image: it has no {need.replace('|', ' or ')}. "
        "`madang languages --image NAME` says what an image has."
    )


def _folder(text: str) -> str:
    """``$DIR``: a fresh folder, where *text* wants one."""
    return "DIR=$(mktemp -d) || exit\n" if "$DIR" in text else ""


def _with_lists(text: str, files: Sequence[str], options: Sequence[str]) -> str:
    lists = {"FILES": shlex.join(files), "OPTIONS": shlex.join(options)}
    return _LISTS.sub(lambda match: lists[match[1]], text)
