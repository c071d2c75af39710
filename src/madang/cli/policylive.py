"""``madang policy edit|learn|refusals``, replay, and what a change did to sessions that run."""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click

from madang.cli.context import connect, json_option, print_json
from madang.cli.options import read_policy
from madang.cli.printable import print_error_text, printable
from madang.cli.refusals import describe
from madang.cli.terminal import count
from madang.wire.errors import InvalidRequest, PolicyInvalid, PreconditionFailed
from madang.wire.policies import PolicyDraft, PolicyEffect, ReplayQuestion, ReplayVerdict
from madang.wire.policy import Answer

if TYPE_CHECKING:
    from madang.client.sync import Client
    from madang.wire.policies import Policy
    from madang.wire.policy import Refusal

_EDITORS: Final = ("VISUAL", "EDITOR")
_FIRST: Final = "version = 1\n"
_MOST_SESSIONS: Final = 50
_MOST_REPLAYED: Final = 5000
_MOST_SHOWN: Final = 40


def print_effect(effect: PolicyEffect | None) -> None:
    """What a change has done to sessions that run."""
    if effect is None or not effect.running:
        return
    print(f"of {count(effect.running, 'running session')} {effect.changed} changed at once")
    if effect.waiting:
        print(f"waiting  {_some(effect.waiting)}: their machine has not said so yet")
    for name, why in effect.failed.items():
        print(f"failed   {printable(name)}: {printable(why)}")
    if effect.later:
        print(f"later    {_some(effect.later)}: for sessions that start from now on")


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


# --- editing


@click.command()
@click.argument("target", default="site")
@click.option("--note", default="", help="Why; kept with it.")
@click.option("-y", "--yes", is_flag=True, help="Put it in force without asking.")
def edit(target: str, note: str, yes: bool) -> int:
    """Edit a policy in $VISUAL or $EDITOR, look at the difference, and put it in force.

    TARGET is site (the default), group:NAME, node:NAME, project:NAME or session:NAME. Running
    sessions have what can be changed in them when the command returns.
    """
    with connect() as client:
        policy = client.get_policy(target)
        with tempfile.NamedTemporaryFile("w", prefix="madang-", suffix=".toml", delete=False) as to:
            to.write(policy.text or _FIRST)
        try:
            code = _edit(client, policy, to.name, note, yes=yes)
        except BaseException:
            print_error_text(f"your text is kept in {to.name}")
            raise
    if code == 0:
        os.unlink(to.name)
    else:
        print_error_text(f"your text is kept in {to.name}")
    return code


def _edit(client: Client, policy: Policy, path: str, note: str, *, yes: bool) -> int:
    target = policy.target
    while True:
        open_editor(path)
        text = read_policy(path)
        if text == (policy.text or _FIRST):
            print("nothing was changed")
            return 0
        kind = "session" if target.startswith("session:") else target
        try:
            client.review_policy(PolicyDraft(text=text, target=kind))
        except PolicyInvalid as exc:
            print_error_text(exc.text)
            if yes or not click.confirm("Edit it again?", default=True, err=True):
                return 1
            continue
        name = f"{target} version {policy.version}"
        old, new = policy.text.splitlines(), text.splitlines()
        for line in difflib.unified_diff(old, new, name, "edited", lineterm=""):
            print(printable(line.expandtabs()))
        if not yes and not click.confirm("Put it in force?", default=False, err=True):
            return 1
        draft = PolicyDraft(text=text, target=target, note=note)
        try:
            done = client.apply_policy(draft, version=policy.version)
        except PreconditionFailed as exc:
            print_error_text(f"somebody changed it meanwhile: {exc.text}")
            return 1
        print(f"{printable(done.target)} is at version {done.version}")
        print_effect(done.effect)
        return 0


def open_editor(path: str) -> None:
    """Returns once it has ended. Raises InvalidRequest."""
    named = next((os.environ[name] for name in _EDITORS if os.environ.get(name)), "")
    if not named:
        raise InvalidRequest(f"no editor: set ${_EDITORS[0]} or ${_EDITORS[1]}.")
    argv = [*shlex.split(named), path]
    try:
        code = subprocess.run(argv, check=False).returncode
    except OSError as exc:
        raise InvalidRequest(f"the editor {argv[0]!r} can't be run ({exc.strerror}).") from exc
    if code:
        raise InvalidRequest(f"the editor {argv[0]!r} ended with {code}: nothing was changed.")


# --- what sessions did


@click.command()
@click.argument("name")
@json_option
def refusals(name: str, as_json: bool) -> None:
    """List what a session's policy has refused while it ran, with the rule; oldest first."""
    with connect() as client:
        found = client.list_refusals(name)
    if as_json:
        print_json(found)
        return
    for refusal in found:
        print(describe(refusal))


@click.command()
@click.argument("name")
@click.option("--output", metavar="FILE", help="Write it there instead of printing it.")
def learn(name: str, output: str | None) -> None:
    """Propose the narrowest policy under which a session that ran with --learn would have run.

    \b
    madang run --learn --name trial -- python3 train.py
    madang policy learn trial --output train.toml
    madang run --policy train.toml -- python3 train.py
    """
    from madang.kit.learning import LEARN, propose

    with connect() as client:
        session = client.get_session(name)
        own = client.get_policy(f"session:{session.id}")
        if f'name = "{LEARN}"' not in own.text:
            text = (
                f"{session.name} did not run with `madang run --learn`: nothing was written down."
            )
            raise InvalidRequest(text)
        text = propose(client.list_refusals(session.id), session.name)
    if output is None:
        sys.stdout.write(text)
        return
    with open(output, "x", encoding="utf-8") as file:
        file.write(text)
    print(f"{printable(output)}: try it with `madang run --policy {printable(output)}`")


def replay(
    draft: PolicyDraft, seat: Mapping[str, str], names: Sequence[str], *, as_json: bool
) -> None:
    """Say what *draft* would change of what sessions did. *seat*: node, group, project."""
    with connect() as client:
        recorded = _recorded(client, names)
        question = ReplayQuestion(draft=draft, refusals=tuple(recorded), **seat)
        verdicts = client.replay_policy(question)
    if as_json:
        print_json(verdicts)
        return
    shown = [line for line in map(_change, verdicts) if line]
    for line in shown[:_MOST_SHOWN]:
        print(line)
    if len(shown) > _MOST_SHOWN:
        print(f"… {len(shown) - _MOST_SHOWN:,} more")
    same = sum(each.judged for each in verdicts) - len(shown)
    unjudged = sum(not each.judged for each in verdicts)
    other = f", {unjudged:,} can't be replayed (numbers of calls)" if unjudged else ""
    print(f"{count(len(verdicts), 'record')}: {len(shown):,} would change, {same:,} stay{other}")


def _recorded(client: Client, names: Sequence[str]) -> list[Refusal]:
    if names:
        refs = list(names)
    else:
        sessions = client.list_sessions(ended=True)
        refs = [each.id for each in sessions if each.refusals][:_MOST_SESSIONS]
    found: list[Refusal] = []
    for ref in refs:
        found += client.list_refusals(ref)
    return found[:_MOST_REPLAYED]


def _change(verdict: ReplayVerdict) -> str:
    """Empty, if all stays as it was."""
    recorded = verdict.refusal
    passed = recorded.answer == Answer.LOG
    if not verdict.judged or verdict.passes == passed:
        return ""
    what = printable(f"{recorded.what} {recorded.object}")
    if verdict.passes:
        return f"would pass         {what} (was refused by {recorded.layer} line {recorded.line})"
    why = f" ({verdict.why})" if verdict.why else ""
    return f"would be refused   {what} by {verdict.place}{printable(why)}"
