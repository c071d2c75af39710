"""Decisions about images."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.image import rules
from madang.manager.image.types import LIFE
from madang.wire.errors import BuildFailed, Conflict, InvalidRequest
from madang.wire.image import BuildManifest, BuildRequest, ImageKind, ImageStatus, Layer


def _request(*requirements: str, name: str = "digits") -> BuildRequest:
    return BuildRequest(name=name, requirements=requirements)


@pytest.mark.parametrize(
    "requirement",
    [
        "numpy",
        "scikit-learn==1.5.2",
        "torch>=2,<3",
        "uvicorn[standard]",
        "Django ~= 5.0",
        'tomli; python_version < "3.11"',
        "idna @ https://example.org/idna-3.4-py3-none-any.whl",
        "numpy (>=1)",
        "x!=1",
    ],
)
def test_requirements_that_pip_takes_are_taken(requirement: str) -> None:
    assert rules.check_request(_request(requirement)).requirements == (requirement,)


@pytest.mark.parametrize(
    "requirement",
    [
        "",
        " ",
        "-r /etc/passwd",
        "--index-url=http://evil",
        "numpy --index-url http://evil",
        "numpy\n--index-url http://evil",
        "-e .",
        ".",
        "./folder",
        "/etc",
        "git+https://example.org/x",
        "x @ git+https://example.org/x",
        "x @ file:///etc/passwd",
        "https://example.org/x.whl",
        "numpy\0",
        "n" * 501,
        "# comment",
        "numpy # comment",
        "Ünicode",
        "${HOME}",
    ],
)
def test_everything_else_is_refused(requirement: str) -> None:
    with pytest.raises(InvalidRequest, match="requirements"):
        rules.check_request(_request("idna", requirement))


@given(st.text(max_size=30))
def test_no_text_becomes_an_option_or_a_second_line(text: str) -> None:
    try:
        (taken,) = rules.check_request(_request(text)).requirements
    except InvalidRequest:
        return
    assert taken[0].isalnum()
    assert taken.splitlines() == [taken]


@pytest.mark.parametrize("name", ["", "A", "1", "1a", "-a", "a/b", "../a", "a b", "a" * 41, "é"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        rules.check_request(_request("idna", name=name))


def test_the_built_in_name_is_taken() -> None:
    with pytest.raises(Conflict):
        rules.check_request(_request("idna", name="host"))


@pytest.mark.parametrize("count", [0, 201])
def test_an_image_has_some_requirements_but_not_too_many(count: int) -> None:
    with pytest.raises(InvalidRequest):
        rules.check_request(_request(*(f"p{n}" for n in range(count))))


def test_spaces_and_repetitions_go() -> None:
    assert rules.check_request(_request(" b ", "a", "b")).requirements == ("b", "a")


def test_the_digest_of_an_image_is_what_the_contract_says() -> None:
    expected = hashlib.sha256(b"layers\naa\nbb\n").hexdigest()
    assert rules.image_digest(ImageKind.LAYERS, ["aa", "bb"]) == expected
    assert rules.image_digest(ImageKind.LAYERS, ["bb", "aa"]) != expected


def test_every_status_can_end_and_nothing_follows_a_removed_image() -> None:
    assert LIFE[ImageStatus.REMOVED].next == frozenset()
    for status in ImageStatus:
        reached, todo = {status}, [status]
        while todo:
            new = LIFE[todo.pop()].next - reached
            reached |= new
            todo += new
        assert ImageStatus.REMOVED in reached


def test_a_manifest_is_checked_again_by_the_manager() -> None:
    good = Layer(digest="0" * 64, name="idna", version="3", size_bytes=1)
    rules.check_manifest(BuildManifest(python="3.11", layers=(good,)))
    for layers in (
        (),
        (good, good),
        (replace(good, digest="../x"),),
        (replace(good, size_bytes=-1),),
        (replace(good, version="v" * 201),),
    ):
        with pytest.raises(BuildFailed):
            rules.check_manifest(BuildManifest(python="3.11", layers=layers))


@pytest.mark.parametrize(
    ("label", "modules"),
    [("", ()), ("torch", ("torch",)), (" torch, numpy.random ,", ("torch", "numpy.random"))],
)
def test_a_label_names_what_is_kept_warm(label: str, modules: tuple[str, ...]) -> None:
    assert rules.warm_modules({"warm": label}) == modules


@pytest.mark.parametrize("label", ["a b", "os; evil()", "a..b", "-c", "é", ",".join("ab" * 20)])
def test_what_is_no_module_is_never_imported(label: str) -> None:
    request = replace(_request("numpy"), labels={"warm": label})
    with pytest.raises(InvalidRequest, match="warm"):
        rules.check_request(request)
