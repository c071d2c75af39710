"""``madang``: a provisioner of ``jupyter_client`` (entry point of this package).

It starts the kernel at the server and a bridge to it on this machine. A restart keeps the session:
only the interpreter in it and the bridge are made anew.
"""

from __future__ import annotations

from typing import Any

from jupyter_client.provisioning import LocalProvisioner
from traitlets import Float, Unicode

from madang.jupyter.__main__ import ALONE_S
from madang.jupyter.remote import Remote


class MadangProvisioner(LocalProvisioner):  # type: ignore[misc]
    """Its process is the bridge; signals and waiting are those of any local kernel."""

    kernel = Unicode(help="Name of the kernelspec at the server; empty: its default.").tag(
        config=True
    )
    url = Unicode(help="The server; empty: as `madang login` stored it.").tag(config=True)
    alone_s = Float(
        ALONE_S, help="Seconds after which the session ends when this machine is gone."
    ).tag(config=True)

    remote_id = ""

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Have a kernel at the server; the one of before if it still is there."""
        async with Remote(self.url) as remote:
            if not self.remote_id or not await remote.lives(self.remote_id):
                self.remote_id = await remote.start(self.kernel, alone_s=self.alone_s)
        found: dict[str, Any] = await super().pre_launch(**kwargs)
        command = [*found["cmd"], "--attach", self.remote_id]
        return found | {"cmd": command + (["--url", self.url] if self.url else [])}

    async def cleanup(self, restart: bool = False) -> None:
        """End the session, unless the kernel is only restarted."""
        if self.remote_id and not restart:
            async with Remote(self.url) as remote:
                await remote.stop(self.remote_id)
            self.remote_id = ""
        await super().cleanup(restart=restart)

    async def get_provisioner_info(self) -> dict[str, Any]:
        return {**await super().get_provisioner_info(), "remote_id": self.remote_id}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        await super().load_provisioner_info(provisioner_info)
        self.remote_id = provisioner_info["remote_id"]
