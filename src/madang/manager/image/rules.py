"""Decisions about images, pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from madang.kit import policy
from madang.kit.codec import from_json
from madang.manager.db import seconds
from madang.manager.image.types import ImageRow, ImageSettings
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
    ImageKind,
    ImageStatus,
    Layer,
)
from madang.wire.kernel import TOOLS_DIR, ImageMount
from madang.wire.policy import IMAGE
from madang.wire.session import HOST_IMAGE, Reason, Result, Session, SessionSpec, SizeRequest

BUILD_SCRIPT: Final = f"{TOOLS_DIR}/build.pyz"
MAX_REQUIREMENTS: Final = 200
MAX_REQUIREMENT: Final = 500
MAX_LAYERS: Final = 400
MAX_KEY: Final = 200
_NAME: Final = re.compile(r"[a-z][a-z0-9._-]{1,39}")
_REQUIREMENT: Final = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\s*(?:\[[A-Za-z0-9 ,._-]*\])?\s*"
    r"(?:@\s*https?://\S.*|[<>=!~(;].*)?"
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PYTHON: Final = re.compile(r"3\.[0-9]{1,2}")
_EXIT_CODES: Final = {
    65: "no set of versions fits the requirements",
    66: "a package could not be installed",
    69: "no package index could be reached",
    73: "the disk of the build session is full; ask for more",
}
"""Of the build script (``agent.buildscript.main.Exit``)."""
_ENVIRONMENT: Final = {"VIRTUAL_ENV": "/env"}


def check_request(request: BuildRequest) -> BuildRequest:
    """With spaces and repetitions gone. Raises InvalidRequest that names what is wrong."""
    if not _NAME.fullmatch(request.name):
        text = f"name: {request.name[:60]!r} is no image name: 2 to 40 of a-z 0-9 . _ -"
        raise InvalidRequest(f"{text}, beginning with a letter.", field="name")
    if request.name == HOST_IMAGE:
        raise Conflict(f"{HOST_IMAGE!r} is built in; choose another name.")
    wanted = tuple(dict.fromkeys(each.strip() for each in request.requirements))
    if not 0 < len(wanted) <= MAX_REQUIREMENTS:
        text = f"requirements: {len(wanted)} given; 1 to {MAX_REQUIREMENTS} make an image."
        raise InvalidRequest(text, field="requirements")
    for requirement in wanted:
        _check_requirement(requirement)
    warm_modules(request.labels)
    if request.policy:
        policy.parse(request.policy, IMAGE)
    return replace(request, requirements=wanted)


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
    asked = (row.name, row.requirements, row.size, row.policy)
    if (known.name, known.requirements, known.size, known.policy) != asked:
        raise IdempotencyMismatch("this Idempotency-Key came before with another build.")


def build_spec(row: ImageRow, settings: ImageSettings) -> SessionSpec:
    """The session that builds *row*."""
    asked = from_json(SizeRequest, row.size)
    requirements = from_json(tuple[str, ...], row.requirements)
    return SessionSpec(
        argv=("python3", "-I", BUILD_SCRIPT, *requirements),
        image=HOST_IMAGE,
        size=SizeRequest(
            cpu=asked.cpu or settings.cpu,
            mem_bytes=asked.mem_bytes or settings.mem_bytes,
            pids=asked.pids or settings.pids,
            disk_bytes=asked.disk_bytes or settings.disk_bytes,
            time_s=asked.time_s or settings.time_s,
        ),
        labels={"image": row.name},
        grace_s=2.0,
    )


def image_digest(kind: ImageKind, layers: Iterable[str]) -> str:
    """Content address: SHA-256 over the kind and the layers, topmost first, a line each."""
    return hashlib.sha256("".join(f"{part}\n" for part in (kind, *layers)).encode()).hexdigest()


HOST: Final = Image(
    name=HOST_IMAGE,
    digest=image_digest(ImageKind.HOST, ()),
    kind=ImageKind.HOST,
    status=ImageStatus.READY,
)


def check_manifest(manifest: BuildManifest) -> BuildManifest:
    """What a build session says, which its owner can have changed. Raises BuildFailed."""
    digests = [layer.digest for layer in manifest.layers]
    sane = (
        _PYTHON.fullmatch(manifest.python)
        and 0 < len(digests) <= MAX_LAYERS
        and len(set(digests)) == len(digests)
        and all(map(_DIGEST.fullmatch, digests))
        and all(_is_sane(layer) for layer in manifest.layers)
    )
    if not sane:
        raise BuildFailed("the build's manifest is damaged.")
    return manifest


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
        env=_ENVIRONMENT,
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
    )
