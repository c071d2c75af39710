"""The state folder: one user at a time, known formats only, nothing alien."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from madang.client.tree import Limits, scan
from madang.daemon.state import Owner, Running, StateFolder, born, read_running
from madang.wire.errors import ConfigInvalid, StateLocked, StateVersion

ME = Owner(os.geteuid(), os.getegid())


def test_a_new_folder_has_everything_with_tight_modes(tmp_path: Path) -> None:
    folder = StateFolder.open(str(tmp_path / "deep" / "state"), server=ME)
    root = Path(folder.path)
    assert (root / "VERSION").read_text() == "1\n"
    assert (root / "server").stat().st_mode & 0o777 == 0o700
    assert (root / "run").stat().st_mode & 0o777 == 0o700
    folder.write_token("mdg_x")
    assert (root / "token").stat().st_mode & 0o777 == 0o600
    assert folder.read_token() == "mdg_x"
    folder.close()


def test_a_state_folder_in_a_working_directory_is_not_sent_along(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)")
    StateFolder.open(str(tmp_path / "state"), server=ME).close()
    assert (tmp_path / "state" / "server").is_dir()
    found = scan(os.fsencode(tmp_path), Limits()).entries
    assert [entry.path for entry in found] == [b"train.py"]


def test_two_at_once_are_refused_with_the_way_out(tmp_path: Path) -> None:
    first = StateFolder.open(str(tmp_path / "s"), server=ME)
    me = born(os.getpid())
    assert me is not None
    first.tell(Running(pid=os.getpid(), born=me, url="http://here"))
    with pytest.raises(StateLocked, match=r"http://here.*madang down"):
        StateFolder.open(str(tmp_path / "s"), server=ME)
    first.close()
    StateFolder.open(str(tmp_path / "s"), server=ME).close()


def test_a_folder_from_a_newer_version_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("7\n")
    tmp_path.chmod(0o755)
    with pytest.raises(StateVersion, match="'7'"):
        StateFolder.open(str(tmp_path), server=ME)
    assert sorted(os.listdir(tmp_path)) == ["VERSION", "lock"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigInvalid, match=r"thesis\.tex"):
        StateFolder.open(str(tmp_path), server=ME)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigInvalid, match="chmod go-w"):
        StateFolder.open(str(tmp_path), server=ME)


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="--state DIR"):
        StateFolder.open(str(tmp_path / "file"), server=ME)


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    StateFolder.open(str(tmp_path / "s"), server=ME).close()
    (tmp_path / "s" / "tools").rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "s" / "tools").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigInvalid):
        StateFolder.open(str(tmp_path / "s"), server=ME)
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700


def test_a_lock_file_of_a_dead_or_other_process_counts_for_nothing(tmp_path: Path) -> None:
    folder = StateFolder.open(str(tmp_path / "s"), server=ME)
    folder.tell(Running(pid=os.getpid(), born=1))
    assert read_running(folder.path) is None
    folder.tell(Running(pid=2**22 + 1, born=1))
    assert read_running(folder.path) is None
    folder.close()
    assert read_running(folder.path) is None
    assert read_running(str(tmp_path / "nothing")) is None
    (tmp_path / "s" / "lock").write_text("{garbage")
    assert read_running(folder.path) is None
