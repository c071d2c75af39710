"""What build sessions find at ``/madang/tools``: uv, and our script as one zip file."""

from __future__ import annotations

import os
import shutil
import zipfile
from typing import Final

import uv

import madang
from madang.agent import buildscript

SCRIPT: Final = "build.pyz"
CERTIFICATES: Final = "certificates.pem"
EXECUTABLE: Final = 0o555
_PART: Final = ".part"
_WORDS: Final = ("reference", "rootlayer")
"""What the script shares of ``wire``."""
_START: Final = """\
import sys
from madang.agent.buildscript.words import run
sys.exit(run(sys.argv[1:]))
"""


def install(folder: str, certificates: str = "") -> None:
    """Make *folder* hold this version's tools; each file is replaced at once, or left alone.

    *certificates*: authorities that builds shall trust (PEM).
    """
    os.makedirs(folder, mode=0o755, exist_ok=True)
    _install_uv(folder)
    target = os.path.join(folder, CERTIFICATES)
    with open(target + _PART, "w", encoding="utf-8") as file:
        file.write(certificates)
    _replace(target)
    target = os.path.join(folder, SCRIPT)
    _write_script(target + _PART)
    _replace(target)


def _replace(target: str) -> None:
    """By the file of the same name and ``_PART``, unless that says the same."""
    part = target + _PART
    if _same(part, target):
        os.unlink(part)
    else:
        os.chmod(part, 0o444)
        os.rename(part, target)


def _install_uv(folder: str) -> None:
    source, target = uv.find_uv_bin(), os.path.join(folder, "uv")
    wanted = os.stat(source)
    try:
        found = os.stat(target)
    except FileNotFoundError:
        found = None
    if found and (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
        return
    part = target + _PART
    shutil.copyfile(source, part)
    os.utime(part, ns=(wanted.st_mtime_ns, wanted.st_mtime_ns))
    os.chmod(part, EXECUTABLE)
    os.rename(part, target)


def _write_script(path: str) -> None:
    """``buildscript`` and what it shares under their full names; the same bytes each time."""
    root = os.path.dirname(os.path.dirname(madang.__file__))
    base = os.path.dirname(buildscript.__file__)
    sources = [os.path.join(base, n) for n in sorted(os.listdir(base)) if n.endswith(".py")]
    sources += [os.path.join(root, "madang", "wire", f"{name}.py") for name in _WORDS]
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("madang", "madang/agent", "madang/wire"):
            archive.writestr(zipfile.ZipInfo(f"{name}/__init__.py"), "")
        for source in sources:
            with open(source, "rb") as file:
                archive.writestr(zipfile.ZipInfo(os.path.relpath(source, root)), file.read())
        archive.writestr(zipfile.ZipInfo("__main__.py"), _START)


def _same(one: str, other: str) -> bool:
    try:
        with open(one, "rb") as first, open(other, "rb") as second:
            return first.read() == second.read()
    except FileNotFoundError:
        return False
