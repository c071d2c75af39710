"""Languages: how code in each of them is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """A manifest: ``runner/languages/NAME.toml``.

    Commands are texts for ``/bin/sh -c``; the program's arguments are ``"$@"``. In *code* the code
    is ``"$CODE"``; in *build* and *run* the sources are ``$FILES`` (quoted for the shell), the
    first of them ``"$FILE"``, a place for what is built ``"$BUILT"``, options ``$OPTIONS``.
    """

    name: str
    """What people write: ``r``, ``cpp``."""
    title: str
    """``R``, ``C++``"""
    suffixes: tuple[str, ...]
    """Of its source files, the usual one first: ``.cpp``."""
    version: str
    """Prints one line; fails where the language is missing."""
    code: str
    """Runs a piece of code: ``madang run r -c 'print(1+1)'``."""
    run: str
    """Runs files, or what *build* has built."""
    build: str = ""
    aliases: tuple[str, ...] = ()
    image: str = ""
    """The shipped recipe that has it; empty: of the same name."""
    cells: str = ""
    """Starts the driver of cells; ``"$DRIVER"`` is the driver's text. Empty: it has no cells."""
    driver: str = ""
    """File in ``runner/drivers``."""
    mime: str = "text/plain"
    """Of its source code."""
    mode: str = ""
    """Its name in CodeMirror and Pygments, where it is not *name*."""
    input: bool = True
    """Whether cells can ask for input."""
    state: bool = True
    """Whether what a cell defines is there in the next."""
