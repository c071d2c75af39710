"""The one place of filtering by permission: which rows a caller may know of."""

from __future__ import annotations

from typing import Any, Protocol

import sqlalchemy as sa

from madang.manager.identity.tables import memberships, projects, users
from madang.manager.identity.types import ProjectRole, Role


class Viewer(Protocol):
    """Who asks."""

    @property
    def user_id(self) -> str: ...
    @property
    def sees_all(self) -> bool: ...


def _caller() -> sa.BindParameter[str]:
    return sa.bindparam("b_viewer", type_=sa.Text)


def visible(
    owner_id: sa.ColumnElement[str], project_id: sa.ColumnElement[str]
) -> sa.ColumnElement[bool]:
    """Which rows a viewer may know of; the statement takes the values of ``viewer``.

    Their own; those of a project that they administer; those of all projects of a domain that they
    administer; everything, for administrators and monitors. Every statement that reads something of
    somebody's for a caller has this in its WHERE: what is not visible is not there.
    """
    administered = sa.select(memberships.c.project_id).where(
        memberships.c.user_id == _caller(), memberships.c.role == str(ProjectRole.ADMIN)
    )
    of_domain = (
        sa.select(projects.c.id)
        .join_from(projects, users, projects.c.domain_id == users.c.domain_id)
        .where(users.c.id == _caller(), users.c.role == str(Role.DOMAIN_ADMIN))
    )
    return sa.or_(
        sa.bindparam("b_sees_all", type_=sa.Integer) == 1,
        owner_id == _caller(),
        project_id.in_(administered),
        project_id.in_(of_domain),
    )


def fellows(
    owner_id: sa.ColumnElement[str], project_id: sa.ColumnElement[str]
) -> sa.ColumnElement[bool]:
    """As ``visible``, and what belongs to any project that the viewer is a member of."""
    joined = sa.select(memberships.c.project_id).where(memberships.c.user_id == _caller())
    return sa.or_(visible(owner_id, project_id), project_id.in_(joined))


def viewer(caller: Viewer) -> dict[str, Any]:
    """The values of ``visible``."""
    return {"b_viewer": caller.user_id, "b_sees_all": int(caller.sees_all)}
