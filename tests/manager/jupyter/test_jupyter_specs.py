"""Kernelspecs: what there is to choose, and what it is called."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from madang.manager.jupyter.rules.specs import choices, language_info, model
from madang.manager.jupyter.types import Choice
from madang.wire.image import Image, ImageKind, ImageStatus, Layer
from madang.wire.languages import Language
from madang.wire.limits import Preset
from madang.wire.session import HOST_IMAGE, SizeRequest

GIB = 1 << 30
STANDARD = SizeRequest(cpu=1.0, mem_bytes=GIB)


def language(
    name: str, title: str, *, cells: str = "exec x", aliases: tuple[str, ...] = ()
) -> Language:
    return Language(
        name=name,
        title=title,
        suffixes=(f".{name}",),
        version="v",
        code="c",
        run="r",
        cells=cells,
        driver="d",
        aliases=aliases,
    )


PYTHON = language("python", "Python")
R = language("r", "R")
LANGUAGES = (language("c", "C", cells=""), PYTHON, R, language("ipykernel", "Python (ipykernel)"))
HOST = Image(name=HOST_IMAGE, digest="h", kind=ImageKind.HOST, status=ImageStatus.READY)


def image(name: str, *layers: str, kind: ImageKind = ImageKind.LAYERS, **fields: object) -> Image:
    return Image(
        name=name,
        digest="d",
        kind=kind,
        status=fields.pop("status", ImageStatus.READY),  # type: ignore[arg-type]
        python="3.11" if kind is ImageKind.LAYERS else "",
        layers=tuple(
            Layer(
                digest=layer, name=layer.split("==")[0], version=layer.split("==")[1], size_bytes=1
            )
            for layer in layers
        ),
        labels=fields.pop("labels", {}),  # type: ignore[arg-type]
    )


def titles(*images: Image, presets: tuple[Preset, ...] = (), most: int = 100) -> list[str]:
    return [c.title for c in choices((HOST, *images), LANGUAGES, presets, STANDARD, most)]


def test_a_title_says_language_framework_and_size() -> None:
    preset = Preset(name="big", size=SizeRequest(cpu=2, mem_bytes=4 * GIB))
    found = titles(image("my-torch", "torch==2.13.0+cpu", "numpy==2.2.1"), presets=(preset,))
    assert found == [
        "Python · 1 CPU · 1 GiB",
        "Python 3.11 · torch 2.13 · 1 CPU · 1 GiB",
        "Python · 2 CPU · 4 GiB",
        "Python 3.11 · torch 2.13 · 2 CPU · 4 GiB",
    ]


def test_an_image_that_is_called_otherwise_is_told_by_name_too() -> None:
    assert "Python 3.11 · numpy 2.2 (sums) · 1 CPU · 1 GiB" in titles(image("sums", "numpy==2.2.1"))
    assert "Python 3.11 · plain · 1 CPU · 1 GiB" in titles(image("plain", "click==8.2"))


def test_an_image_with_ipykernel_is_offered_with_it_too() -> None:
    found = choices([image("nb", "ipykernel==7.4")], LANGUAGES, (), STANDARD, 10)
    assert [(c.name, c.driver) for c in found] == [
        ("python.nb", ""),
        ("python-ipykernel.nb", "ipykernel"),
    ]


def test_a_root_image_has_the_languages_of_its_label_or_of_its_name() -> None:
    named = image("r", kind=ImageKind.ROOT)
    told = image("both", kind=ImageKind.ROOT, labels={"languages": "r, python, cobol"})
    other = image("debian", kind=ImageKind.ROOT)
    found = choices([named, told, other], LANGUAGES, (), STANDARD, 10)
    assert [(c.image, c.language.name) for c in found] == [
        ("r", "r"),
        ("both", "python"),
        ("both", "r"),
    ]


def test_images_that_are_not_ready_are_not_offered() -> None:
    assert titles(image("x", status=ImageStatus.BUILDING)) == ["Python · 1 CPU · 1 GiB"]


@given(
    names=st.lists(st.text(min_size=1, max_size=20), max_size=8),
    presets=st.lists(st.from_regex(r"[a-z][a-z0-9._-]{0,9}", fullmatch=True), max_size=4),
    most=st.integers(1, 12),
)
def test_names_are_unique_fit_jupyter_and_are_bounded(
    names: list[str], presets: list[str], most: int
) -> None:
    found = choices(
        [HOST, *map(image, names)],
        LANGUAGES,
        [Preset(name=name, size=SizeRequest(cpu=3)) for name in presets],
        STANDARD,
        most,
    )
    assert len(found) <= most
    assert len({c.name for c in found}) == len(found)
    assert all(re.fullmatch(r"[a-z0-9._-]+", c.name) for c in found)


def test_a_model_is_what_frontends_validate() -> None:
    (choice,) = choices([HOST], LANGUAGES, (), STANDARD, 1)
    assert isinstance(choice, Choice)
    spec = model(choice)["spec"]
    assert isinstance(spec["argv"], list)
    assert spec["language"] == "python"
    assert spec["interrupt_mode"] == "message"


def test_python_is_shown_by_the_lexers_that_frontends_have_for_it() -> None:
    info = language_info(PYTHON, "3.11.2")
    assert info["codemirror_mode"] == {"name": "ipython", "version": 3}
    assert info["file_extension"] == ".python"
    assert language_info(R, "4.2")["name"] == "R"
