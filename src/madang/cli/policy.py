"""``madang policy …``"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.options import read_policy
from madang.cli.policylive import edit, learn, print_effect, refusals, replay
from madang.cli.printable import printable
from madang.wire.errors import InvalidRequest
from madang.wire.policies import Policy, PolicyDraft, PolicyQuestion, PolicyReview, PolicyVerdict

_MOST_NAMED = 12

F = TypeVar("F", bound=Callable[..., Any])


def _where(command: F) -> F:
    """Options that name a layer; see ``_target``."""
    for name, what in (("project", "project"), ("node", "machine"), ("group", "scaling group")):
        help_text = f"Of one {what}." + " Default: of all (site)." * (name == "group")
        command = click.option(f"--{name}", metavar="NAME", help=help_text)(command)
    return command


_session = click.option(
    "--session", is_flag=True, help="As the layer of a session, for `run --policy`."
)


@click.group()
def policy() -> None:
    """Show, try and apply sandbox policies: what sessions may do.

    Layers count one after the other and only get stricter: base (ours), site (all machines), group,
    node (one machine), project, image, session (`madang run --policy FILE`).
    """


for _command in (edit, learn, refusals):
    policy.add_command(_command)


@policy.command()
@click.argument("target", required=False)
@click.option("--history", is_flag=True, help="Its versions: who, when, why.")
@click.option("--counts", is_flag=True, help="What each of its rules has refused.")
@json_option
def show(target: str | None, history: bool, counts: bool, as_json: bool) -> None:
    """Show what is in force; of a TARGET its text.

    TARGET is base, site, group:NAME, node:NAME, project:NAME or session:NAME.
    """
    with connect() as client:
        if history:
            _list(client.get_policy_history(target or "site"), as_json=as_json)
        elif target is None and not counts:
            _list(client.list_policies(), as_json=as_json)
        else:
            found = client.get_policy(target or "site")
            (_show_counts if counts else _show_text)(found, as_json=as_json)


def _list(found: list[Policy], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (each.target, str(each.version), each.digest[:12], each.author or "-", _when(each),
         str(sum(each.refused.values())), each.note or "-")
        for each in found
    ]  # fmt: skip
    print_table(("POLICY", "VERSION", "DIGEST", "BY", "AT", "REFUSED", "NOTE"), rows)


def _when(found: Policy) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(found.at)) if found.at else "-"


def _show_text(found: Policy, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        for line in found.text.splitlines():
            print(printable(line.expandtabs()))


def _show_counts(found: Policy, *, as_json: bool) -> None:
    if as_json:
        print_json(found.refused)
        return
    lines = found.text.splitlines()
    rows = [
        (line, str(count), lines[int(line) - 1].strip() if int(line) <= len(lines) else "")
        for line, count in sorted(found.refused.items(), key=lambda item: int(item[0]))
    ]
    print_table(("LINE", "REFUSED", "RULE"), rows)


@policy.command()
@click.argument("target", required=False)
@click.option("--diff", is_flag=True, help="With what each change changed.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def log(target: str | None, diff: bool, limit: int, as_json: bool) -> None:
    """List changes of all policies, or of one, newest first: who, when, why."""
    with connect() as client:
        if target is not None and target.startswith("session:"):
            target = f"session:{client.get_session(target.removeprefix('session:')).id}"
        found = client.get_policy_log(target, limit=limit)
    if as_json:
        print_json(found)
        return
    if not diff:
        rows = [
            (_when(each.policy), each.policy.author, each.policy.target, str(each.policy.version),
             each.policy.note or "-")
            for each in found
        ]  # fmt: skip
        print_table(("AT", "BY", "POLICY", "VERSION", "NOTE"), rows)
        return
    for each in found:
        head = f"{_when(each.policy)} {each.policy.author} {each.policy.note}".rstrip()
        name = f"{each.policy.target} version {each.policy.version}"
        print(printable(head))
        _print_diff(each.former, each.policy.text, "before", name)


def _print_diff(old: str, new: str, old_name: str, new_name: str) -> None:
    names = (old_name, printable(new_name))
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""):
        print(printable(line.expandtabs()))


@policy.command()
@click.argument("file")
@_where
@_session
@json_option
def check(file: str, session: bool, as_json: bool, **where: str | None) -> None:
    """Check a file, and say what it would change."""
    with connect() as client:
        review = client.review_policy(_draft(file, where, session=session))
    if as_json:
        print_json(review)
        return
    print(f"{printable(file)} is a valid policy: {review.rules} rules")
    _print_changes(review)


def _print_changes(review: PolicyReview) -> None:
    changes = (("stricter", review.stricter), ("wider", review.wider), ("other", review.other))
    for word, calls in changes:
        if calls:
            more = ", …" * (len(calls) > _MOST_NAMED)
            print(f"{word:<8} {', '.join(calls[:_MOST_NAMED])}{more} ({len(calls)})")


@policy.command()
@click.argument("file")
@_where
@json_option
def diff(file: str, as_json: bool, **where: str | None) -> None:
    """Compare a file with the policy in force."""
    draft = _draft(file, where)
    with connect() as client:
        review = client.review_policy(draft)
    if as_json:
        print_json(review)
        return
    _print_diff(review.current, draft.text, f"{review.target} version {review.version}", file)
    _print_changes(review)


@policy.command()
@click.argument("file")
@_where
@click.option("--in", "inside", metavar="SESSION", help="Of one session that is there already.")
@click.option("--note", default="", help="Why; kept with it.")
@click.option("--version", type=int, metavar="N", help="Only if N is still in force.")
@json_option
def apply(
    file: str,
    inside: str | None,
    note: str,
    version: int | None,
    as_json: bool,
    **where: str | None,
) -> None:
    """Put a file in force: in running sessions what can be changed there, in new ones all of it.

    \b
    madang policy diff lab.toml
    madang policy apply lab.toml --note "no debuggers"
    """
    draft = _draft(file, where | {"session": inside}, note=note)
    with connect() as client:
        done = client.apply_policy(draft, version=version)
    if as_json:
        print_json(done)
    else:
        print(f"{printable(done.target)} is at version {done.version}")
        print_effect(done.effect)


@policy.command()
@click.argument("file")
@click.argument("call", required=False)
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]...")
@_where
@_session
@click.option(
    "--of", "sessions", multiple=True, metavar="NAME", help="Replay what this session did."
)
@json_option
def test(
    file: str,
    call: str | None,
    arguments: tuple[str, ...],
    session: bool,
    sessions: tuple[str, ...],
    as_json: bool,
    **where: str | None,
) -> None:
    """Say what would happen to a system call under a file, and by which rule.

    Without a call: what would become of everything that was refused, or written down by a rule
    with "log", in the sessions named, or in your newest ones. Arguments are numbers, as 16 or
    0x10. The file "-" is none: as things are.

    \b
    madang policy test lab.toml socket 17 3
    madang policy test lab.toml --of my-session
    """
    draft = None if file == "-" else _draft(file, where, session=session)
    seat = {name: value or "" for name, value in where.items()}
    if call is None:
        if draft is None:
            raise click.UsageError("give a FILE to replay against, or a CALL.")
        replay(draft, seat, sessions, as_json=as_json)
        return
    values = tuple(_number(argument) for argument in arguments)
    question = PolicyQuestion(call=call, arguments=values, draft=draft, **seat)
    with connect() as client:
        verdict = client.ask_policy(question)
    if as_json:
        print_json(verdict)
    else:
        print(printable(_tell(call, verdict)))


def _tell(call: str, verdict: PolicyVerdict) -> str:
    if not verdict.answer:
        return f"{call} passes: no rule refuses it"
    place = f"{verdict.layer} line {verdict.line}"
    name = f" ({verdict.name})" if verdict.name else ""
    why = f": {verdict.why}" if verdict.why else ""
    word = "passes with" if verdict.passes else "is refused with"
    return f"{call} {word} {verdict.answer} by {place}{name}{why}"


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError as exc:
        raise InvalidRequest(f"{text[:40]!r} is no number; write 16 or 0x10.") from exc
    return value % 2**64 if -(2**63) <= value < 0 else value


def _draft(
    file: str, where: Mapping[str, str | None], *, session: bool = False, note: str = ""
) -> PolicyDraft:
    """*where*: of ``_where``, at most one."""
    given = [f"{name}:{value}" for name, value in where.items() if value is not None]
    if len(given) + session > 1:
        raise click.UsageError("a file stands in one place: these options don't go together.")
    target = "session" if session else given[0] if given else "site"
    return PolicyDraft(text=read_policy(file), target=target, note=note)
