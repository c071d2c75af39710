"""Recipes: what may stand in them, and the scripts of their steps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang import runner
from madang.kit.recipes import MAX_BYTES, Step, parse, steps
from madang.wire.errors import InvalidRequest

OURS = sorted(Path(runner.__file__).with_name("recipes").glob("*.toml"))


def made(text: str, **lock: str) -> dict[str, Step]:
    return {step.name: step for step in steps(parse(text), lock)}


def test_all_kinds_of_steps_in_their_order() -> None:
    found = made(
        'base = "debian:trixie"\ndebian = ["jq"]\npython = ["numpy"]\nnpm = ["typescript@5"]\n'
        'run = ["a", "b"]\n[files]\n"/etc/x" = "y"\n'
    )
    names = ["base", "configure", "debian", "python", "npm", "files", "run 1", "run 2"]
    assert list(found) == names
    assert found["base"] == Step(name="base", title="trixie")
    assert "'jq' 'python3-venv' 'nodejs' 'npm'" in found["debian"].script


def test_on_an_image_nothing_is_implied() -> None:
    assert list(made('base = "tools"\npython = ["numpy"]\n')) == ["python"]


def test_a_lock_decides_what_is_installed() -> None:
    text = 'base = "debian:bookworm"\ndebian = ["jq"]\npython = ["numpy"]\n'
    found = made(text, debian="jq:amd64=1.6 libc6:amd64=2", python="numpy==2.0 --hash=sha256:ab\n")
    assert "'jq:amd64=1.6' 'libc6:amd64=2'" in found["debian"].script
    assert "numpy==2.0 --hash=sha256:ab" in found["python"].script
    assert "pip compile" not in found["python"].script


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base = 3", "base: must be a text"),
        ("", "it says no base"),
        ('base = "x"\nfoo = 1', "'foo' is unknown"),
        ('base = "x"\ndebian = ["a; b"]', "no package of Debian"),
        ('base = "x"\ndebian = ["--force"]', "no package of Debian"),
        ('base = "x"\npython = ["-r /etc/passwd"]', "no requirement"),
        ('base = "x"\nnpm = ["--global"]', "no package of npm"),
        ('base = "x"\nwarm = ["a b"]', "no name of a module"),
        ('base = "x"\n[files]\n"etc/x" = "y"', "no absolute path"),
        ('base = "x"\n[files]\n"/a/../b" = "y"', "no absolute path"),
        ('base = "x"\n[environment]\n"A B" = "y"', "no name of a variable"),
        ('base = "x"\nrun = [1]', "must be a text"),
        ("base = ", "Invalid value"),
        (f'base = "{"x" * MAX_BYTES}"', "has more than"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse(text)


@given(
    content=st.text(
        st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=60
    ),
    name=st.from_regex(r"[a-z' $\"`\\]{1,12}", fullmatch=True),
)
def test_files_are_written_as_they_are(
    content: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in them: no text is taken for a command."""
    path = tmp_path_factory.mktemp("file") / f"x{name.strip()}"
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
    text = content.replace("\\", "\\\\").replace('"', '\\"')
    text = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in text)
    script = made(f'base = "x"\n[files]\n"{quoted}" = "{text}"\n')["files"].script
    done = subprocess.run(["/bin/sh", "-eu", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == content.encode()
    assert path.stat().st_mode & 0o777 == (0o755 if content.startswith("#!") else 0o644)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_recipes_are_good(path: Path) -> None:
    recipe = parse(path.read_text())
    assert recipe.description
    assert recipe.labels["languages"]
    for step in steps(recipe):
        if step.script:
            done = subprocess.run(["/bin/sh", "-n", "-c", step.script], capture_output=True)
            assert done.returncode == 0, done.stderr
    assert os.path.basename(path).removesuffix(".toml")
