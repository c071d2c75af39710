"""Byte-compile a layer, run on the node by the interpreter that sessions use.

Byte code never comes out of a build session: it is no part of a layer's digest, so nobody could
tell whether it fits the source beside it. It is not checked against the source when imported: a
layer never changes. Source that does not compile is left alone, as pip does. So are links that lead
out of the layer: we are the server's user, and see more than a build may.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import resource
import sys

MEMORY_BYTES = 2 * 1024**3
CPU_S = 900
OTHER_VERSION = 3


def main(root: str, version: str, prefix: str) -> int:
    """0, or OTHER_VERSION if this interpreter is none of *version* (``3.11``)."""
    if "{}.{}".format(*sys.version_info[:2]) != version:
        return OTHER_VERSION
    library = os.path.join(root, "lib")
    if os.path.islink(library):
        return 0
    os.nice(5)  # sessions come first, but somebody waits for the image
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    compileall.compile_dir(
        library,
        maxlevels=100,
        quiet=2,
        force=True,
        workers=min(4, os.cpu_count() or 1),
        stripdir=root,
        prependdir=prefix,
        limit_sl_dest=root,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
