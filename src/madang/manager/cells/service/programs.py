"""Starting an interpreter's program in a session."""

from __future__ import annotations

from typing import Final

from madang.kit.codec import from_json
from madang.kit.ids import new_nonce
from madang.kit.languages import cells_command
from madang.manager.cells.types import InterpreterRow, Languages
from madang.manager.session.service.kernels import KernelService
from madang.manager.session.types import SessionRow
from madang.wire.errors import InvalidRequest, NodeUnavailable
from madang.wire.kernel import WORK_DIR, ExecSpec
from madang.wire.languages import Language
from madang.wire.link import ExecStarted, StartExec

DRIVER: Final = "DRIVER"


class Programs:
    def __init__(self, kernels: KernelService, languages: Languages) -> None:
        self._kernels: Final = kernels
        self._languages: Final = languages

    def language(self, name: str, driver: str) -> Language:
        """Whose driver it is. Raises LanguageUnknown, InvalidRequest."""
        language = self._languages.get(driver or name)
        if not language.cells:
            raise InvalidRequest(f"{language.title} has no cells; `madang run` runs its files.")
        return language

    async def start(self, session: SessionRow, row: InterpreterRow) -> tuple[str, str]:
        """The new program's exec id and nonce."""
        language = self.language(row.language, row.driver)
        nonce = new_nonce()
        # A variable of this name would be left out: users can't set MADANG_*.
        command = f"export MADANG_NONCE={nonce}\n{cells_command(language)}"
        spec = ExecSpec(
            argv=("/bin/sh", "-c", command),
            env={
                **from_json(dict[str, str], row.env),
                DRIVER: self._languages.driver(language),
            },
            cwd=row.cwd or WORK_DIR,
            stdin=True,
        )
        async with self._kernels.open(session, StartExec(kernel=session.kernel, spec=spec)) as s:
            async for item in s:
                if isinstance(item, ExecStarted):
                    return item.exec_id, nonce
        raise NodeUnavailable("the machine did not say whether the interpreter was started.")
