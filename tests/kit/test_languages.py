"""Manifests: what is read, what is refused, which commands come of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import ROOT

from madang.kit.languages import (
    DRIVERS,
    MAX_ARGUMENT_BYTES,
    SHIPPED,
    Languages,
    cells_command,
    code_command,
    file_command,
    find,
    parse,
    version_command,
)
from madang.testing.languages import SAMPLES
from madang.wire.errors import InvalidRequest, LanguageInvalid, LanguageUnknown

MINIMAL = """
title = "Cat"
suffixes = [".cat"]
needs = ["no-such-cat|cat"]
version = 'echo 1; echo more'
code = 'printf "%s|" "$PROGRAM" "$CODE" "$@"'
run = 'printf "%s|" "$FILE" $OPTIONS "$@"'
"""
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def run(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def test_every_shipped_manifest_is_read_and_names_are_one_languages_alone() -> None:
    languages = Languages()
    names = [name for one in languages.all() for name in (one.name, *one.aliases)]

    assert len(languages.all()) == len([f for f in os.listdir(SHIPPED) if f.endswith(".toml")])
    assert len(names) == len(set(names))
    # ipykernel is Python once more, and is tried with Jupyter.
    assert {one.name for one in languages.all()} - SAMPLES.keys() == {"ipykernel"}


def test_every_driver_is_there_is_used_and_is_short_enough_for_the_environment() -> None:
    languages = Languages()
    used = {one.driver for one in languages.all() if one.driver}

    assert all(0 < len(languages.driver(x).encode()) <= MAX_ARGUMENT_BYTES
               for x in languages.all() if x.driver)  # fmt: skip
    assert {name for name in os.listdir(DRIVERS) if not name.startswith("_")} - used == set()


def test_every_command_is_good_shell() -> None:
    for one in Languages().all():
        commands = [code_command(one, "1"), file_command(one, ["a'b"]), version_command([one])]
        for command in (*commands, ("/bin/sh", "-c", cells_command(one))):
            done = run(("/bin/sh", "-n", *command[1:3]))
            assert (done.returncode, done.stderr) == (0, ""), f"{one.name}: {command[2]}"


@given(code=WORD, words=st.lists(WORD, max_size=3))
def test_code_and_arguments_arrive_as_they_were_given(code: str, words: list[str]) -> None:
    done = subprocess.run(
        code_command(parse(MINIMAL, "cat"), code, words), capture_output=True, check=True
    )
    program, *rest = done.stdout.decode().split("|")
    assert os.path.basename(program) == "cat"
    assert "|".join(rest) == "".join(f"{word}|" for word in [code, *words])


@given(options=st.lists(WORD, max_size=3), words=st.lists(WORD, max_size=3))
def test_options_and_files_arrive_as_they_were_given(options: list[str], words: list[str]) -> None:
    language = parse(MINIMAL, "cat")
    command = file_command(language, ["-a b'$(x)"], words, run_options=options)
    done = subprocess.run(command, capture_output=True, check=True)

    assert done.stdout.decode() == "".join(f"{w}|" for w in ["./-a b'$(x)", *options, *words])


def test_a_missing_program_is_said_in_words_with_127() -> None:
    language = parse(MINIMAL.replace("no-such-cat|cat", "no-such-cat"), "cat")
    done = run(code_command(language, "x"))

    assert (done.returncode, done.stdout) == (127, "")
    assert "Cat is not in this image: it has no no-such-cat" in done.stderr


def test_versions_are_told_for_what_is_there_alone() -> None:
    here = parse(MINIMAL, "cat")
    missing = parse(MINIMAL.replace("no-such-cat|cat", "no-such-cat"), "dog")
    silent = parse(MINIMAL.replace("echo 1; echo more", "true"), "cow")
    failing = parse(MINIMAL.replace("echo 1; echo more", "echo 1; exit 3"), "pig")

    assert run(version_command([missing, here, silent, failing])).stdout == "cat\t1\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("title", "titel"), "no key 'titel'"),
        (('title = "Cat"', ""), "title is missing"),
        (('title = "Cat"', "title = 1"), "title must be a text"),
        (('[".cat"]', '".cat"'), "suffixes must be a list"),
        (('[".cat"]', "[1]"), "suffixes must be a list"),
        (('[".cat"]', "[]"), "suffixes must not be empty"),
        (('".cat"', '"cat"'), "suffixes: 'cat'"),
        (('"no-such-cat|cat"', '"$(reboot)"'), "needs: '$(reboot)'"),
        (("version", "state = 1\nversion"), "state must be true or false"),
        (("version", "driver = '../x'\ncells = 'y'\nversion"), "driver: '../x'"),
        (("version", "cells = 'y'\nversion"), "cells and driver go together"),
        (("version", "name = 'dog'\nversion"), "differs from its file's"),
        (("version", "version version"), "Expected '='"),
        (('"Cat"', '"C\\u200b"'), "can't be printed"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_in_words(
    change: tuple[str, str], said: str
) -> None:
    with pytest.raises(LanguageInvalid) as caught:
        parse(MINIMAL.replace(*change, 1), "cat")

    assert said in caught.value.text


def test_a_folder_adds_languages_and_replaces_shipped_ones_while_we_run(tmp_path: Path) -> None:
    languages = Languages(str(tmp_path / "languages"))
    with pytest.raises(LanguageUnknown):
        languages.get("cat")
    folder = tmp_path / "languages"
    folder.mkdir()
    manifest = MINIMAL + "cells = 'exec \"$PROGRAM\"'\ndriver = 'cat.drv'\n"
    (folder / "cat.toml").write_text(manifest)
    (folder / "lua.toml").write_text(MINIMAL)
    (folder / "broken.toml").write_text("title = ")
    (folder / "huge.toml").write_text("# " + "x" * 20_000)
    (folder / "latin.toml").write_bytes(b"title = '\xff'")
    (folder / "cat.drv").write_text("text of the driver")

    assert languages.driver(languages.get("cat")) == "text of the driver"
    assert languages.get("lua").title == "Cat"
    assert languages.get("broken" if find(languages.all(), "broken") else "cat").name == "cat"
    (folder / "lua.toml").unlink()
    assert languages.get("lua").title == "Lua"
    (folder / "cat.drv").unlink()
    with pytest.raises(LanguageInvalid, match=r"no driver 'cat\.drv'"):
        languages.driver(languages.get("cat"))


def test_code_that_no_program_can_be_given_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="longer than 131071 bytes"):
        code_command(parse(MINIMAL, "cat"), "é" * 65_536)


def test_the_table_of_the_documentation_has_every_language() -> None:
    page = (ROOT / "docs/reference/languages.md").read_text()

    for name in SAMPLES:
        title = Languages().get(name).title
        assert f"| {title} | `{name}` |" in page
