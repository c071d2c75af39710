"""REST of languages."""

from __future__ import annotations

from typing import Any, Final

from madang.kit.languages import Languages
from madang.manager.http import Call, endpoint
from madang.wire.languages import Language


class LanguageApi:
    def __init__(self, languages: Languages) -> None:
        self._languages: Final = languages

    @endpoint("GET", "/v1/languages", returns=tuple[Language, ...])
    async def list_languages(self, call: Call[Any, Any]) -> tuple[Language, ...]:
        """Languages by name, with the commands that run code in them."""
        return self._languages.all()

    @endpoint("GET", "/v1/languages/{name}", returns=Language)
    async def get_language(self, call: Call[Any, Any]) -> Language:
        """One language, by its name or an alias."""
        return self._languages.get(call.path("name"))
