"""``madang run LANGUAGE …`` from outside: what is a language's, what is a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli

from madang.wire.image import Image, ImageKind, ImageStatus


def put(cli: Cli, name: str, text: str) -> None:
    """Where it is sent from, and where the session of the fake server has it."""
    for folder in (cli.project, Path(cli.server.folder) / "work"):
        (folder / name).write_text(text)


def test_a_piece_of_code_runs_with_its_arguments(cli: Cli) -> None:
    done = cli.run("run", "-q", "shell", "-c", 'echo "$1"; exit 3', "a b")

    assert (done.returncode, done.stdout) == (3, b"a b\n")


def test_an_alias_is_as_good_as_the_name(cli: Cli) -> None:
    done = cli.run("run", "-q", "py", "-c", "import sys; print(sys.argv[1:])", "--", "-x", "é")

    assert done.stdout.decode() == "['-x', 'é']\n"


def test_a_file_of_a_language_runs_and_the_words_after_it_are_its_arguments(cli: Cli) -> None:
    put(cli, "it is.py", "import sys; print(sys.argv[1:], sys.flags.optimize)")
    done = cli.run("run", "-q", "python", "--run-options", "-O", "it is.py", "--epochs", "3")

    assert done.stdout == b"['--epochs', '3'] 1\n", done.stderr


def test_files_are_built_with_options_and_run_with_arguments(cli: Cli) -> None:
    put(
        cli,
        "main.c",
        "#include <stdio.h>\nint twice(int);\nint main(int n, char **a)"
        '{ printf("%d %s %s\\n", twice(FOUR), a[1], TEXT); return 7; }\n',
    )
    put(cli, "twice.c", "int twice(int x) { return 2 * x; }\n")
    options = "-DFOUR=4 '-DTEXT=\"a b\"'"
    done = cli.run(
        "run", "-q", "c", "--build-options", options, "main.c", "twice.c", "--", "-v"
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (7, b"8 -v a b\n"), done.stderr


def test_an_error_of_the_compiler_names_the_line_and_nothing_is_run(cli: Cli) -> None:
    put(cli, "bad.c", "int main(void) {\n  return nothing;\n}\n")
    done = cli.run("run", "-q", "c", "bad.c")

    assert done.returncode == 1
    assert b"bad.c:2:" in done.stderr


def test_what_is_no_code_of_the_language_is_a_command(cli: Cli) -> None:
    assert cli.run("run", "-q", "python3", "-m", "this").stdout.startswith(b"The Zen")
    assert cli.run("run", "-q", "sh", "-ec", "echo $0", "me").stdout == b"me\n"
    assert cli.run("run", "-q", "--", "sh", "-c", "echo $0", "me").stdout == b"me\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["python", "-c"], "the code is missing"),
        (["python", "gone.py"], "gone.py is not here"),
        (["c", "main.c", "-O2"], "--build-options"),
        (["c", "main.c", "gone"], "no file here"),
        (["c", "--build-options", "'", "main.c"], "can't be split"),
        (["python", "--build-options", "-O", "main.py"], "is not built"),
        (["c", "--build-options", "-O2", "-c", "1"], "is for files"),
        (["python", "../outside.py"], "outside the working directory"),
    ],
)
def test_what_makes_no_sense_is_said_in_words(cli: Cli, words: list[str], said: str) -> None:
    (cli.project / "main.c").write_text("int main(void) { return 0; }\n")
    (cli.project / "main.py").touch()
    (cli.project.parent / "outside.py").touch()
    done = cli.run("run", *words)

    assert said in done.stderr.decode()
    assert done.returncode not in {0, 127}


def test_a_source_that_is_not_sent_along_is_not_run(cli: Cli) -> None:
    (cli.project / "main.py").write_text("print(1)")
    env = cli.env | {"HOME": str(cli.project)}
    done = cli.run("run", "python", "main.py", env=env)

    assert b"was not sent" in done.stderr
    assert done.returncode != 0


def test_a_language_that_is_not_there_is_named(cli: Cli) -> None:
    done = cli.run("run", "-q", "julia", "-c", "1", env=cli.env | {"PATH": "/bin:/usr/bin"})
    if done.returncode == 0:
        pytest.skip("Julia is here")

    assert done.returncode == 127
    assert b"Julia is not in this image: it has no julia" in done.stderr


def test_languages_are_listed_and_looked_for(cli: Cli) -> None:
    listed = cli.run("languages").stdout.decode()
    assert "cpp" in listed
    assert "C++" in listed
    found = json.loads(cli.run("languages", "--image", "host", "--json").stdout)
    assert found["python"].startswith("3.")


def test_the_image_with_the_languages_name_is_chosen_unless_another_is_named(cli: Cli) -> None:
    def image_of(*words: str) -> str:
        done = cli.run("run", "--dry-run", "--json", *words)
        found: str = json.loads(done.stdout)["image"]
        return found

    assert image_of("r", "-c", "1") == "host"
    for name, status in (("r", ImageStatus.READY), ("lua", ImageStatus.BUILDING)):
        cli.server.images[name] = Image(name=name, digest="d", kind=ImageKind.ROOT, status=status)

    assert image_of("r", "-c", "1") == "r"
    assert image_of("--image", "host", "r", "-c", "1") == "host"
    assert image_of("lua", "-c", "1") == "host"
    assert image_of("--", "r", "-c", "1") == "host"
