"""What the slice speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from madang.wire.languages import Language

KERNEL: Final = "jupyter.kernel"
"""Label of a session that is a kernel: name of its kernelspec."""
LANGUAGE: Final = "jupyter.language"
DRIVER: Final = "jupyter.driver"
PATH: Final = "jupyter.path"
"""Label: path of the notebook that a kernel was started for, as its frontend calls it."""
TITLE: Final = "jupyter.name"
KIND: Final = "jupyter.type"
ALONE: Final = "jupyter.alone-s"
"""Label: the session ends after so many seconds without a client."""
INTERPRETER: Final = "jupyter"
"""Name of a kernel's interpreter in its session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JupyterSettings:
    """What notebooks may ask of the server."""

    specs: int = 100
    """Kernelspecs offered to a user at most."""
    file_bytes: int = 32 << 20
    """Largest file that the contents API reads or writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A kernelspec: a language of an image in a size."""

    name: str
    title: str
    """«Python 3.11 · torch 2.13 · 2 CPU · 4 GiB»"""
    language: Language
    driver: str
    image: str
    preset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A session that is a kernel, as Jupyter sees it."""

    id: str
    session_id: str
    session: str
    """Name of the session."""
    spec: str
    state: str
    """An ``execution_state``."""
    active_at: float
    clients: int
    path: str
    title: str
    kind: str
