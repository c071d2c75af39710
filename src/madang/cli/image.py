"""``madang image ls|show|build|rm``."""

from __future__ import annotations

import shlex
import time

import click

from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.imagebuild import watch
from madang.cli.imagemoves import MOVES
from madang.cli.options import parse_labels, read_policy
from madang.cli.printable import print_error_text, printable
from madang.cli.recipes import build_file, find, lock, recipes
from madang.cli.terminal import Notes
from madang.wire import exits
from madang.wire.errors import InvalidRequest, PlatformError
from madang.wire.image import WARM, Image, ImageKind
from madang.wire.size import format_bytes, format_duration


@click.group()
def image() -> None:
    """List, build, fetch, save, version and remove images."""


for _command in (*MOVES, lock, recipes):
    image.add_command(_command)


@image.command("ls")
@json_option
def list_images(as_json: bool) -> None:
    """List images."""
    with connect() as client:
        images = client.list_images()
    if as_json:
        print_json(images)
        return
    rows = [
        (
            image.name,
            image.status.value.lower(),
            format_bytes(image.size_bytes) if image.size_bytes else "-",
            str(image.used_by),
            _content(image),
        )
        for image in images
    ]
    print_table(("NAME", "STATUS", "SIZE", "SESSIONS", "CONTENT"), rows)


def _content(image: Image) -> str:
    """What it was made of, in a few words."""
    if image.kind is ImageKind.HOST:
        return "(this machine's own system)"
    return ", ".join(image.requirements) or image.source.reference or "(a root of its own)"


@image.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show an image with its layers."""
    with connect() as client:
        found = client.get_image(name)
    if as_json:
        print_json(found)
        return
    for label, value in _facts(found):
        if value:
            print(f"{label:<9} {printable(value)}")
    if found.layers:
        rows = [(layer.name, layer.version, format_bytes(layer.size_bytes), layer.digest[:12])
                for layer in found.layers]  # fmt: skip
        print_table(("LAYER", "VERSION", "SIZE", "DIGEST"), rows)


def _facts(image: Image) -> list[tuple[str, str]]:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.created_at))
    return [
        ("name", image.name),
        ("status", image.status.value.lower()),
        ("digest", image.digest),
        ("python", image.python),
        ("size", format_bytes(image.size_bytes) if image.size_bytes else ""),
        ("asked for", ", ".join(image.requirements)),
        ("from", " ".join(filter(None, (image.source.reference, image.source.digest)))),
        ("platform", image.source.platform),
        ("runs", shlex.join((*image.config.entrypoint, *image.config.cmd))),
        ("in", image.config.cwd),
        ("user", image.config.user),
        ("variables", " ".join(f"{k}={v}" for k, v in sorted(image.config.env.items()))),
        ("follows", f"every {format_duration(image.refresh_s)}" if image.refresh_s else ""),
        ("built by", image.build or ""),
        ("made", made if image.created_at else ""),
        ("sessions", str(image.used_by)),
        ("policy", f"{len(image.policy.splitlines())} lines" if image.policy else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(image.labels.items()))),
    ]


@image.command()
@click.argument("names", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Also while sessions run from it; they go on.")
def rm(names: tuple[str, ...], force: bool) -> int:
    """Remove images."""
    code = 0
    with connect() as client:
        for name in names:
            try:
                client.remove_image(name, force=force)
                print(name)
            except PlatformError as exc:
                print_error_text(exc.text)
                code = exits.of_error(exc)
    return code


@image.command()
@click.argument("name")
@click.option(
    "--pip", "requirements", multiple=True, metavar="REQ", help="Like numpy or torch==2.9."
)
@click.option("-r", "--requirement", "files", multiple=True, type=click.Path(dir_okay=False),
              help="File with one requirement a line.")  # fmt: skip
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Label; may be repeated.")
@click.option("--warm", multiple=True, metavar="MODULE",
              help="Keep it imported, for sessions to start at once; may be repeated.")  # fmt: skip
@click.option("--policy", metavar="FILE", help="Sandbox policy of all sessions from this image.")
@click.option("--name", "image_name", help="Of a recipe's image. Default: the recipe's.")
@click.option("--locked", is_flag=True, help="Take what the recipe's .lock says, nothing newer.")
@click.option("--fresh", is_flag=True, help="Make steps of the recipe again that were made before.")
@click.option("--disk", metavar="SIZE", help="Disk of each step of a recipe, like 40g.")
@click.option("-d", "--detach", is_flag=True, help="Start the build and print its session's name.")
def build(
    name: str,
    requirements: tuple[str, ...],
    files: tuple[str, ...],
    labels: tuple[str, ...],
    warm: tuple[str, ...],
    image_name: str | None,
    locked: bool,
    fresh: bool,
    disk: str | None,
    policy: str | None,
    detach: bool,
) -> int:
    """Build an image: from Python packages, one shared layer for each, or by a recipe.

    A recipe is a file NAME.toml, or one of ours (see `image recipes`). Builds are sessions: their
    log comes live, Ctrl-C cancels.

    \b
    madang image build digits --pip numpy --pip scikit-learn==1.5.2
    madang image build torch --pip torch --pip numpy --warm torch --warm numpy
    madang image build tools.toml
    madang image build r
    """
    wanted = [*requirements, *(line for file in files for line in read_requirements(file))]
    if not wanted:
        return build_file(
            find(name),
            name=image_name,
            locked=locked,
            fresh=fresh,
            labels=labels,
            policy=policy,
            disk=disk,
            detach=detach,
        )
    marks = parse_labels(labels) | ({WARM: ",".join(warm)} if warm else {})
    config = load()
    notes = Notes(plain=config.plain)
    with connect(config) as client:
        text = "" if policy is None else read_policy(policy)
        session = client.build_image(name, wanted, labels=marks, policy=text)
        if detach:
            print(session.name)
            return 0
        return watch(client, notes, session, name)


def read_requirements(path: str) -> list[str]:
    """The requirements in a file; options of pip have no meaning here and are refused."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().replace("\\\n", " ").splitlines()
    except OSError as exc:
        raise InvalidRequest(f"{path} can't be read ({exc.strerror}).") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{path} can't be read: it is not UTF-8 text.") from exc
    found = []
    for line in lines:
        text = line.split(" #")[0].split(" --hash")[0].strip()
        if text.startswith("-"):
            raise InvalidRequest(f"{path}: {text!r} is an option of pip; list requirements alone.")
        if text and not text.startswith("#"):
            found.append(text)
    return found
