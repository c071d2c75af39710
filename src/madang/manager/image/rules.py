"""Decisions about images, pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from madang.kit import policy
from madang.kit.codec import from_json, to_json
from madang.manager.db import seconds
from madang.manager.image.types import Action, Asked, ImageRow, ImageSettings, Making
from madang.wire.errors import (
    Ambiguous,
    BuildFailed,
    Conflict,
    IdempotencyMismatch,
    ImageUnknown,
    InvalidRequest,
)
from madang.wire.image import (
    MAX_WARM,
    MODULE,
    WARM,
    BuildManifest,
    BuildRequest,
    Image,
    ImageConfig,
    ImageKind,
    ImageSource,
    ImageStatus,
    ImportRequest,
    Layer,
    PullRequest,
)
from madang.wire.kernel import TOOLS_DIR, ImageMount
from madang.wire.policy import IMAGE
from madang.wire.reference import MAX_REFERENCE, Reference, is_platform, parse
from madang.wire.session import HOST_IMAGE, Reason, Result, Session, SessionSpec, SizeRequest

BUILD_SCRIPT: Final = f"{TOOLS_DIR}/build.pyz"
MAX_REQUIREMENTS: Final = 200
MAX_REQUIREMENT: Final = 500
MAX_LAYERS: Final = 400
MAX_KEY: Final = 200
_NAME: Final = re.compile(r"[a-z][a-z0-9._-]{0,39}")
_REQUIREMENT: Final = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\s*(?:\[[A-Za-z0-9 ,._-]*\])?\s*"
    r"(?:@\s*https?://\S.*|[<>=!~(;].*)?"
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST_START: Final = re.compile(r"[0-9a-f]{8,64}")
MAX_CONFIG: Final = 64 * 1024
MOVE_CPU: Final = 1.0
MIN_REFRESH_S: Final = 300.0
MAX_REFRESH_S: Final = 366 * 86400.0
PLAIN: Final = ImageConfig()
_PYTHON: Final = re.compile(r"3\.[0-9]{1,2}")
_EXIT_CODES: Final = {
    65: "no set of versions fits the requirements",
    66: "a package could not be installed",
    68: "what came is no image, or not what it says",
    69: "no package index or registry could be reached",
    77: "the registry wants a login, or other rights",
    73: "the disk of the build session is full; ask for more",
}
"""Of the build script (``agent.buildscript.main.Exit``)."""
_ENVIRONMENT: Final = {"VIRTUAL_ENV": "/env"}


def check_request(request: BuildRequest) -> BuildRequest:
    """With spaces and repetitions gone. Raises InvalidRequest that names what is wrong."""
    check_name(request.name)
    wanted = tuple(dict.fromkeys(each.strip() for each in request.requirements))
    if not 0 < len(wanted) <= MAX_REQUIREMENTS:
        text = f"requirements: {len(wanted)} given; 1 to {MAX_REQUIREMENTS} make an image."
        raise InvalidRequest(text, field="requirements")
    for requirement in wanted:
        _check_requirement(requirement)
    check_marks(request.labels, request.policy)
    return replace(request, requirements=wanted)


def check_pull(request: PullRequest) -> PullRequest:
    """With all that the reference left out put in. Raises InvalidRequest."""
    check_name(request.name)
    check_marks(request.labels, request.policy)
    if request.refresh_s is not None:
        check_refresh(request.refresh_s)
    if request.login and request.refresh_s:
        text = "login: a pull by schedule has nobody to ask; the operator can set a login up."
        raise InvalidRequest(text, field="login")
    return replace(
        request,
        reference=str(check_reference(request.reference)),
        platform=check_platform(request.platform),
    )


def check_import(request: ImportRequest) -> ImportRequest:
    check_name(request.name)
    check_marks(request.labels, request.policy)
    check_platform(request.platform)
    if len(request.reference) > MAX_REFERENCE or not request.reference.isprintable():
        raise InvalidRequest("reference: is no name of an image in an archive.", field="reference")
    return request


def check_reference(text: str) -> Reference:
    try:
        return parse(text)
    except ValueError as exc:
        raise InvalidRequest(f"reference: {exc}.", field="reference") from exc


def check_platform(text: str) -> str:
    if text and not is_platform(text):
        raise InvalidRequest(
            f"platform: {text[:40]!r} is none; like linux/amd64 or linux/arm/v7.", field="platform"
        )
    return text


def check_refresh(refresh_s: float) -> float:
    """Seconds between two looks. Raises InvalidRequest."""
    if refresh_s != 0 and not MIN_REFRESH_S <= refresh_s <= MAX_REFRESH_S:
        text = f"refresh_s: {refresh_s:g} s; {MIN_REFRESH_S:g} s to a year, or 0 for never."
        raise InvalidRequest(text, field="refresh_s")
    return refresh_s


def check_marks(labels: Mapping[str, str], text: str) -> None:
    """Labels and policy of an image. Raises InvalidRequest, PolicyInvalid."""
    warm_modules(labels)
    if text:
        policy.parse(text, IMAGE)


def check_name(name: str) -> str:
    """Raises InvalidRequest, Conflict."""
    if not _NAME.fullmatch(name):
        text = f"name: {name[:60]!r} is no image name: 1 to 40 of a-z 0-9 . _ -"
        raise InvalidRequest(f"{text}, beginning with a letter.", field="name")
    if name == HOST_IMAGE:
        raise Conflict(f"{HOST_IMAGE!r} is built in; choose another name.")
    return name


def _check_requirement(text: str) -> None:
    good = text.isprintable() and len(text) <= MAX_REQUIREMENT and " --" not in text
    if not good or not _REQUIREMENT.fullmatch(text):
        raise InvalidRequest(
            f"requirements: {text[:80]!r} is none: a name, perhaps with extras, versions, a marker "
            "or ` @ https://…` (numpy, scikit-learn==1.5.2, torch>=2,<3). Options, folders and "
            "git addresses can't be built: each file must have a hash.",
            field="requirements",
        )


def warm_modules(labels: Mapping[str, str]) -> tuple[str, ...]:
    """What the image's interpreters import ahead, out of its label."""
    found = tuple(filter(None, (name.strip() for name in labels.get(WARM, "").split(","))))
    for name in found:
        if not MODULE.fullmatch(name):
            text = f"labels.{WARM}: {name[:80]!r} is no name of a module."
            raise InvalidRequest(text, field="labels")
    if len(found) > MAX_WARM:
        text = f"labels.{WARM}: {len(found)} modules; the most is {MAX_WARM}."
        raise InvalidRequest(text, field="labels")
    return found


def id_of_key(owner_id: str, key: str) -> str:
    """The id of the image that an Idempotency-Key stands for."""
    if not (1 <= len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(f"Idempotency-Key: 1 to {MAX_KEY} printable characters.")
    return "k" + hashlib.sha256(f"{owner_id}\n{key}".encode()).hexdigest()[:25]


def check_repeated(known: ImageRow, row: ImageRow) -> None:
    """Raises IdempotencyMismatch if one key came with two requests."""
    if _wish(known) != _wish(row):
        raise IdempotencyMismatch("this Idempotency-Key came before with another build.")


def _wish(row: ImageRow) -> tuple[str, ...]:
    return row.name, row.requirements, row.size, row.policy, row.action, row.asked


def build_spec(row: ImageRow, settings: ImageSettings) -> SessionSpec:
    """The session that makes *row*."""
    asked, size = from_json(Asked, row.asked), from_json(SizeRequest, row.size)
    reads = row.action == Action.IMPORT or asked.login
    return script_spec(
        _words(row, asked),
        size if row.action == Action.BUILD else moved_size(size),
        settings,
        labels={"image": row.name},
        stdin=reads,
    )


def _words(row: ImageRow, asked: Asked) -> tuple[str, ...]:
    """For the build script."""
    platform = ("--platform", asked.platform) if asked.platform else ()
    if row.action == Action.PULL:
        return ("pull", asked.reference, *platform, *(("--login",) if asked.login else ()))
    if row.action == Action.IMPORT:
        chosen = (f"--reference={asked.reference}",) if asked.reference else ()
        return ("import", *chosen, *platform)
    return ("pip", *from_json(tuple[str, ...], row.requirements))


def script_spec(
    words: tuple[str, ...],
    asked: SizeRequest,
    settings: ImageSettings,
    *,
    labels: dict[str, str],
    stdin: bool = False,
    env: dict[str, str] | None = None,
) -> SessionSpec:
    """A session of the build script."""
    return SessionSpec(
        argv=("python3", "-I", BUILD_SCRIPT, *words),
        image=HOST_IMAGE,
        stdin=stdin,
        env=env or {},
        size=build_size(asked, settings),
        labels=labels,
        grace_s=2.0,
    )


def moved_size(asked: SizeRequest) -> SizeRequest:
    """Of a session that moves an image, and compiles nothing."""
    return asked if asked.cpu else replace(asked, cpu=MOVE_CPU)


def build_size(asked: SizeRequest, settings: ImageSettings) -> SizeRequest:
    """Of a session that builds."""
    return SizeRequest(
        cpu=asked.cpu or settings.cpu,
        mem_bytes=asked.mem_bytes or settings.mem_bytes,
        pids=asked.pids or settings.pids,
        disk_bytes=asked.disk_bytes or settings.disk_bytes,
        time_s=asked.time_s or settings.time_s,
    )


def renewed(making: str) -> str:
    """To make it all again."""
    return (
        ""
        if not making
        else to_json(replace(from_json(Making, making), steps=(), fresh=True)).decode()
    )


def image_digest(kind: ImageKind, layers: Iterable[str], config: ImageConfig = PLAIN) -> str:
    """Content address: SHA-256 over the kind and the layers, topmost first, a line each.

    And over what the image says of its programs, if it says anything.
    """
    said = () if config == PLAIN else (to_json(config).decode(),)
    lines = "".join(f"{part}\n" for part in (kind, *layers, *said))
    return hashlib.sha256(lines.encode()).hexdigest()


HOST: Final = Image(
    name=HOST_IMAGE,
    digest=image_digest(ImageKind.HOST, ()),
    kind=ImageKind.HOST,
    status=ImageStatus.READY,
)


def check_manifest(manifest: BuildManifest) -> BuildManifest:
    """What a build session says, which its owner can have changed. Raises BuildFailed."""
    digests = [layer.digest for layer in manifest.layers]
    root = manifest.kind is ImageKind.ROOT
    sane = (
        (root or (manifest.kind is ImageKind.LAYERS and _PYTHON.fullmatch(manifest.python)))
        and 0 < len(digests) <= MAX_LAYERS
        and len(set(digests)) == len(digests)
        and all(map(_DIGEST.fullmatch, digests))
        and all(_is_sane(layer) for layer in manifest.layers)
    )
    if not sane:
        raise BuildFailed("the build's manifest is damaged.")
    if root:
        _check_config(manifest.config)
    return manifest


def _check_config(config: ImageConfig) -> None:
    """What strangers say of their programs, and no more than a session can have."""
    size = len(to_json(config))
    if size > MAX_CONFIG:
        raise BuildFailed(f"the image's configuration has {size} bytes; the most is {MAX_CONFIG}.")
    for name, value in config.env.items():
        if not name or {"=", "\0"} & set(name) or "\0" in value:
            raise BuildFailed(f"the image has a variable that no program can have: {name[:40]!r}.")


def _is_sane(layer: Layer) -> bool:
    return max(len(layer.name), len(layer.version)) <= 200 and 0 <= layer.size_bytes < 1 << 50


def why_failed(session: Session | None) -> str:
    """In words."""
    if session is None:
        return "its build session was removed before the image was ready"
    if session.result is Result.CANCELLED:
        return "the build was stopped"
    ended = session.ended
    if ended is None:
        return "the build ended, nobody saw how"
    code = ended.exit_code if ended.reason is Reason.EXIT else None
    what = _EXIT_CODES.get(code or 0) or ended.text or "the build failed"
    return f"{what} (madang logs {session.name})"


def split(ref: str) -> tuple[str, str]:
    """Name (perhaps with its project) and the beginning of a digest of ``NAME@DIGEST``."""
    name, at, digest = ref.partition("@")
    digest = digest.removeprefix("sha256:")
    if at and not _DIGEST_START.fullmatch(digest):
        text = f"{ref[:80]!r}: after @ comes a version's digest, at least its first 8 of 0-9a-f."
        raise InvalidRequest(text, field="image")
    return name, digest


def version(rows: Sequence[ImageRow], digest: str, ref: str) -> ImageRow:
    """The one version whose digest begins so. Raises ImageUnknown, Ambiguous."""
    found = [row for row in versions(rows) if row.digest.startswith(digest)]
    if not found:
        text = f"there is no version {ref[:80]!r}. `madang image versions` lists what is kept."
        raise ImageUnknown(text, image=ref)
    if len(found) > 1:
        raise Ambiguous(f"{ref[:80]!r} may be several versions; say more of the digest.", image=ref)
    return found[0]


def versions(rows: Iterable[ImageRow]) -> list[ImageRow]:
    """The one that is in force, then the older ones, the newest first."""
    there = [row for row in rows if row.status in {ImageStatus.READY, ImageStatus.KEPT}]
    there.sort(key=lambda row: (row.status_since, row.id), reverse=True)
    return sorted(there, key=lambda row: row.status != ImageStatus.READY)


def due(rows: Iterable[ImageRow], now: int) -> list[ImageRow]:
    """Images that it is time to look after."""
    return [row for row in rows if row.refresh_us and row.refreshed_at + row.refresh_us <= now]


def check_followable(row: ImageRow, refresh_s: float) -> None:
    """Raises Conflict for what can't be made again without somebody's help."""
    if not refresh_s:
        return
    if row.action not in {Action.BUILD, Action.PULL, Action.RECIPE}:
        text = f"image {row.name!r} came from an archive or another image; nothing to look after."
        raise Conflict(text, image=row.name)
    asked = from_json(Asked, row.asked)
    if asked.login:
        text = "was pulled with somebody's login; a schedule has none. Let the operator set it up."
        raise Conflict(f"image {row.name!r} {text}", image=row.name)
    if row.action == Action.PULL and parse(asked.reference).digest:
        text = f"image {row.name!r} was pulled by digest, which never changes; pull a tag."
        raise Conflict(text, image=row.name)


def current(rows: Sequence[ImageRow]) -> ImageRow | None:
    """Of all rows of one name the one that the name stands for."""
    order = (ImageStatus.READY, ImageStatus.BUILDING, ImageStatus.FAILED)
    by_status = {row.status: row for row in rows}
    return next((by_status[status] for status in order if status in by_status), None)


def by_name(rows: Sequence[ImageRow]) -> list[list[ImageRow]]:
    """Rows of one project and name each, in their order."""
    found: dict[tuple[str, str], list[ImageRow]] = {}
    for row in rows:
        found.setdefault((row.project_id, row.name), []).append(row)
    return list(found.values())


def in_one_project(rows: Sequence[ImageRow], preferred: str, ref: str) -> list[ImageRow]:
    """Those of the *preferred* project, or of the only one. Raises Ambiguous."""
    own = [row for row in rows if row.project_id == preferred]
    if not own and len({row.project_id for row in rows}) > 1:
        text = f"image {ref[:80]!r} is in several projects: say PROJECT/{ref[:80]}."
        raise Ambiguous(text, image=ref[:80])
    return own or list(rows)


def mount(row: ImageRow) -> ImageMount:
    """A ready image as the runtime mounts it."""
    return ImageMount(
        name=row.name,
        digest=row.digest,
        kind=row.kind,
        layers=tuple(layer.digest for layer in layers(row)),
        env=config(row).env if row.kind == ImageKind.ROOT else _ENVIRONMENT,
        warm=warm_modules(from_json(dict[str, str], row.labels)),
    )


def not_ready(name: str, row: ImageRow | None) -> ImageUnknown:
    if row is None:
        text = f"there is no image {name[:80]!r}. `madang image ls` lists them."
        return ImageUnknown(text, image=name)
    if row.status == ImageStatus.BUILDING:
        text = f"image {name!r} is still being built by {row.build_name or 'a session'}; wait."
    else:
        text = f"image {name!r} is not ready: {row.reason}."
    return ImageUnknown(text, image=name, build=row.build_name)


def layers(row: ImageRow) -> tuple[Layer, ...]:
    return from_json(tuple[Layer, ...], row.layers)


def config(row: ImageRow) -> ImageConfig:
    return from_json(ImageConfig, row.config)


def to_image(row: ImageRow, used_by: int) -> Image:
    """As the API shows it."""
    return Image(
        name=row.name,
        digest=row.digest,
        kind=ImageKind(row.kind),
        status=ImageStatus(row.status),
        requirements=from_json(tuple[str, ...], row.requirements),
        layers=layers(row),
        size_bytes=row.size_bytes,
        python=row.python,
        owner=row.owner,
        created_at=seconds(row.created_at),
        build=row.build_name or None,
        used_by=used_by,
        labels=from_json(dict[str, str], row.labels),
        policy=row.policy,
        reason=row.reason,
        config=config(row),
        source=from_json(ImageSource, row.source),
        refresh_s=seconds(row.refresh_us),
        refreshed_at=seconds(row.refreshed_at),
    )
