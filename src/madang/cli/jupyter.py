"""``madang jupyter …``"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import quote

import click

from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.client.calls import Call, read_as
from madang.client.sync import Client
from madang.wire.errors import ConfigInvalid, NotFound

PREFIX: Final = "madang-"
"""Of the folders of kernelspecs that we write; others are left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    name: str
    title: str
    language: str


@click.group()
def jupyter() -> None:
    """Sessions as kernels of JupyterLab, VS Code and other Jupyter clients."""


@jupyter.command("url")
def show_url() -> None:
    """Print the address that Jupyter clients are given; the token is in `madang token`."""
    config = load()
    with connect(config) as client:
        print(f"{config.url.rstrip('/')}{_path(client)}")


@jupyter.command("kernels")
@json_option
def list_kernels(as_json: bool) -> None:
    """List what can be started: languages of images, in sizes."""
    with connect() as client:
        found = _specs(client)
    if as_json:
        print_json(found)
    else:
        print_table(("KERNEL", "LANGUAGE", "TITLE"), [(s.name, s.language, s.title) for s in found])


@jupyter.command("install-kernels")
@click.argument("patterns", nargs=-1, metavar="[KERNEL…]")
@click.option("--prefix", metavar="DIR", help="Into DIR/share/jupyter instead of your own folder.")
@click.option("--plain", is_flag=True, help="For a Jupyter in another Python than this one.")
def install_kernels(patterns: tuple[str, ...], prefix: str | None, plain: bool) -> None:
    """Write kernelspecs for a Jupyter on this machine, in place of those written before.

    KERNEL may have wildcards; without any, all that the server offers are written.
    """
    config = load()
    with connect(config) as client:
        found = _specs(client)
    chosen = [s for s in found if not patterns or any(fnmatchcase(s.name, p) for p in patterns)]
    if not chosen:
        raise NotFound("no such kernel. `madang jupyter kernels` lists them.")
    data = os.path.join(prefix, "share", "jupyter") if prefix else config.jupyter_dir
    folder = os.path.join(data, "kernels")
    try:
        _clear(folder)
        for spec in chosen:
            _write(os.path.join(folder, PREFIX + spec.name), spec, config.url, plain=plain)
    except OSError as exc:
        raise ConfigInvalid(f"{folder} can't be written ({exc.strerror}).") from exc
    print(f"{len(chosen)} kernels are in {printable(folder)}")


@jupyter.command("remove-kernels")
@click.option("--prefix", metavar="DIR", help="Those in DIR/share/jupyter.")
def remove_kernels(prefix: str | None) -> None:
    """Remove the kernelspecs that install-kernels has written."""
    data = os.path.join(prefix, "share", "jupyter") if prefix else load().jupyter_dir
    print(f"removed {_clear(os.path.join(data, 'kernels'))} kernels")


def _path(client: Client) -> str:
    return f"/jupyter/{quote(client.whoami().user, safe='')}"


def _specs(client: Client) -> list[_Spec]:
    path = f"{_path(client)}/api/kernelspecs"
    found = client.call(Call(method="GET", path=path, decode=read_as(dict[str, Any])))
    specs = [(name, model["spec"]) for name, model in found["kernelspecs"].items()]
    return [
        _Spec(name=name, title=spec["display_name"], language=spec["language"])
        for name, spec in specs
    ]


def _clear(folder: str) -> int:
    names = [name for name in _listed(folder) if name.startswith(PREFIX)]
    for name in names:
        shutil.rmtree(os.path.join(folder, name))
    return len(names)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _write(folder: str, spec: _Spec, url: str, *, plain: bool) -> None:
    argv = [sys.executable, "-m", "madang.jupyter", "-f", "{connection_file}"]
    metadata: dict[str, Any] = {"supported_encryption": "curve"}
    if plain:
        argv += ["--kernel", spec.name, "--url", url]
    else:
        config = {"kernel": spec.name, "url": url}
        metadata["kernel_provisioner"] = {"provisioner_name": "madang", "config": config}
    text = json.dumps(
        {
            "argv": argv,
            "display_name": f"{spec.title} (Madang)",
            "language": spec.language,
            "interrupt_mode": "message",
            "metadata": metadata,
        },
        indent=1,
        ensure_ascii=False,
    )
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "kernel.json"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
