"""Images made by recipes: step after step, each in a session that runs in what was made before.

::

    build ──> row BUILDING ──> is the step known? ── yes: its layer ──┐
                    ^              │ no                               │
                    │              └> a session, from the layers so   │
                    │                 far, as a fake root: what it    │
                    │                 changed is a layer ─────────────┤
                    └───── steps are left <───────────────────────────┴──> none: READY

What is done stands in the row (``making``), so whichever server runs goes on where the last one was
ended. A step is known by its *key*: what it does, and the layers that it does it to. Keys count for
their owner alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

from madang.kit import recipes
from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.recipes import LOCK_FILE, Recipe, Step
from madang.manager.db import Database
from madang.manager.http import Caller
from madang.manager.image import rules, store
from madang.manager.image.service.images import MAX_MANIFEST, ImageService
from madang.manager.image.types import (
    MANIFEST_PATIENCE_S,
    Action,
    Asked,
    ImageRow,
    ImageSettings,
    Made,
    Making,
    Owner,
)
from madang.wire.errors import BuildFailed, Conflict, FileMissing, PlatformError, Retry
from madang.wire.image import (
    BUILD_MANIFEST,
    WARM,
    BuildManifest,
    Image,
    ImageConfig,
    ImageKind,
    Layer,
    LockedStep,
    RecipeLock,
    RecipeRequest,
)
from madang.wire.kernel import OUTPUT_DIR, ImageMount
from madang.wire.session import Result, RootMode, Session, SessionSpec, SessionStatus, SizeRequest

_FORMAT: Final = "1"
"""Grows when the same step would make another layer."""
_SHELL: Final = ("/bin/sh", "-eu", "-c")
_ENVIRONMENT: Final = {"VIRTUAL_ENV": "/env"}
MAX_LOCK: Final = 2 * 1024 * 1024


class Recipes:
    """Builds from recipes."""

    def __init__(
        self, database: Database, images: ImageService, clock: Clock, settings: ImageSettings
    ) -> None:
        self._database: Final = database
        self._images: Final = images
        self._clock: Final = clock
        self._settings: Final = settings
        images.go_on = self.go_on

    async def build(
        self, caller: Caller, request: RecipeRequest, *, key: str | None = None
    ) -> Image:
        """Begin; the image, whose ``build`` is the session of the step under way.

        The same if *key* came before with the same request. Raises Conflict while the name is
        being built.
        """
        recipe = recipes.parse(request.recipe)
        labels = dict(recipe.labels) | ({WARM: ",".join(recipe.warm)} if recipe.warm else {})
        labels |= request.labels
        rules.check_name(request.name)
        rules.check_marks(labels, request.policy)
        row = self._images.new_row(
            caller,
            key,
            name=request.name,
            kind=ImageKind.ROOT.value,
            action=Action.RECIPE.value,
            labels=to_json(labels).decode(),
            policy=request.policy,
            size=to_json(request.size).decode(),
            asked=to_json(Asked(recipe=_digest(request))).decode(),
            making=to_json(await self._begin(caller, request, recipe)).decode(),
        )
        await self._images.begin(caller, row)
        return await self._images.get(caller, request.name)

    async def lock(self, caller: Caller, name: str) -> RecipeLock:
        """What the steps of a ready image took. Raises ImageUnknown, Conflict."""
        row = await self._images.find(caller, name)
        if row is None:
            raise rules.not_ready(name, None)
        if row.action != Action.RECIPE:
            raise Conflict(f"image {name!r} was not made by a recipe.", image=name)
        making = from_json(Making, row.making)
        names = [step.name for step in _steps(row)]
        done = zip(names, making.steps, strict=False)
        return RecipeLock(
            recipe=hashlib.sha256(making.recipe.encode()).hexdigest(),
            steps=tuple(LockedStep(name=n, lock=made.lock) for n, made in done if made.lock),
        )

    async def _begin(self, caller: Caller, request: RecipeRequest, recipe: Recipe) -> Making:
        """What there is before the first step."""
        said = Making(recipe=request.recipe, lock=request.lock, fresh=request.fresh)
        env = _ENVIRONMENT if recipe.python else {}
        if recipe.suite:
            return replace(said, env={**env, **recipe.environment})
        mount = await self._images.resolve(caller, recipe.base)
        row = await self._images.find(caller, recipe.base)
        if row is None or mount.kind != ImageKind.ROOT:
            text = f"image {recipe.base!r} has no root of its own: no recipe can begin with it."
            raise Conflict(text, image=recipe.base)
        env = {**mount.env, **env, **recipe.environment}
        return replace(said, base=rules.layers(row), env=env)

    # --- for the loop

    async def go_on(self, row: ImageRow) -> None:
        """Take in what the step under way made, if it has ended; begin the next.

        Raises PlatformError where a session can't be had.
        """
        steps = _steps(row)
        if row.build:
            session = await self._images.sessions.find(row.build)
            if session is not None and session.status is not SessionStatus.TERMINATED:
                return
            step = steps[len(from_json(Making, row.making).steps)]
            if session is None or session.result is not Result.SUCCESS:
                why = f"step {step.name}: {rules.why_failed(session)}"
                await self._images.fail(row, why)
                return
            try:
                made = await self._made(row, step, session)
            except PlatformError as exc:
                ended = session.ended_at or session.status_since
                late = self._clock.now() - ended > MANIFEST_PATIENCE_S
                if exc.retry is not Retry.LATER or late:
                    text = f"step {step.name}: its result can't be kept: {exc.text}"
                    await self._images.fail(row, text)
                return
            if (grown := await self._add(row, made)) is None:
                return
            row = grown
        for step in steps[len(from_json(Making, row.making).steps) :]:
            if (known := await self._known(row, step)) is None:
                await self._start(row, step)
                return
            if (grown := await self._add(row, known)) is None:
                return
            row = grown
        await self._finish(row)

    async def _made(self, row: ImageRow, step: Step, session: Session) -> Made:
        """By a step whose session ended well."""
        sessions = self._images.sessions
        if step.script:
            saved = await sessions.save_root(session.id)
            digest, size = saved.digest, saved.size_bytes
        else:
            data = await sessions.read_file(
                session.id, f"{OUTPUT_DIR}/{BUILD_MANIFEST}", MAX_MANIFEST
            )
            manifest = rules.check_manifest(from_json(BuildManifest, data))
            if manifest.kind is not ImageKind.ROOT or len(manifest.layers) != 1:
                raise BuildFailed("the first stage made no root.")
            digest, size = manifest.layers[0].digest, manifest.layers[0].size_bytes
        try:
            lock = (await sessions.read_file(session.id, LOCK_FILE, MAX_LOCK)).decode()
        except (FileMissing, UnicodeDecodeError):
            lock = ""
        layer = Layer(digest=digest, name=step.name, version=step.title[:200], size_bytes=size)
        return Made(key=_key(row, step), layer=layer, lock=lock)

    async def _known(self, row: ImageRow, step: Step) -> Made | None:
        """What the same step made for the owner before."""
        if from_json(Making, row.making).fresh:
            return None
        key = _key(row, step)
        async with self._database.read() as tx:
            texts = await store.makings(tx, row.owner_id)
        found = (made for text in texts for made in from_json(Making, text).steps)
        return next((made for made in found if made.key == key), None)

    async def _add(self, row: ImageRow, made: Made) -> ImageRow | None:
        """The row as it is then; None: another was faster, and goes on."""
        making = from_json(Making, row.making)
        grown = replace(making, steps=(*making.steps, made))
        layers = stacked(grown)
        row_then = replace(
            row,
            making=to_json(grown).decode(),
            layers=to_json(layers).decode(),
            size_bytes=sum(layer.size_bytes for layer in layers),
            build="",
        )
        async with self._database.begin() as tx:
            advanced = await store.advance(tx, row, row_then)
        return row_then if advanced else None

    async def _start(self, row: ImageRow, step: Step) -> None:
        """The session of *step*; the same one if it was started before."""
        making = from_json(Making, row.making)
        owner = Owner(user_id=row.owner_id, user=row.owner, project_id=row.project_id)
        size = from_json(SizeRequest, row.size)
        labels = {"image": row.name, "step": step.name}
        key = f"image-{row.id}-{len(making.steps)}"
        sessions = self._images.sessions
        if step.script:
            spec = SessionSpec(
                argv=(*_SHELL, step.script),
                image=row.name,
                size=rules.build_size(size, self._settings),
                labels=labels,
                grace_s=2.0,
                root=RootMode.FAKE,
            )
            session = await sessions.start_build(owner, spec, key, mount=_mount(row, making))
        else:
            spec = rules.script_spec(("debian", step.title), size, self._settings, labels=labels)
            session = await sessions.start_build(owner, spec, key)
        async with self._database.begin() as tx:
            await store.set_build(tx, row.id, session.id, session.name)

    async def _finish(self, row: ImageRow) -> None:
        making = from_json(Making, row.making)
        manifest = BuildManifest(
            python="",
            layers=stacked(making),
            kind=ImageKind.ROOT,
            config=ImageConfig(env=making.env),
        )
        await self._images.finish(row, manifest)


def _digest(request: RecipeRequest) -> str:
    """Of all that it says but the name and what comes with it."""
    plain = replace(request, name="", labels={}, policy="")
    return hashlib.sha256(to_json(plain)).hexdigest()


def _steps(row: ImageRow) -> tuple[Step, ...]:
    making = from_json(Making, row.making)
    locked = {step.name: step.lock for step in making.lock}
    return recipes.steps(recipes.parse(making.recipe), locked)


def stacked(making: Making) -> tuple[Layer, ...]:
    """Topmost first, each once: of a layer that comes twice the upper one decides all."""
    layers = (*(made.layer for made in reversed(making.steps)), *making.base)
    found: dict[str, Layer] = {}
    for layer in layers:
        found.setdefault(layer.digest, layer)
    return tuple(found.values())


def _mount(row: ImageRow, making: Making) -> ImageMount:
    """The root as it is so far."""
    digests = tuple(layer.digest for layer in stacked(making))
    return ImageMount(
        name=row.name,
        digest=rules.image_digest(ImageKind.ROOT, digests),
        kind=ImageKind.ROOT.value,
        layers=digests,
        env=making.env,
    )


def _key(row: ImageRow, step: Step) -> str:
    layers = (layer.digest for layer in stacked(from_json(Making, row.making)))
    environment = to_json(from_json(Making, row.making).env).decode()
    parts = (_FORMAT, step.name.split()[0], step.script or step.title, environment, *layers)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
