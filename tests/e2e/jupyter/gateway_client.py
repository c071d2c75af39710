"""Run by a Python that has jupyter_server: its own gateway client runs a notebook.

``gateway_client.py URL TOKEN``
"""

from __future__ import annotations

import asyncio
import sys

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager, GatewayKernelSpecManager


async def main() -> None:
    settings = GatewayClient.instance()
    settings.url, settings.auth_token = sys.argv[1], sys.argv[2]
    settings.init_connection_args()
    found = await GatewayKernelSpecManager().get_kernel_spec("python")
    print(found["spec"]["display_name"])
    manager = GatewayKernelManager()
    await manager.start_kernel(kernel_name=found["name"])
    try:
        await manager.refresh_model()
        assert await manager.is_alive()
        await manager.interrupt_kernel()
        await manager.restart_kernel()
    finally:
        await manager.shutdown_kernel()
    assert await manager.refresh_model() is None
    print("ended")


if __name__ == "__main__":
    asyncio.run(main())
