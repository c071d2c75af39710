"""Two organisations with people in every role, and things that one of them has.

Everything that belongs to ``zoe`` has ``zebra`` in its name: whoever may not know of it must never
read that word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from madang.kit.codec import to_json
from madang.manager.db import micros
from madang.manager.identity.store import logins, people, tokens
from madang.manager.identity.types import ProjectRole, Role
from madang.testing.manager import ManagerBox

MARK: Final = "zebra"
OWNER: Final = "zebra-zoe"
PROJECT: Final = "zebra-lab"
PEOPLE: Final[Mapping[str, tuple[str, str, Role, ProjectRole]]] = {
    OWNER: ("home", PROJECT, Role.USER, ProjectRole.MEMBER),
    "fellow": ("home", PROJECT, Role.USER, ProjectRole.MEMBER),
    "project_admin": ("home", PROJECT, Role.USER, ProjectRole.ADMIN),
    "neighbour": ("home", "next-door", Role.USER, ProjectRole.ADMIN),
    "domain_admin": ("home", "next-door", Role.DOMAIN_ADMIN, ProjectRole.MEMBER),
    "foreigner": ("abroad", "far", Role.USER, ProjectRole.ADMIN),
    "foreign_admin": ("abroad", "far", Role.DOMAIN_ADMIN, ProjectRole.ADMIN),
    "monitor": ("abroad", "far", Role.MONITOR, ProjectRole.MEMBER),
    "root": ("abroad", "far", Role.ADMIN, ProjectRole.MEMBER),
}
"""Name → domain, project, role, role in the project."""


@dataclass(frozen=True, slots=True)
class World:
    box: ManagerBox
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each of ``PEOPLE``; and of ``anonymous``, ``expired``, ``revoked``, ``read_only``."""

    async def ask(
        self, who: str, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of the answer."""
        sent = {**self.headers[who], **headers}
        async with aiohttp.ClientSession(self.box.url) as http:
            async with http.request(method, path, json=body, headers=sent) as response:
                return response.status, await response.text()


async def make_world(box: ManagerBox) -> World:
    world = World(box)
    at = micros(box.manager.people._clock.now())
    async with box.manager.database.begin() as tx:
        for domain in ("home", "abroad"):
            await people.add_domain(tx, domain_id=f"d-{domain}", name=domain, at=at)
        places = {(domain, project) for domain, project, _, _ in PEOPLE.values()}
        for domain, project in sorted(places):
            await people.add_project(
                tx, project_id=f"p-{project}", domain_id=f"d-{domain}", name=project, at=at
            )
        for name, (domain, project, role, project_role) in PEOPLE.items():
            await people.add_user(
                tx,
                user_id=f"u-{name}",
                name=name,
                role=role,
                project_id=f"p-{project}",
                domain_id=f"d-{domain}",
                created_at=at,
            )
            await people.join(
                tx, user_id=f"u-{name}", project_id=f"p-{project}", role=project_role, at=at
            )
            world.headers[name] = await add_token(tx, f"u-{name}", name, at)
        world.headers["expired"] = await add_token(
            tx, f"u-{OWNER}", "expired", at, expires_at=at - 1
        )
        world.headers["read_only"] = await add_token(
            tx, f"u-{OWNER}", "read_only", at, scopes=("read",)
        )
        world.headers["revoked"] = await add_token(tx, f"u-{OWNER}", "revoked", at)
        await tokens.revoke(tx, "t-revoked", at)
        await logins.add_invitation(
            tx,
            id=f"{MARK}-invitation",
            digest="0" * 64,
            project_id=f"p-{PROJECT}",
            role="user",
            user_id=None,
            made_by="u-domain_admin",
            created_at=at,
            expires_at=at + micros(3600),
        )
    world.headers["anonymous"] = {}
    return world


async def add_token(
    tx: Any,
    user_id: str,
    name: str,
    at: int,
    *,
    scopes: tuple[str, ...] = ("*",),
    expires_at: int | None = None,
) -> dict[str, str]:
    """Its headers."""
    token = f"mdg_of-{name}"
    await tokens.add_token(
        tx,
        token_id=f"t-{name}",
        user_id=user_id,
        name=name,
        digest=hashlib.sha256(token.encode()).hexdigest(),
        created_at=at,
        scopes=to_json(list(scopes)).decode(),
        expires_at=expires_at,
    )
    return {"Authorization": f"Bearer {token}"}
