"""Paths and contents of files, as Jupyter's API has them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.jupyter.rules.contents import (
    Place,
    data_of,
    filled,
    folder,
    free_name,
    model,
    place_of,
)
from madang.wire.errors import InvalidRequest, PathInvalid
from madang.wire.link import FileEntry


def entry(path: str, kind: str = "file", size: int = 3) -> FileEntry:
    return FileEntry(path=path, kind=kind, size_bytes=size, mode=0o644, modified_at=1.5)


@given(st.text(max_size=60))
def test_no_path_leads_out_of_its_session(path: str) -> None:
    try:
        place = place_of(path)
    except PathInvalid:
        return
    assert place.absolute == "/work" or place.absolute.startswith("/work/")
    assert ".." not in place.absolute.split("/")
    assert "//" not in place.absolute


@pytest.mark.parametrize("path", ["..", "s/../x", "s/a/../../b", "s/\0", "s/" + "a" * 5000])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(PathInvalid):
        place_of(path)


def test_a_path_names_a_session_and_a_file_in_it() -> None:
    assert place_of("/calm-otter/a//b.txt") == Place("calm-otter", "a/b.txt")
    assert place_of("calm-otter").absolute == "/work"
    assert place_of("") == Place("", "")


def test_a_folder_lists_files_folders_and_links_alone() -> None:
    listed = [entry("a.ipynb"), entry("d", "dir"), entry("pipe", "other"), entry("l", "link")]
    found = folder(place_of("s"), entry("work", "dir"), listed)
    assert [(e["path"], e["type"]) for e in found["content"]] == [
        ("s/a.ipynb", "notebook"),
        ("s/d", "directory"),
        ("s/l", "file"),
    ]


def test_content_comes_in_the_format_that_fits_or_was_asked_for() -> None:
    text, binary = model(place_of("s/a.txt"), entry("a")), model(place_of("s/a.png"), entry("a"))
    notebook = model(place_of("s/n.ipynb"), entry("n"))
    assert filled(text, "ä".encode(), None)["format"] == "text"
    assert filled(text, b"ab", "base64")["content"] == base64.b64encode(b"ab").decode()
    assert filled(binary, b"\x89\xff", None)["mimetype"] == "image/png"
    assert filled(notebook, b'{"cells": []}', None)["content"] == {"cells": []}
    with pytest.raises(InvalidRequest):
        filled(text, b"\xff", "text")
    with pytest.raises(InvalidRequest):
        filled(notebook, b"[1", None)


@given(st.binary(max_size=200))
def test_what_is_saved_as_base64_is_what_was_read(data: bytes) -> None:
    read = filled(model(place_of("s/a.bin"), entry("a")), data, "base64")
    assert data_of(read) == data


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"type": "file", "content": 1, "format": "text"},
        {"type": "file", "content": "a"},
        {"type": "file", "content": "é", "format": "base64"},
        {"type": "notebook", "content": "x"},
        {"type": "file", "format": "text", "content": "a", "chunk": 1},
    ],
)
def test_bodies_that_hold_no_content_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        data_of(body)


def test_a_new_file_gets_the_first_name_that_is_free() -> None:
    assert free_name("Untitled", ".ipynb", []) == "Untitled.ipynb"
    assert (
        free_name("Untitled", ".ipynb", ["Untitled.ipynb", "Untitled2.ipynb"]) == "Untitled1.ipynb"
    )
