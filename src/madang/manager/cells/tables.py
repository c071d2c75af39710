"""Interpreters and their cells; both go with their session."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata

interpreters: Final = sa.Table(
    "interpreters",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False
    ),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("language", sa.Text, nullable=False),
    sa.Column("driver", sa.Text, nullable=False),
    sa.Column("cwd", sa.Text, nullable=False),
    sa.Column("env", sa.Text, nullable=False),
    sa.Column("nonce", sa.Text, nullable=False),
    sa.Column("exec_id", sa.Text, nullable=False),
    sa.Column("base", sa.BigInteger, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("ended", sa.Text, nullable=False),
)
sa.Index("ix_interpreters_session_id", interpreters.c.session_id)

cells: Final = sa.Table(
    "cells",
    metadata,
    sa.Column(
        "interpreter_id",
        sa.Text,
        sa.ForeignKey("interpreters.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("silent", sa.Integer, nullable=False),
    sa.Column("store", sa.Integer, nullable=False),
    sa.Column("stdin", sa.Integer, nullable=False),
    sa.Column("stop_on_error", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("took_us", sa.BigInteger),
    sa.Column("cpu_us", sa.BigInteger),
    sa.Column("mem_bytes", sa.BigInteger),
    sa.Column("error", sa.Text, nullable=False),
)
sa.Index("ix_cells_interpreter_id_seq", cells.c.interpreter_id, cells.c.seq)
