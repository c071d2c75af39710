"""What of a folder is sent, and what is not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.fake import FakeServer

from madang.client import Client, tree, workspace
from madang.client.ignore import Rules
from madang.client.tree import Limits
from madang.client.workspace import FileChanged
from madang.wire.api import WorkspaceManifest, WorkspaceState
from madang.wire.errors import FileFailed, WorkspaceTooLarge


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def names(folder: Path, limits: Limits | None = None) -> list[bytes]:
    found = tree.scan(os.fsencode(folder), limits or Limits())
    return [entry.path for entry in found.entries]


def make(folder: Path, *paths: str, text: str = "x") -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def test_files_folders_and_links_are_found_parents_first(project: Path) -> None:
    make(project, "b/c", "a")
    (project / "empty").mkdir()
    (project / "link").symlink_to("b")

    assert names(project) == [b"a", b"b", b"b/c", b"empty", b"link"]


def test_what_is_never_wanted_stays_at_home_unless_taken_back(project: Path) -> None:
    make(project, ".git/HEAD", "a/__pycache__/x.pyc", "a/b.py", ".venv/bin/python")

    assert names(project) == [b"a", b"a/b.py"]
    (project / ".madangignore").write_text("!.git\n")
    assert b".git/HEAD" in names(project)


def test_names_that_are_not_utf8_are_sent(project: Path) -> None:
    name = os.fsencode(project) + b"/a\xff"
    with open(name, "wb") as file:
        file.write(b"x")

    hashed = workspace.prepare(os.fsencode(project))

    assert [file.path for file in hashed.manifest.files] == ["a%FF"]


def test_loops_are_harmless(project: Path) -> None:
    (project / "self").symlink_to(".")
    (project / "up").symlink_to("..")

    assert names(project) == [b"self", b"up"]


def test_sockets_and_pipes_are_left_out_and_named(project: Path) -> None:
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(project / "socket"))
        found = tree.scan(os.fsencode(project), Limits())

    assert found.entries == ()
    assert found.skipped == (b"pipe", b"socket")


def test_too_much_is_refused_with_the_largest_folders(project: Path) -> None:
    make(project, "data/big", text="x" * 5000)
    make(project, "small", "many/1", "many/2", "many/3")

    with pytest.raises(WorkspaceTooLarge, match=r"data \(4.9 KiB\)"):
        names(project, Limits(size_bytes=4000))
    with pytest.raises(WorkspaceTooLarge, match=r"many \(4 files\)"):
        names(project, Limits(files=5))


def test_a_huge_tree_is_not_walked_to_its_end(project: Path) -> None:
    for i in range(40):
        make(project, *(f"d{i}/{j}" for j in range(10)))

    with pytest.raises(WorkspaceTooLarge, match="more than"):
        names(project, Limits(files=20))


def test_what_can_not_be_read_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(project, "secret", "fine")
    real = os.open

    def refuse(path: bytes, flags: int, *args: int, **kwargs: int) -> int:
        if path.endswith(b"secret"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)  # tests run as root, whom no mode stops
    with pytest.raises(FileFailed, match=r"secret \(Permission denied\)"):
        workspace.prepare(str(project))


def test_a_file_that_changes_between_hash_and_send_is_noticed(project: Path) -> None:
    make(project, "a", text="before")
    hashed = workspace.prepare(str(project))
    make(project, "a", text="afterw")

    with pytest.raises(FileChanged):
        list(workspace.send(hashed, list(hashed.sources)))


def test_a_file_that_changes_once_while_it_is_sent_is_sent_as_it_became(
    project: Path, client: Client, server: FakeServer
) -> None:
    make(project, "a", text="before")
    register = client.register_workspace

    def change_after(manifest: WorkspaceManifest) -> WorkspaceState:
        state = register(manifest)
        make(project, "a", text="after!")
        return state

    client.register_workspace = change_after  # type: ignore[method-assign]
    synced = client.sync_workspace(str(project))

    assert list(server.blobs.values()) == [b"after!"]
    assert synced.files == 1


def test_only_changed_files_are_hashed_and_only_missing_ones_sent(
    project: Path, client: Client, server: FakeServer, tmp_path: Path
) -> None:
    make(project, "a", "b/c", text="same")
    for path in ("a", "b/c"):
        os.utime(project / path, (1, 1))
    cache = str(tmp_path / "cache/x.json")

    first = client.sync_workspace(str(project), cache=cache)
    again = client.sync_workspace(str(project), cache=cache)
    (project / "a").write_text("other")
    third = client.sync_workspace(str(project), cache=cache)

    assert (first.sent_files, again.sent_files, third.sent_files) == (1, 0, 1)
    assert first.digest == again.digest != third.digest


def test_a_damaged_cache_costs_time_only(project: Path, client: Client, tmp_path: Path) -> None:
    make(project, "a")
    cache = tmp_path / "cache.json"
    cache.write_text("garbage")

    assert client.sync_workspace(str(project), cache=str(cache)).files == 1
    assert client.sync_workspace(str(project), cache="/proc/none/cache").files == 1


def test_an_empty_folder_makes_no_call(project: Path, client: Client, server: FakeServer) -> None:
    make(project, "runs/.madangignore", "runs/old/out", text="*\n")

    assert client.sync_workspace(str(project)).digest is None
    assert server.requests == []


def test_large_files_are_sent_in_parts_with_progress(
    project: Path, client: Client, server: FakeServer
) -> None:
    data = os.urandom(2_000_000)
    (project / "big").write_bytes(data)
    told: list[tuple[int, int]] = []

    client.sync_workspace(str(project), progress=lambda done, total: told.append((done, total)))

    assert list(server.blobs.values()) == [data]
    assert told[-1][1] == len(data)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("patterns", "path", "ignored"),
    [
        ("*.pt", b"a/b.pt", True),
        ("*.pt", b"a/b.pth", False),
        ("/data", b"data", True),
        ("/data", b"a/data", False),
        ("a/b", b"a/b", True),
        ("a/b", b"c/a/b", False),
        ("a/**/b", b"a/b", True),
        ("a/**/b", b"a/x/y/b", True),
        ("**/b", b"x/b", True),
        ("a/**", b"a/x/y", True),
        ("a/**", b"a", False),
        ("a?c", b"abc", True),
        ("a?c", b"a/c", False),
        ("[a-c]x", b"bx", True),
        ("[!a-c]x", b"bx", False),
        ("[", b"[", True),
        (r"\#x", b"#x", True),
        ("# x", b"# x", False),
        (r"\!x", b"!x", True),
        ("*\n!keep", b"keep", False),
        ("!keep\n*", b"keep", True),
        ("x  ", b"x", True),
        ("[z-a]", b"[z-a]", True),
    ],
)
def test_patterns_mean_what_gitignore_says(patterns: str, path: bytes, ignored: bool) -> None:
    rules = Rules().extended(b"", patterns.encode())

    assert rules.ignores(path, is_folder=False) is ignored


def test_a_slash_at_the_end_means_folders_only() -> None:
    rules = Rules().extended(b"", b"build/\n")

    assert rules.ignores(b"a/build", is_folder=True)
    assert not rules.ignores(b"build", is_folder=False)


def test_a_deeper_file_has_the_last_word_on_its_own_folder_only() -> None:
    rules = Rules().extended(b"", b"*.log\n").extended(b"sub/", b"!/keep.log\n")

    assert not rules.ignores(b"sub/keep.log", is_folder=False)
    assert rules.ignores(b"sub/deep/keep.log", is_folder=False)
    assert rules.ignores(b"keep.log", is_folder=False)


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=20))
def test_any_ignore_file_can_be_read(text: bytes, path: bytes) -> None:
    Rules().extended(b"", text).ignores(path, is_folder=False)
