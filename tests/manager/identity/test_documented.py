"""The worked example of the page on signed requests."""

from __future__ import annotations

import re
from pathlib import Path

from madang.wire import signing

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "signing.md"


def test_the_example_is_what_we_compute() -> None:
    page = PAGE.read_text()
    blocks = re.findall(r"```(?:text|python)\n(.*?)\n```", page, re.DOTALL)
    request = next(block for block in blocks if block.startswith("POST /v1"))
    text = next(block for block in blocks if re.search(r"\n[0-9]{10}\n", block))
    code = next(block for block in blocks if block.startswith("import hashlib"))
    head, _, body = request.partition("\n\n")
    shown = re.search(r"Authorization: (.*)", head)
    assert shown is not None
    header = signing.signed_header(
        "mdk_" + "0" * 26,
        "example-secret-key",
        method="POST",
        host="yard.example.org",
        target="/v1/sessions?dry_run=1",
        body=signing.body_hash(body.encode()),
        date=1_790_000_000,
        nonce="0123456789abcdef",
    )
    assert shown[1] == header
    parsed = signing.parse(header)
    assert parsed is not None
    assert parsed.signature == signing.sign("example-secret-key", text)
    names: dict[str, str] = {}
    exec(code, names)
    assert names["text"] == text
    assert names["signature"] == parsed.signature
