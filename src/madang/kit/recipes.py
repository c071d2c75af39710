"""Recipes: files that say what a whole root is made of, and the steps that make it.

::

    base = "debian:bookworm"          # a suite of Debian, or the name of an image
    debian = ["r-base-core"]          # packages of Debian
    python = ["numpy==2.2.*"]         # from PyPI, into a virtual environment at /env
    npm = ["typescript@5"]            # for all, with Debian's npm
    run = ["make -C /opt/x install"]  # commands, by sh, as root of the image
    warm = ["numpy"]                  # modules that interpreters keep imported
    [files]
    "/etc/x.conf" = "text\\n"         # executable where it begins with #!
    [environment]
    X_HOME = "/opt/x"
    [labels]
    languages = "r"

Each step is a script that runs in what the steps before it made; what it changes is a layer.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from madang.wire.errors import InvalidRequest
from madang.wire.image import MAX_WARM, MODULE

MAX_BYTES: Final = 96 * 1024
"""A step's script is one argument, of which Linux takes 128 KiB."""
MAX_LIST: Final = 500
MAX_ENTRY: Final = 16 * 1024
MAX_STEPS: Final = 100
DEBIAN: Final = re.compile(r"debian:([a-z]{2,20}(?:-[a-z]{2,20})?)")
LOCK_FILE: Final = "/outputs/lock"
"""Where a step's script says what it took."""

_LISTS: Final = ("debian", "python", "npm", "run", "warm")
_TABLES: Final = ("files", "environment", "labels")
_TEXTS: Final = ("base", "description")
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{1,100}(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+)?-?")
_REQUIREMENT: Final = re.compile(r"[A-Za-z0-9][\x20-\x7e]{0,500}")
_NPM: Final = re.compile(r"(?:@[a-z0-9._-]+/)?[a-z0-9][a-z0-9._-]*(?:@[A-Za-z0-9._^~<>=| *-]+)?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH: Final = re.compile(r"(?:/(?!\.\.?(?:/|$))[^/\0\n]+)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """As written, checked."""

    base: str
    description: str = ""
    debian: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def suite(self) -> str:
        """Of Debian; empty: the base is an image."""
        match = DEBIAN.fullmatch(self.base)
        return match[1] if match else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One layer."""

    name: str
    """Which step of the recipe: ``debian``, ``run 2``"""
    title: str
    """What it does, in short."""
    script: str = ""
    """For ``sh``; empty: the first stage of a Debian system, of the suite that the title names."""


def parse(text: str) -> Recipe:
    """Raises InvalidRequest that names what is wrong."""
    if len(text.encode()) > MAX_BYTES:
        raise _invalid(f"it has more than {MAX_BYTES} bytes")
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _invalid(str(exc)) from exc
    known = {*_LISTS, *_TABLES, *_TEXTS}
    for key in found:
        if key not in known:
            raise _invalid(f"{key[:60]!r} is unknown; there are {', '.join(sorted(known))}")
    values: dict[str, Any] = {key: _text(key, found.get(key, "")) for key in _TEXTS}
    values |= {key: _list(key, found.get(key, [])) for key in _LISTS}
    values |= {key: _table(key, found.get(key, {})) for key in _TABLES}
    recipe = Recipe(**values)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    if not recipe.base:
        raise _invalid('it says no base: base = "debian:bookworm", or the name of an image')
    for key, pattern, what in (
        ("debian", _PACKAGE, "package of Debian"),
        ("python", _REQUIREMENT, "requirement"),
        ("npm", _NPM, "package of npm"),
        ("warm", MODULE, "name of a module"),
    ):
        for entry in getattr(recipe, key):
            if not pattern.fullmatch(entry):
                raise _invalid(f"{key}: {entry[:60]!r} is no {what}")
    for path in recipe.files:
        if not _PATH.fullmatch(path):
            raise _invalid(f"files: {path[:60]!r} is no absolute path of a file")
    for name in recipe.environment:
        if not _VARIABLE.fullmatch(name):
            raise _invalid(f"environment: {name[:60]!r} is no name of a variable")
    if len(recipe.warm) > MAX_WARM:
        raise _invalid(f"warm: has {len(recipe.warm)} modules; the most is {MAX_WARM}")
    if len(recipe.run) > MAX_STEPS:
        raise _invalid(f"run: has {len(recipe.run)} commands; the most is {MAX_STEPS}")


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"recipe: {what}.", field="recipe")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_ENTRY or "\0" in value:
        raise _invalid(f"{key}: must be a text of at most {MAX_ENTRY} characters")
    return value


def _list(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_LIST:
        raise _invalid(f"{key}: must be a list of at most {MAX_LIST} texts")
    return tuple(_text(key, entry) for entry in value)


def _table(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_LIST:
        raise _invalid(f"{key}: must be a table of at most {MAX_LIST} texts")
    return {name: _text(f"{key}.{name[:60]}", entry) for name, entry in value.items()}


# -- steps -----------------------------------------------------------------------------------------


def steps(recipe: Recipe, lock: Mapping[str, str] | None = None) -> tuple[Step, ...]:
    """In their order. *lock*: name of a step → what it shall take, as a former build told."""
    return tuple(_steps(recipe, lock or {}))


def _steps(recipe: Recipe, lock: Mapping[str, str]) -> Iterator[Step]:
    if recipe.suite:
        yield Step(name="base", title=recipe.suite)
        newest = _install(lock["configure"].split()) if "configure" in lock else _UPGRADE
        yield Step(name="configure", title="configure", script=f"{_SECOND_STAGE}{newest}\n{_TIDY}")
    if packages := _packages(recipe):
        script = _debian(lock["debian"].split() if "debian" in lock else packages)
        yield Step(name="debian", title=" ".join(packages), script=script)
    if recipe.python:
        script = _python(recipe.python, lock.get("python", ""))
        yield Step(name="python", title=" ".join(recipe.python), script=script)
    if recipe.npm:
        yield Step(name="npm", title=" ".join(recipe.npm), script=_npm(recipe.npm))
    if recipe.files:
        script = "".join(_file(path, text) for path, text in sorted(recipe.files.items()))
        yield Step(name="files", title=" ".join(sorted(recipe.files)), script=script)
    for number, command in enumerate(recipe.run, 1):
        yield Step(name=f"run {number}", title=command.strip().splitlines()[0], script=command)


def _packages(recipe: Recipe) -> list[str]:
    """With what the other steps take, on a base that has nothing."""
    implied = []
    if recipe.suite and recipe.python:
        implied.append("python3-venv")  # Debian 11 has distutils by it alone, which uv wants.
    if recipe.suite and recipe.npm:
        implied += ["nodejs", "npm"]
    return list(dict.fromkeys((*recipe.debian, *implied)))


_SECOND_STAGE: Final = """\
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
cd /var/lib/dpkg/info
(
  export DPKG_ADMINDIR=/var/lib/dpkg DPKG_MAINTSCRIPT_NAME=preinst DPKG_ROOT= DPKG_RUNNING_VERSION=
  DPKG_MAINTSCRIPT_ARCH=$(dpkg --print-architecture); export DPKG_MAINTSCRIPT_ARCH
  for script in *.preinst; do
    stem=${script%.preinst}
    DPKG_MAINTSCRIPT_PACKAGE=${stem%:*} "./$script" install
  done
)
dpkg --configure --force-depends base-passwd base-files 2>/dev/null
dpkg --configure -a
apt-get update -q
"""
_TIDY: Final = """\
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/log/apt \\
  /var/log/dpkg.log /var/log/alternatives.log /var/cache/debconf/*-old /var/lib/dpkg/*-old
dpkg-query -W -f='${Package}:${Architecture}=${Version}\\n' > /outputs/lock
"""
_UPGRADE: Final = "apt-get dist-upgrade -y -q"


def _debian(packages: Iterable[str]) -> str:
    return f"""\
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
apt-get update -q
{_install(packages)}
{_TIDY}"""


def _install(packages: Iterable[str]) -> str:
    names = " ".join(_quoted(package) for package in packages)
    return f"apt-get install -y -q --no-install-recommends --allow-downgrades {names}"


def _python(requirements: Iterable[str], lock: str) -> str:
    wanted = lock or "".join(f"{each}\n" for each in requirements)
    resolve = (
        "cp /tmp/wanted /outputs/lock"
        if lock
        else 'uv pip compile -q /tmp/wanted --python "$python" --generate-hashes --no-header '
        "--no-annotate --no-emit-index-url --no-emit-find-links > /outputs/lock"
    )
    return f"""\
uv() {{ /madang/tools/uv "$@"; }}
export UV_CACHE_DIR=/tmp/uv UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
python=$(command -v python3) || {{ echo 'add python3 to the packages of Debian' >&2; exit 66; }}
test -e /env/bin/python || uv venv -q --python "$python" --system-site-packages /env
{_here("/tmp/wanted", wanted)}
{resolve}
uv pip install --python /env/bin/python --require-hashes --compile-bytecode -r /outputs/lock
"""


def _npm(packages: Iterable[str]) -> str:
    names = " ".join(_quoted(package) for package in packages)
    return f"""\
npm install -g --no-audit --no-fund --cache /tmp/npm {names}
npm ls -g --depth=0 --parseable --long > /outputs/lock
"""


def _file(path: str, text: str) -> str:
    mode = "755" if text.startswith("#!") else "644"
    quoted = _quoted(path)
    folder = _quoted(path.rpartition("/")[0] or "/")
    return f"mkdir -p {folder}\n{_here(path, text)}\nchmod {mode} {quoted}\n"


def _here(path: str, text: str) -> str:
    """Lines that write *text*; a last line without an end gets none."""
    mark = "END"
    while mark in text:
        mark += "_"
    if text.endswith("\n") or not text:
        return f"cat > {_quoted(path)} <<'{mark}'\n{text}{mark}"
    return f"printf %s {_quoted(text)} > {_quoted(path)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
