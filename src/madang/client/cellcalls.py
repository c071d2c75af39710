"""Requests about interpreters and cells, as values: ``client.call(cellcalls.start(…))``."""

from __future__ import annotations

from typing import Final

from madang.client.calls import TIMEOUT_S, Call, _nothing, query, read_as, session_path
from madang.kit.codec import to_json
from madang.wire.cells import (
    Cell,
    CellQuestion,
    CellRequest,
    Completions,
    InputAnswer,
    Inspection,
    Interpreter,
    InterpreterRequest,
    InterpreterStatus,
)

_JSON: Final = {"Content-Type": "application/json"}


def _path(ref: str, name: str, rest: str = "") -> str:
    return session_path(ref, "/interpreters") + "/" + quoted(name) + rest


def quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def start(ref: str, request: InterpreterRequest) -> Call[Interpreter]:
    return Call(
        method="POST",
        path=session_path(ref, "/interpreters"),
        body=to_json(request),
        headers=_JSON,
        decode=read_as(Interpreter),
        repeatable=False,
    )


def interpreters(ref: str | None) -> Call[list[Interpreter]]:
    path = "/v1/interpreters" if ref is None else session_path(ref, "/interpreters")
    return Call(method="GET", path=path, decode=read_as(list[Interpreter]))


def interpreter(ref: str, name: str) -> Call[Interpreter]:
    return Call(method="GET", path=_path(ref, name), decode=read_as(Interpreter))


def stop(ref: str, name: str) -> Call[Interpreter]:
    return Call(method="DELETE", path=_path(ref, name), decode=read_as(Interpreter))


def restart(ref: str, name: str) -> Call[Interpreter]:
    return Call(
        method="POST",
        path=_path(ref, name, "/restart"),
        decode=read_as(Interpreter),
        repeatable=False,
    )


def interrupt(ref: str, name: str) -> Call[None]:
    path = _path(ref, name, "/interrupt")
    return Call(method="POST", path=path, decode=_nothing, repeatable=False)


def execute(ref: str, name: str, request: CellRequest, wait_s: float) -> Call[Cell]:
    """Repeatable where the request has an id."""
    return Call(
        method="POST",
        path=query(_path(ref, name, "/cells"), wait=wait_s or None),
        body=to_json(request),
        headers=_JSON,
        decode=read_as(Cell),
        repeatable=bool(request.id),
        timeout_s=TIMEOUT_S + wait_s,
    )


def cell(ref: str, name: str, cell_id: str, wait_s: float) -> Call[Cell]:
    return Call(
        method="GET",
        path=query(_path(ref, name, "/cells/" + quoted(cell_id)), wait=wait_s or None),
        decode=read_as(Cell),
        timeout_s=TIMEOUT_S + wait_s,
    )


def history(ref: str, name: str, *, limit: int, before: int | None) -> Call[list[Cell]]:
    path = query(_path(ref, name, "/cells"), limit=limit, before=before)
    return Call(method="GET", path=path, decode=read_as(list[Cell]))


def answer(ref: str, name: str, text: str) -> Call[None]:
    return Call(
        method="POST",
        path=_path(ref, name, "/input"),
        body=to_json(InputAnswer(text=text)),
        headers=_JSON,
        decode=_nothing,
        repeatable=False,
    )


def complete(ref: str, name: str, code: str, cursor: int | None) -> Call[Completions]:
    return Call(
        method="POST",
        path=_path(ref, name, "/complete"),
        body=to_json(CellQuestion(code=code, cursor=cursor)),
        headers=_JSON,
        decode=read_as(Completions),
    )


def inspect(ref: str, name: str, code: str, cursor: int | None) -> Call[Inspection]:
    return Call(
        method="POST",
        path=_path(ref, name, "/inspect"),
        body=to_json(CellQuestion(code=code, cursor=cursor)),
        headers=_JSON,
        decode=read_as(Inspection),
    )


def channel_path(ref: str, name: str, after: int) -> str:
    return query(_path(ref, name, "/channel"), after=after)


def choose(found: list[Interpreter], request: InterpreterRequest) -> Interpreter | None:
    """The live one that *request* means: of its name, or else the oldest of its language."""
    live = [each for each in found if each.status is not InterpreterStatus.ENDED]
    if request.name:
        return next((each for each in live if each.name == request.name), None)
    wanted = (request.language, request.driver)
    return next((each for each in live if (each.language, each.driver) == wanted), None)
