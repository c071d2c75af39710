"""Domains, projects with their members, and groups of machines.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    domains = op.create_table(
        "domains",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("disabled_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_domains")),
        sa.UniqueConstraint("name", name=op.f("uq_domains_name")),
    )
    op.bulk_insert(domains, [{"id": "default", "name": "default", "created_at": 0}])
    op.create_table(
        "projects",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("domain_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("disabled_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], name=op.f("fk_projects_domain_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("domain_id", "name", name=op.f("uq_projects_domain_id_name")),
    )
    op.create_table(
        "memberships",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_memberships_user_id")),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_memberships_project_id")
        ),
        sa.PrimaryKeyConstraint("user_id", "project_id", name=op.f("pk_memberships")),
    )
    # Projects were names alone, and everybody was in one.
    op.execute(
        "INSERT INTO projects (id, domain_id, name, created_at)"
        " SELECT id, 'default', id, 0 FROM"
        " (SELECT 'default' AS id UNION SELECT project_id FROM users"
        " UNION SELECT project_id FROM sessions UNION SELECT project_id FROM images) AS seen"
    )
    op.execute(
        "INSERT INTO memberships (user_id, project_id, role, created_at)"
        " SELECT id, project_id, 'member', created_at FROM users"
    )
    op.add_column(
        "users", sa.Column("domain_id", sa.Text(), server_default="default", nullable=False)
    )
    groups = op.create_table(
        "groups",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_groups")),
    )
    op.bulk_insert(
        groups, [{"name": "default", "text": "", "version": 1, "created_at": 0, "changed_at": 0}]
    )
    for table in ("nodes", "sessions"):
        op.add_column(
            table, sa.Column("group_name", sa.Text(), server_default="default", nullable=False)
        )
