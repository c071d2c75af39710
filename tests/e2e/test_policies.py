"""Sandbox policies by command line, on a real platform."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.agent.launcher.offers import find
from madang.client import Client
from madang.testing.platform import Platform
from madang.wire.policies import PolicyDraft

pytestmark = pytest.mark.slow
ASK = (
    "import ctypes; l = ctypes.CDLL(None, use_errno=True);"
    " l.socketpair(1, 1, 0, (ctypes.c_int * 2)()); print(ctypes.get_errno())"
)
TRY = ("--no-sync", "--no-output", "-q", "--", "/usr/bin/python3", "-I", "-S", "-c", ASK)
DENY = "version = 1\n\n[[deny]]\ncalls = ['socketpair']\nwith = '{}'\nwhy = 'a test'\n"
NOTHING = "version = 1\n"


@pytest.fixture
def no_policy(client: Client) -> Iterator[None]:
    """Whatever the test puts in force ends with it."""
    yield
    for found in client.list_policies():
        if found.target != "base":
            client.apply_policy(PolicyDraft(text=NOTHING, target=found.target))


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.usefixtures("no_policy")
def test_an_administrator_puts_a_policy_in_force(platform: Platform, tmp_path: Path) -> None:
    site = write(tmp_path, "site.toml", DENY.format("EACCES"))
    assert said(platform.madang("run", *TRY)) == "0\n"

    assert "stricter socketpair (1)" in said(platform.madang("policy", "check", site))
    assert "+with = 'EACCES'" in said(platform.madang("policy", "diff", site))
    assert "site is at version" in said(platform.madang("policy", "apply", site, "--note", "test"))

    assert said(platform.madang("run", *TRY)) == "13\n"
    assert said(platform.madang("policy", "show", "site")) == DENY.format("EACCES")
    history = json.loads(said(platform.madang("policy", "show", "--history", "--json")))
    assert (history[0]["author"], history[0]["note"]) == ("admin", "test")
    verdict = said(platform.madang("policy", "test", "-", "socketpair", "1", "0x1"))
    assert verdict == "socketpair is refused with EACCES by site line 3: a test\n"


@pytest.mark.usefixtures("no_policy")
def test_a_session_adds_its_own_and_shows_it(
    platform: Platform, client: Client, tmp_path: Path
) -> None:
    own = write(tmp_path, "own.toml", DENY.format("EXDEV"))
    site = write(tmp_path, "site.toml", DENY.format("EACCES"))

    assert said(platform.madang("run", "--policy", own, *TRY)) == "18\n"
    said(platform.madang("policy", "apply", site))
    done = platform.madang("run", "--policy", own, "--name", "own-policy", *TRY)

    assert said(done) == "13\n"
    version = client.get_policy("site").version
    assert client.get_session("own-policy").enforced["policy"] == f"site {version}, session"
    assert f"policy by site {version}, session" in said(platform.madang("show", "own-policy"))
    verdict = said(platform.madang("policy", "test", own, "socketpair", "1", "--session"))
    assert "EACCES by site line 3" in verdict


@pytest.mark.usefixtures("no_policy")
def test_a_policy_of_one_machine_counts_there(platform: Platform, tmp_path: Path) -> None:
    node = platform.madang("policy", "show", "--json")
    assert said(node)
    with platform.client() as client:
        name = client.list_nodes()[0].name
    file = write(tmp_path, "node.toml", DENY.format("EXDEV"))
    said(platform.madang("policy", "apply", file, "--node", name))
    assert said(platform.madang("run", *TRY)) == "18\n"
    assert f"node:{name}" in said(platform.madang("policy", "show"))


@pytest.mark.skipif(bool(find("crun")[1]), reason=find("crun")[1] or "it is there")
@pytest.mark.usefixtures("no_policy")
def test_a_rule_that_no_machine_keeps_is_refused_when_it_is_asked_for(
    platform: Platform, client: Client, tmp_path: Path
) -> None:
    own = write(tmp_path, "own.toml", "version = 1\n\n[[files]]\ndeny = ['/etc/hostname']\n")
    by_crun = ("--runtime", "crun", "--policy", own, *TRY)
    assert "files" not in client.list_nodes()[0].facts["keeps.crun"]

    for more in ((), ("--dry-run",)):
        done = platform.madang("run", *more, *by_crun)
        assert done.returncode not in {0, 1}
        assert "session line 3 can't be kept by runtime crun: no machine of group" in done.stderr
        assert "policy.unkept" in done.stderr
    assert not list(client.list_sessions(ended=True)), "nothing was made"

    group = client.get_group("default")
    accepts = f'{group.text}\naccept_unenforced = ["files"]\n'
    changed = client.put_group("default", accepts, version=group.version)
    try:
        assert said(platform.madang("run", "--name", "accepted", *by_crun)) == "0\n"
        warnings = client.get_session("accepted").warnings
        assert any("session line 3 is not kept" in each for each in warnings), warnings
    finally:
        client.put_group("default", group.text, version=changed.version)


def test_a_killed_program_is_told_why(platform: Platform, tmp_path: Path) -> None:
    file = write(tmp_path, "kill.toml", DENY.format("kill"))
    done = platform.madang("run", "--policy", file, *TRY)
    assert done.returncode == 159
    done = platform.madang("run", "--policy", file, *(w for w in TRY if w != "-q"))
    assert "the sandbox policy kills for socketpair (session line 3)" in done.stderr


def test_what_is_wrong_in_a_file_is_told_with_its_line(platform: Platform, tmp_path: Path) -> None:
    bad = write(tmp_path, "bad.toml", "version = 1\n\n[[deny]]\ncalls = ['socketpare']\n")
    for arguments in (("policy", "check", bad), ("policy", "apply", bad), ("run", "--policy", bad)):
        done = platform.madang(*arguments, *(["--no-sync", "true"] if "run" in arguments else []))
        assert done.returncode != 0
        assert "line 4: 'socketpare' is no system call; did you mean socketpair?" in done.stderr
    missing = platform.madang("policy", "check", str(tmp_path / "none"))
    assert "can't be read (No such file or directory)" in missing.stderr


def test_the_base_can_be_read_and_asked(platform: Platform, tmp_path: Path) -> None:
    base = said(platform.madang("policy", "show", "base"))
    own = write(tmp_path, "base.toml", base)
    assert "is a valid policy" in said(platform.madang("policy", "check", own, "--session"))
    verdict = said(platform.madang("policy", "test", "-", "unshare", "0x10000000"))
    line = int(verdict.split("base line ")[1].split()[0])
    assert base.splitlines()[line - 1] == "[[check]]"
    assert "passes: no rule" in said(platform.madang("policy", "test", "-", "unshare", "0"))
