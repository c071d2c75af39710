"""``madang user``, ``project``, ``domain`` and ``token``."""

from __future__ import annotations

import time

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.client import people
from madang.wire.people import (
    SCOPES,
    InvitationDraft,
    NewInvitation,
    ProjectDraft,
    TokenDraft,
    User,
    UserChange,
    UserDraft,
)
from madang.wire.size import parse_duration

_ROLES = click.Choice(["user", "domain_admin", "monitor", "admin"])
_expires = click.option("--expires", metavar="TIME", default="7d", show_default=True, help="Valid.")


def when(at: float | None, never: str = "-") -> str:
    return never if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _state(disabled_at: float | None) -> str:
    return "enabled" if disabled_at is None else f"disabled {when(disabled_at)}"


# Users


@click.group()
def user() -> None:
    """List, invite, change and disable users."""


@user.command("ls")
@json_option
def list_users(as_json: bool) -> None:
    """List the users that you may see."""
    with connect() as client:
        found: list[User] = list(people.every(client, people.users))
    if as_json:
        print_json(found)
        return
    rows = [
        (each.name, each.domain, each.role, each.project, _factors(each), _state(each.disabled_at))
        for each in found
    ]
    print_table(("USER", "DOMAIN", "ROLE", "PROJECT", "LOGIN", "STATE"), rows)


def _factors(found: User) -> str:
    if not found.has_password:
        return "tokens only"
    return "password and code" if found.has_totp else "password"


@user.command("show")
@click.argument("name")
@json_option
def show_user(name: str, as_json: bool) -> None:
    """Show one user."""
    with connect() as client:
        _show_user(client.call(people.user(name)), as_json=as_json)


def _show_user(found: User, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print(f"user     {found.name}\ndomain   {found.domain}\nrole     {found.role}")
    print(f"project  {found.project}\nlogin    {_factors(found)}")
    print(f"since    {when(found.created_at)}\nstate    {_state(found.disabled_at)}")


@user.command("add")
@click.argument("name")
@click.option("--role", type=_ROLES, default="user", show_default=True, help="What they may do.")
@click.option("--project", metavar="NAME", default="", help="Their project. Default: yours.")
@_expires
@json_option
def add_user(name: str, role: str, project: str, expires: str, as_json: bool) -> None:
    """Add a user, and print the code by which they set their password."""
    draft = UserDraft(name=name, role=role, project=project, expires_s=parse_duration(expires))
    with connect() as client:
        _show_invitation(client.call(people.add_user(draft)), client.url, as_json=as_json)


@user.command("invite")
@click.option("--role", type=_ROLES, default="user", show_default=True, help="What they may do.")
@click.option("--project", metavar="NAME", default="", help="Their project. Default: yours.")
@_expires
@json_option
def invite(role: str, project: str, expires: str, as_json: bool) -> None:
    """Print a code by which somebody chooses a name and a password, once."""
    draft = InvitationDraft(role=role, project=project, expires_s=parse_duration(expires))
    with connect() as client:
        _show_invitation(client.call(people.invite(draft)), client.url, as_json=as_json)


@user.command("reset")
@click.argument("name")
@_expires
@json_option
def reset(name: str, expires: str, as_json: bool) -> None:
    """Print a code by which a user sets a new password, once."""
    draft = InvitationDraft(user=name, expires_s=parse_duration(expires))
    with connect() as client:
        _show_invitation(client.call(people.invite(draft)), client.url, as_json=as_json)


def _show_invitation(made: NewInvitation, url: str, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    invitation = made.invitation
    whom = invitation.user or f"somebody new ({invitation.role}, project {invitation.project})"
    print(f"for {whom}, valid until {when(invitation.expires_at)}, once; not shown again:")
    print(f"  madang login {url} --invitation {made.code}")


@user.command("invitations")
@json_option
def invitations(as_json: bool) -> None:
    """List invitations that can still be used."""
    with connect() as client:
        found = list(people.every(client, people.invitations))
    if as_json:
        print_json(found)
        return
    rows = [
        (i.id, i.user or "-", i.role, f"{i.domain}/{i.project}", i.made_by, when(i.expires_at))
        for i in found
    ]
    print_table(("ID", "USER", "ROLE", "PROJECT", "BY", "EXPIRES"), rows)


@user.command("withdraw")
@click.argument("invitation")
def withdraw(invitation: str) -> None:
    """Take an invitation back, by its id."""
    with connect() as client:
        client.call(people.withdraw(invitation))


@user.command("set")
@click.argument("name")
@click.option("--role", type=_ROLES, help="What they may do.")
@click.option("--project", metavar="NAME", help="Their default project, one that they are in.")
@click.option("--no-totp", is_flag=True, help="Take a lost second factor away.")
@json_option
def set_user(
    name: str, role: str | None, project: str | None, no_totp: bool, as_json: bool
) -> None:
    """Change a user."""
    change = UserChange(role=role, project=project, totp=False if no_totp else None)
    with connect() as client:
        version = client.call(people.user(name)).version
        changed = client.call(people.change_user(name, change, version=version))
    _show_user(changed, as_json=as_json)


@user.command("disable")
@click.argument("name")
def disable_user(name: str) -> None:
    """Refuse all their requests, at once. Their sessions go on: `madang stop`."""
    with connect() as client:
        client.call(people.change_user(name, UserChange(disabled=True)))


@user.command("enable")
@click.argument("name")
def enable_user(name: str) -> None:
    """Let a disabled user in again, with the tokens that they had."""
    with connect() as client:
        client.call(people.change_user(name, UserChange(disabled=False)))


# Projects


@click.group()
def project() -> None:
    """List and make projects, and let people into them."""


@project.command("ls")
@json_option
def list_projects(as_json: bool) -> None:
    """List the projects that you may see."""
    with connect() as client:
        found = list(people.every(client, people.projects))
    if as_json:
        print_json(found)
        return
    rows = [(p.name, p.domain, when(p.created_at), _state(p.disabled_at)) for p in found]
    print_table(("PROJECT", "DOMAIN", "MADE", "STATE"), rows)


@project.command("show")
@click.argument("name")
@json_option
def show_project(name: str, as_json: bool) -> None:
    """Show one project: NAME in your domain, or DOMAIN/NAME."""
    with connect() as client:
        found = client.call(people.project(name))
    if as_json:
        print_json(found)
    else:
        print(f"project  {found.name}\ndomain   {found.domain}")
        print(f"since    {when(found.created_at)}\nstate    {_state(found.disabled_at)}")


@project.command("add")
@click.argument("name")
@click.option("--domain", metavar="NAME", default="", help="Its domain. Default: yours.")
def add_project(name: str, domain: str) -> None:
    """Make a project."""
    with connect() as client:
        made = client.call(people.add_project(ProjectDraft(name=name, domain=domain)))
    print(f"project {made.domain}/{made.name}")


@project.command("disable")
@click.argument("name")
def disable_project(name: str) -> None:
    """Start nothing new in it. What runs goes on."""
    with connect() as client:
        client.call(people.switch_project(name, disabled=True))


@project.command("enable")
@click.argument("name")
def enable_project(name: str) -> None:
    """Let new sessions start in it again."""
    with connect() as client:
        client.call(people.switch_project(name, disabled=False))


@project.command("members")
@click.argument("name")
@json_option
def members(name: str, as_json: bool) -> None:
    """List who is in a project."""
    with connect() as client:
        found = list(people.every(client, lambda cursor: people.members(name, cursor)))
    if as_json:
        print_json(found)
    else:
        print_table(("USER", "ROLE", "SINCE"), [(m.user, m.role, when(m.since)) for m in found])


@project.command("join")
@click.argument("name")
@click.argument("user")
@click.option("--admin", is_flag=True, help="They administer it.")
def join(name: str, user: str, admin: bool) -> None:
    """Let a user into a project, or change what they are in it."""
    with connect() as client:
        client.call(people.set_member(name, user, "admin" if admin else "member"))


@project.command("leave")
@click.argument("name")
@click.argument("user", required=False)
def leave(name: str, user: str | None) -> None:
    """Leave a project, or take a user out of it."""
    with connect() as client:
        client.call(people.remove_member(name, user or client.whoami().user))


# Domains


@click.group()
def domain() -> None:
    """List, make and disable domains."""


@domain.command("ls")
@json_option
def list_domains(as_json: bool) -> None:
    """List the domains that you may see."""
    with connect() as client:
        found = list(people.every(client, people.domains))
    if as_json:
        print_json(found)
        return
    rows = [(d.name, when(d.created_at), _state(d.disabled_at)) for d in found]
    print_table(("DOMAIN", "MADE", "STATE"), rows)


@domain.command("add")
@click.argument("name")
def add_domain(name: str) -> None:
    """Make a domain."""
    with connect() as client:
        print(f"domain {client.call(people.add_domain(name)).name}")


@domain.command("disable")
@click.argument("name")
def disable_domain(name: str) -> None:
    """Refuse all requests of everybody in it, at once. What runs goes on."""
    with connect() as client:
        client.call(people.switch_domain(name, disabled=True))


@domain.command("enable")
@click.argument("name")
def enable_domain(name: str) -> None:
    """Let its people in again."""
    with connect() as client:
        client.call(people.switch_domain(name, disabled=False))


# Tokens


@click.group()
def token() -> None:
    """List, make and revoke tokens and key pairs."""


@token.command("ls")
@click.option("--user", metavar="NAME", help="Whose. Default: yours.")
@json_option
def list_tokens(user: str | None, as_json: bool) -> None:
    """List valid tokens, key pairs and logins; never their secrets."""
    with connect() as client:
        found = list(people.every(client, lambda cursor: people.tokens(user, cursor)))
    if as_json:
        print_json(found)
        return
    rows = [
        (t.id, t.kind, printable(t.name), " ".join(t.scopes), when(t.last_used_at),
         when(t.expires_at, "never"), t.source or "-")
        for t in found
    ]  # fmt: skip
    print_table(("ID", "KIND", "NAME", "SCOPES", "USED", "EXPIRES", "FROM"), rows)


@token.command("add")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="Only this; may be repeated.",
)
@click.option("--expires", metavar="TIME", help="Valid for so long, like 30d. Default: for ever.")
@click.option("--key", is_flag=True, help="A key pair that signs requests, instead of a token.")
@json_option
def add_token(
    name: str, scopes: tuple[str, ...], expires: str | None, key: bool, as_json: bool
) -> None:
    """Make a token, or a key pair, and print it, once."""
    draft = TokenDraft(
        name=name,
        kind="key" if key else "token",
        scopes=scopes or ("*",),
        expires_s=None if expires is None else parse_duration(expires),
    )
    with connect() as client:
        made = client.call(people.add_token(draft))
    if as_json:
        print_json(made)
    elif made.access_key:
        print(f"MADANG_ACCESS_KEY={made.access_key}\nMADANG_SECRET_KEY={made.secret}")
    else:
        print(made.secret)


@token.command("revoke")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def revoke(ids: tuple[str, ...]) -> None:
    """Revoke tokens, key pairs or logins by their ids, at once."""
    with connect() as client:
        for each in ids:
            client.call(people.revoke_token(each))
