"""Start several sessions at once with the asyncio client and collect what they print."""

from __future__ import annotations

import asyncio
import os

from madang.client import AsyncClient


async def square(client: AsyncClient, number: int) -> int:
    async with await client.run(["python3", "-c", f"print({number} ** 2)"]) as run:
        return int(b"".join([record.data async for record in run]))


async def main() -> None:
    async with AsyncClient(os.environ["MADANG_URL"], os.environ["MADANG_TOKEN"]) as client:
        print(await asyncio.gather(*(square(client, number) for number in range(5))))


if __name__ == "__main__":
    asyncio.run(main())
