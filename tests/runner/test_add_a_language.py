"""What the page «Add a language» says is done as it says, with the texts that stand there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.conftest import ROOT

from madang.kit.languages import Languages, code_command, file_command
from madang.testing.drivers import Driver
from madang.testing.languages import ENVIRONMENT

PAGE = (ROOT / "docs/howto/add-a-language.md").read_text()


def texts(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def languages(tmp_path: Path) -> Languages:
    manifest, _, cells = texts("toml")
    (driver,) = texts("awk")
    folder = tmp_path / "languages"
    folder.mkdir()
    (folder / "awk.toml").write_text(manifest + cells)
    (folder / "awk.driver").write_text(driver)
    return Languages(str(folder))


def test_its_manifest_runs_code_and_files(languages: Languages, tmp_path: Path) -> None:
    awk = languages.get("awk")
    (tmp_path / "sum.awk").write_text("{ sum += $1 } END { print sum }\n")
    (tmp_path / "numbers.txt").write_text("1\n2\n")
    for command, said in (
        (code_command(awk, "print 6 * 7"), "42\n"),
        (file_command(awk, ["sum.awk"], ["numbers.txt"]), "3\n"),
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_its_driver_keeps_state_and_tells_the_line_of_an_error(languages: Languages) -> None:
    with Driver.start(languages, "awk", ENVIRONMENT) as driver:
        assert driver.run("x = 20\n").status == "ok"
        assert driver.run("x + 1\n").result == "21"
        assert driver.run("print x + 2\n").stdout == b"22\n"
        assert driver.run("x = 1\n\nnope\n").error == ("NameError", "nope is not defined", 3)
        assert driver.run("x\n").result == "1"


def test_its_way_without_a_driver_works(tmp_path: Path) -> None:
    manifest, cells, _ = texts("toml")
    (tmp_path / "awk.toml").write_text(manifest + cells)
    with Driver.start(Languages(str(tmp_path)), "awk", ENVIRONMENT) as driver:
        assert driver.run("print 6 * 7").stdout == b"42\n"
        assert driver.run("exit 3").status == "error"


def test_its_program_says_what_comes_of_it(
    languages: Languages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (program,) = texts("python")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "page", "exec"), {})

    assert capsys.readouterr().out == "1 ok 21\n"


def test_it_names_every_key_of_a_manifest() -> None:
    from dataclasses import fields

    from madang.wire.languages import Language

    told = set(re.findall(r"`(\w+)`", PAGE))
    assert {key.name for key in fields(Language)} - {"name"} <= told
