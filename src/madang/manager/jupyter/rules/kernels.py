"""A kernel from what is known of its session and its interpreter."""

from __future__ import annotations

from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.db import seconds
from madang.manager.jupyter import types
from madang.manager.jupyter.rules.ids import kernel_id
from madang.manager.jupyter.rules.messages import state_of, utc
from madang.manager.jupyter.types import Kernel
from madang.manager.session.types import SessionRow
from madang.wire.cells import Interpreter
from madang.wire.session import SessionSpec, SessionStatus

S = SessionStatus

LIVE: Final = frozenset({S.PENDING, S.SCHEDULED, S.PREPARING, S.RUNNING})
MAX_LABEL: Final = 256
IDLE_S: Final = (60.0, 7 * 86400.0)


def labels_of(row: SessionRow) -> dict[str, str]:
    return from_json(SessionSpec, row.spec).labels


def is_kernel(row: SessionRow) -> bool:
    """Whether it was started as one and has not ended."""
    return row.status in LIVE and types.KERNEL in labels_of(row)


def kernel_of(
    row: SessionRow, interpreter: Interpreter | None, *, active_at: float | None
) -> Kernel:
    """*interpreter* None: it has not been started yet."""
    labels = labels_of(row)
    state = "starting" if interpreter is None else state_of(interpreter.status)
    return Kernel(
        id=kernel_id(row.id),
        session_id=row.id,
        session=row.name,
        spec=labels.get(types.KERNEL, ""),
        state=state if row.status in LIVE else "dead",
        active_at=seconds(row.status_since) if active_at is None else active_at,
        clients=0 if interpreter is None else interpreter.clients,
        path=labels.get(types.PATH, ""),
        title=labels.get(types.TITLE, ""),
        kind=labels.get(types.KIND, "") or "notebook",
    )


def alone_after(row: SessionRow) -> float | None:
    """After how many seconds without a client its session ends; None: it stays."""
    try:
        asked = float(labels_of(row).get(types.ALONE, ""))
    except ValueError:
        return None
    return max(IDLE_S[0], min(asked, IDLE_S[1])) if asked > 0 else None


def kernel_model(kernel: Kernel) -> dict[str, Any]:
    """As Jupyter's REST API has it."""
    return {
        "id": kernel.id,
        "name": kernel.spec,
        "last_activity": utc(kernel.active_at),
        "execution_state": kernel.state,
        "connections": kernel.clients,
    }


def session_model(kernel: Kernel) -> dict[str, Any]:
    """A Jupyter session: a kernel and the notebook that it is for; both have one id."""
    path = kernel.path or kernel.session
    model = {"id": kernel.id, "path": path, "name": kernel.title, "type": kernel.kind}
    notebook = {"path": path, "name": kernel.title}
    return {**model, "kernel": kernel_model(kernel), "notebook": notebook}
