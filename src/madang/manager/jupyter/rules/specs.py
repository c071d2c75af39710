"""Which kernelspecs there are: languages of images, in sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from madang.manager.jupyter.types import Choice
from madang.wire.image import Image, ImageKind, ImageStatus
from madang.wire.languages import Language
from madang.wire.limits import Preset
from madang.wire.session import HOST_IMAGE, SizeRequest
from madang.wire.size import format_bytes

LANGUAGES: Final = "languages"
"""Label of an image: names of the languages that it has, comma between them."""
IPYKERNEL: Final = "ipykernel"
PYTHON: Final = "python"
_TOLD: Final = (
    "torch", "tensorflow", "tensorflow-cpu", "jax", "keras", "onnxruntime", "xgboost", "lightgbm",
    "scikit-learn", "pandas", "numpy",
)  # fmt: skip
"""Distributions that say what an image is for; the first one that it has is told."""
_UNFIT: Final = re.compile(r"[^a-z0-9._-]+")


def choices(
    images: Iterable[Image],
    languages: Sequence[Language],
    presets: Iterable[Preset],
    standard: SizeRequest,
    most: int,
) -> tuple[Choice, ...]:
    """At most *most*, those of the standard size first; names are unique."""
    kinds = [
        kind
        for image in images
        if image.status is ImageStatus.READY
        for kind in _of_image(image, languages)
    ]
    sizes = [("", standard), *((preset.name, preset.size) for preset in presets)]
    found: dict[str, Choice] = {}
    for preset, size in sizes:
        for kind in kinds:
            if len(found) >= most:
                return tuple(found.values())
            name = _free(f"{kind.name}.{preset}" if preset else kind.name, found)
            title = " · ".join([kind.title, *_size(size, standard)])
            found[name] = replace(kind, name=name, title=title, preset=preset)
    return tuple(found.values())


def model(choice: Choice) -> dict[str, Any]:
    """A kernelspec as Jupyter's REST API has it."""
    about = {"image": choice.image, "language": choice.language.name}
    about |= {"preset": choice.preset} if choice.preset else {}
    spec = {
        "argv": [],
        "display_name": choice.title,
        "language": jupyter_name(choice.language),
        "interrupt_mode": "message",
        "env": {},
        "metadata": {"madang": about},
    }
    return {"name": choice.name, "spec": spec, "resources": {}}


def jupyter_name(language: Language) -> str:
    """What frontends compare to a notebook's ``language``."""
    return {"r": "R"}.get(language.name, language.name)


def language_info(language: Language, version: str) -> dict[str, Any]:
    """Of a kernel_info_reply."""
    mode = language.mode or language.name
    found: dict[str, Any] = {
        "name": jupyter_name(language),
        "version": version,
        "mimetype": language.mime,
        "file_extension": language.suffixes[0],
        "pygments_lexer": mode,
        "codemirror_mode": mode,
    }
    if language.name == PYTHON:
        found |= {
            "pygments_lexer": "ipython3",
            "codemirror_mode": {"name": "ipython", "version": 3},
            "nbconvert_exporter": "python",
        }
    return found


def _of_image(image: Image, languages: Sequence[Language]) -> Iterator[Choice]:
    """In the standard size; the title lacks the size."""
    for language in _languages(image, languages):
        yield _choice(image, language, "")
        if language.name == PYTHON and any(layer.name == IPYKERNEL for layer in image.layers):
            yield _choice(image, language, IPYKERNEL)


def _languages(image: Image, languages: Sequence[Language]) -> list[Language]:
    """What the image's label says; else Python, or what its name says."""
    with_cells = [lang for lang in languages if lang.cells and lang.name != IPYKERNEL]
    if told := image.labels.get(LANGUAGES, ""):
        wanted = {word.strip() for word in told.split(",")}
        return [lang for lang in with_cells if wanted & {lang.name, *lang.aliases}]
    if image.kind is ImageKind.ROOT:
        return [lang for lang in with_cells if image.name in {lang.image or lang.name, lang.name}]
    return [language for language in with_cells if language.name == PYTHON]


def _choice(image: Image, language: Language, driver: str) -> Choice:
    name = "-".join(filter(None, [language.name, driver]))
    if image.name != HOST_IMAGE:
        name = f"{name}.{image.name}"
    version = image.python if language.name == PYTHON else ""
    parts = [" ".join(filter(None, [language.title, version]))]
    if image.name != HOST_IMAGE:
        parts.append(_told(image))
    parts += [driver] if driver else []
    return Choice(
        name=_UNFIT.sub("-", name.lower()),
        title=" · ".join(parts),
        language=language,
        driver=driver,
        image=image.name,
        preset="",
    )


def _told(image: Image) -> str:
    """What tells an image from others: its main distribution and, if that is not it, its name."""
    layers = {layer.name: layer.version for layer in image.layers}
    for name in _TOLD:
        if name in layers:
            told = f"{name} {'.'.join(layers[name].split('+')[0].split('.')[:2])}"
            return told if name in image.name else f"{told} ({image.name})"
    return image.name


def _size(size: SizeRequest, standard: SizeRequest) -> list[str]:
    cpu = standard.cpu if size.cpu is None else size.cpu
    mem = standard.mem_bytes if size.mem_bytes is None else size.mem_bytes
    return [f"{cpu:g} CPU"] * (cpu is not None) + [format_bytes(mem or 0)] * (mem is not None)


def _free(name: str, taken: Iterable[str]) -> str:
    """Several projects may each have an image of the same name."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found
