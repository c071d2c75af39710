"""Policies that change while sessions run, by command line, on a real platform."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.client import Client
from madang.testing.patience import wait_until
from madang.testing.platform import Platform
from madang.wire.log import LogRecord
from madang.wire.policies import PolicyDraft
from madang.wire.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.root]
NOTHING = "version = 1\n"
DENY = "version = 1\n\n[[files]]\ndeny = ['/work/secret/**']\nwhy = 'a test'\n"
WATCH = (
    "import os, time\n"
    "os.makedirs('/work/secret'); open('/work/secret/a', 'w').close()\n"
    "print('ready', flush=True)\n"
    "was = True\n"
    "while True:\n"
    "    try:\n"
    "        open('/work/secret/a').close(); now = True\n"
    "    except PermissionError:\n"
    "        now = False\n"
    "    if now != was:\n"
    "        print('open' if now else 'shut', flush=True); was = now\n"
    "    time.sleep(0.002)\n"
)
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")


@pytest.fixture(autouse=True)
def _no_policy(client: Client) -> Iterator[None]:
    """Whatever the test puts in force ends with it."""
    yield
    for found in client.list_policies():
        if found.target != "base":
            client.apply_policy(PolicyDraft(text=NOTHING, target=found.target))


@pytest.fixture
def watcher(client: Client) -> Iterator[Session]:
    """A session that tells whenever it can open a file, or can't any more."""
    run = client.run([*PYTHON, WATCH], name="watcher")
    run.close()
    session = until_says(client, "ready")
    yield session
    client.remove(session.id, force=True)


def said(client: Client) -> list[str]:
    data = b"".join(r.data for r in client.logs("watcher") if isinstance(r, LogRecord))
    return data.decode().split()


def until_says(client: Client, word: str) -> Session:
    wait_until(lambda: said(client), lambda words: word in words)
    return client.get_session("watcher")


def put(client: Client, text: str) -> None:
    """In force in the one session, also where the machine is too busy to say so at once."""
    effect = wait_until(
        lambda: client.apply_policy(PolicyDraft(text=text)).effect,
        lambda seen: seen is not None and not seen.waiting,
    )
    assert effect is not None
    assert (effect.running, effect.failed) == (1, {})


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def out(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_a_change_is_in_force_in_a_running_session_when_it_is_answered(
    platform: Platform, client: Client, watcher: Session, tmp_path: Path
) -> None:
    site = write(tmp_path, "site.toml", DENY)
    answer = out(platform.madang("policy", "apply", site, "--note", "now"))
    assert "of 1 running session " in answer  # a busy machine says so later
    until_says(client, "shut")

    out(platform.madang("policy", "apply", write(tmp_path, "none.toml", NOTHING)))
    until_says(client, "open")

    log = json.loads(out(platform.madang("policy", "log", "site", "--json")))
    assert [each["policy"]["note"] for each in log[:2]] == ["", "now"]
    assert log[0]["former"] == DENY
    wait_until(lambda: client.get_session("watcher").refusals)
    shown = out(platform.madang("show", "watcher"))
    assert "open of /work/secret/a refused by site policy, line 3 (a test)" in shown
    assert "/work/secret/a" in out(platform.madang("policy", "refusals", "watcher"))
    explained = out(platform.madang("explain", "watcher"))
    assert "refused by site policy, line 3" in explained


def test_it_outlives_the_launcher_and_the_server(
    platform: Platform, client: Client, watcher: Session, tmp_path: Path
) -> None:
    out(platform.madang("policy", "apply", write(tmp_path, "site.toml", DENY)))
    until_says(client, "shut")
    for name in ("launcher", "server"):
        platform.kill(name)
        assert client.get_session(watcher.id).status == "RUNNING"
    text = DENY + "\n[[files]]\ndeny = ['/work/other']\n"
    put(client, text)
    assert "open" not in said(client)[2:]


def test_who_stands_still_wakes_with_the_new_rules(client: Client, watcher: Session) -> None:
    client.freeze(watcher.id)
    before = len(said(client))
    put(client, DENY)
    client.thaw(watcher.id)
    until_says(client, "shut")
    assert said(client)[before:] == ["shut"], "it never met the former ones again"


def test_what_is_refused_is_told_where_it_happens(platform: Platform, tmp_path: Path) -> None:
    own = write(tmp_path, "own.toml", DENY.replace("/work/secret/**", "/etc/hostname"))
    program = "import time\ntry:\n open('/etc/hostname')\nexcept OSError as e:\n print(e.errno)\n"
    done = platform.madang(
        "run", "--policy", own, "--no-sync", "--no-output", "--", *PYTHON, program
    )
    assert done.stdout == "1\n"
    line = "madang: open of /etc/hostname refused by session policy, line 3 (a test)"
    assert done.stderr.count(line) == 1


def test_what_a_session_used_becomes_its_policy(
    platform: Platform, client: Client, tmp_path: Path
) -> None:
    program = "import json, socket\nprint(json.dumps({'fine': open('/etc/hostname').read() != ''}))"
    run = ("--no-sync", "--no-output", "-q", "--name")
    command = ("--", *PYTHON, program)
    learned = str(tmp_path / "learned.toml")
    out(platform.madang("run", "--learn", *run, "learner", *command))
    out(platform.madang("policy", "learn", "learner", "--output", learned))

    text = Path(learned).read_text()
    assert '"/etc/hostname",' in text
    assert "[[connect]]\nonly = []" in text
    assert "is a valid policy" in out(platform.madang("policy", "check", learned, "--session"))
    assert out(platform.madang("run", "--policy", learned, *run, "again", *command)) != ""
    other = "print(open('/etc/passwd').read())"
    done = platform.madang("run", "--policy", learned, *run, "other", "--", *PYTHON, other)
    assert "PermissionError" in done.stderr

    replayed = out(platform.madang("policy", "test", learned, "--of", "learner", "--session"))
    assert " 0 would change" in replayed
    strict = write(tmp_path, "strict.toml", DENY.replace("/work/secret/**", "/etc/hostname"))
    replayed = out(platform.madang("policy", "test", strict, "--of", "learner"))
    assert "would be refused   open /etc/hostname by site line 3 (a test)" in replayed
    done = platform.madang("policy", "learn", "again")
    assert "did not run with `madang run --learn`" in done.stderr
    for name in ("learner", "again", "other"):
        client.remove(name)


def test_a_policy_is_edited_checked_and_put_in_force(
    platform: Platform, client: Client, watcher: Session, tmp_path: Path
) -> None:
    def edit(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        editor = write(tmp_path, "editor", f"#!/bin/sh\n{script}\n")
        os.chmod(editor, 0o755)
        environment = {**platform.environment, "EDITOR": editor}
        return platform.madang("policy", "edit", *arguments, env=environment)

    done = edit(f"cp {write(tmp_path, 'new.toml', DENY)} $1", "--yes", "--note", "edited")
    assert "+[[files]]" in out(done)
    assert "of 1 running session " in done.stdout
    until_says(client, "shut")

    assert "nothing was changed" in out(edit("true"))
    done = edit("echo nonsense >> $1", "--yes")
    assert done.returncode == 1
    assert "policy, line 6" in done.stderr
    kept = Path(done.stderr.split("your text is kept in ")[1].split()[0])
    assert kept.read_text() == DENY + "nonsense\n"
    kept.unlink()
    done = edit("exit 3")
    assert "ended with 3: nothing was changed" in done.stderr
    Path(done.stderr.split("your text is kept in ")[1].split()[0]).unlink()
    more = write(tmp_path, "more.toml", "version = 1\n[[files]]\ndeny = ['/work/x']\n")
    assert "is at version" in out(edit(f"cp {more} $1", "session:watcher", "--yes"))
    assert client.get_policy("session:watcher").text == Path(more).read_text()
