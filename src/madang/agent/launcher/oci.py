"""The configuration of one program as a container, as OCI runtimes read it. Pure.

Nearly everything that such a configuration can say is done already: the session's namespaces,
control group, limits, mounts and masked paths are the init's work, the same for every runtime. What
is left is a mount namespace, the user, no capabilities, no new privileges and the filter.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from typing import Any, Final

from madang.agent.launcher import mounts
from madang.agent.launcher.order import Order
from madang.wire.kernel import ExecSpec, KernelSpec

ROOT: Final = "/srv"
"""Where the session's root lies for the runtime."""
UMASK: Final = 0o022
OOM_SCORE: Final = 300
_DEVICE_OPTIONS: Final = ("rbind", "nosuid", "noexec")
_CAPABILITY_SETS: Final = ("bounding", "effective", "inheritable", "permitted", "ambient")
_RAW_FILTER: Final = "run.oci.seccomp_bpf_data"
"""crun takes our own program, byte for byte; others translate the profile."""


_CLOSE_ROOT: Final = {
    "path": "/bin/sh",
    "args": ["sh", "-c", f"read -r state; exec mount -n -o remount,bind,ro,nosuid,nodev {ROOT}"],
    "env": ["PATH=/usr/bin:/bin"],
}
"""crun forgets how the root was mounted. It breaks off if nobody reads the state that it tells."""


def configuration(
    order: Order,
    spec: KernelSpec | ExecSpec,
    argv: list[str],
    environment: dict[str, str],
    *,
    devices: str,
    base_filter: str,
) -> dict[str, Any]:
    """``config.json``.

    *devices*: what becomes ``/dev``. *base_filter*: the filter without a policy, base64.
    """
    uid = mounts.shown_uid(order)
    found: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": spec.tty,
            "consoleSize": {"height": spec.rows, "width": spec.cols},
            "user": {"uid": uid, "gid": uid, "umask": UMASK},
            "args": argv,
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": spec.cwd,
            "capabilities": {name: [] for name in _CAPABILITY_SETS},
            "noNewPrivileges": True,
            "oomScoreAdj": OOM_SCORE,
        },
        # Read-only as it is: a runtime that makes it so again forgets its other flags.
        "root": {"path": ROOT, "readonly": False},
        # Given, or else runtimes make devices of their own in the root.
        "mounts": [
            {
                "destination": "/dev",
                "type": "bind",
                "source": devices,
                "options": _DEVICE_OPTIONS if spec.tty else [*_DEVICE_OPTIONS, "ro"],
            }
        ],
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    if order.runtime == "crun":
        found["hooks"] = {"createContainer": [_CLOSE_ROOT]}
    if order.profile:
        found["linux"]["seccomp"] = json.loads(order.profile)
    else:
        found["annotations"] = {_RAW_FILTER: order.program or base_filter}
    return found


def gvisor(order: Order, program: str, binds: Sequence[str]) -> dict[str, Any]:
    """``config.json`` of gVisor's sandbox, whose process 1 is *program*.

    *binds*: paths of the session's root that it is told of, each by its own name.
    """
    may_signal = ["CAP_KILL"]
    uid = {"uid": 0, "gid": 0}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": uid,
            "args": [program],
            "env": [],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), may_signal),
            "noNewPrivileges": True,
            "oomScoreAdj": OOM_SCORE,
        },
        "root": {"path": ROOT, "readonly": False},
        "hostname": order.spec.hostname,
        "mounts": [
            *(_bind(path, f"{ROOT}{path}") for path in binds),
            {
                "destination": "/dev/shm",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "nodev", "mode=1777", f"size={order.spec.size.mem_bytes}"],
            },
        ],
        "linux": {"namespaces": [{"type": "mount"}]},
    }


def _bind(path: str, source: str) -> dict[str, Any]:
    options = ["rbind", "nosuid", "nodev"]
    return {"destination": path, "type": "bind", "source": source, "options": options}


def guest(
    order: Order,
    spec: KernelSpec | ExecSpec,
    argv: list[str],
    environment: dict[str, str],
) -> dict[str, Any]:
    """One program of that sandbox, as ``runsc exec --process`` reads it."""
    uid = mounts.shown_uid(order)
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE))
    return {
        "terminal": spec.tty,
        "user": {"uid": uid, "gid": uid, "umask": UMASK},
        "args": argv,
        "env": [f"{name}={value}" for name, value in environment.items()],
        "cwd": spec.cwd,
        "capabilities": {name: [] for name in _CAPABILITY_SETS},
        "noNewPrivileges": True,
        "rlimits": [
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NOFILE", "soft": files, "hard": files},
        ],
    }
