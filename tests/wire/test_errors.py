from __future__ import annotations

import re

import pytest

from madang.wire.errors import NotFound, PlatformError, catalogue, from_problem


def kinds() -> list[type[PlatformError]]:
    return list(catalogue().values())


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in kinds()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(?:[._][a-z_]+)*", code) for code in codes)


def test_no_error_class_hides_behind_the_code_of_another() -> None:
    found: set[type[PlatformError]] = set()
    todo = [PlatformError]
    while todo:
        kind = todo.pop()
        found.add(kind)
        todo += kind.__subclasses__()
    own = {k for k in found if "code" in vars(k)}
    assert own == set(kinds())


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.code)
def test_every_error_explains_itself_and_survives_the_wire(kind: type[PlatformError]) -> None:
    assert len(kind.help_text) > 30
    assert 400 <= kind.http_status < 600
    again = from_problem(kind.code, "what failed", {"field": 1})
    assert type(again) is kind
    assert (str(again), again.details) == ("what failed", {"field": 1})


def test_an_unknown_code_is_still_an_error_with_its_text() -> None:
    error = from_problem("from.the.future", "text", {})
    assert type(error) is PlatformError
    assert error.text == "text"


def test_details_are_kept() -> None:
    assert NotFound("no session x", name="x").details == {"name": "x"}
