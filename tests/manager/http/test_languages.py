"""Languages over HTTP."""

from __future__ import annotations

from madang.testing.manager import ManagerBox


async def test_languages_are_listed_and_found_by_alias(box: ManagerBox) -> None:
    listed = await box.call("GET", "/v1/languages")
    names = [one["name"] for one in listed]

    assert names == sorted(names)
    assert {"python", "r", "cpp", "shell"} <= set(names)
    found = await box.call("GET", "/v1/languages/c++")
    assert (found["name"], found["suffixes"][0]) == ("cpp", ".cpp")
    problem = await box.call("GET", "/v1/languages/klingon", status=404)
    assert problem["code"] == "language.unknown"
