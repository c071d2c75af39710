"""The launcher's socket in the hands of a hostile server: it answers errors, lives, gains nothing.

Whatever is sent, the launcher must still be the same process afterwards, and answer at once.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madang.agent.launcher import checks
from madang.agent.launcher.protocol import MAX_FRAME, Frames, frame
from madang.kit.codec import to_builtins
from madang.kit.ids import new_id
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import Launcher, Sessions, spec
from madang.wire.errors import PlatformError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the privileged launcher")

SPEC: dict[str, Any] = to_builtins(spec("/bin/true"))


class Raw:
    """A connection that says anything."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.settimeout(PATIENCE_S)
        self._frames = Frames()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(frame({"id": 1, **message}))
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; hints are skipped. EOFError: the launcher hung up."""
        while True:
            for message in self.hear():
                if "changed" not in message:
                    return message

    def hear(self) -> list[dict[str, Any]]:
        """All that has come, hints too."""
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError
        return self._frames.feed(data)

    def hung_up(self) -> bool:
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True


@pytest.fixture
def raw(launcher: Launcher, sessions: Sessions) -> Iterator[Raw]:
    """*sessions*: waits until the launcher listens, and checks that nothing is left."""
    assert launcher.process is not None
    before = launcher.process.pid
    connection = Raw(launcher.socket)
    yield connection
    connection.sock.close()
    assert launcher.process.poll() is None, "the launcher died"
    again = Raw(launcher.socket)
    assert again.ask(op="hello")["ok"]["enforced"]
    again.sock.close()
    assert launcher.process.pid == before


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", MAX_FRAME + 1),
        struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
        struct.pack("<I", 5) + b"[1,2]",
        struct.pack("<I", 4) + b"nope",
        struct.pack("<I", 0),
        struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<I", 200_000) + b"[" * 200_000,
    ],
)
async def test_garbage_is_refused_and_hung_up_on(raw: Raw, data: bytes) -> None:
    raw.send(data)
    assert raw.answer()["error"] == "request.invalid"
    assert raw.hung_up()


async def test_half_a_frame_holds_nobody_up(raw: Raw, launcher: Launcher) -> None:
    raw.send(struct.pack("<I", 1000) + b"half")
    other = Raw(launcher.socket)
    assert "ok" in other.ask(op="hello")
    other.sock.close()


async def test_who_does_not_read_holds_nobody_up(raw: Raw, launcher: Launcher) -> None:
    raw.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            raw.send(frame({"id": 1, "op": "hello"}) * 1000)
    other = Raw(launcher.socket)
    assert "ok" in other.ask(op="hello")
    other.sock.close()


async def test_many_connections_are_bounded(raw: Raw, launcher: Launcher) -> None:
    many = [Raw(launcher.socket) for _ in range(100)]
    for connection in many:
        connection.sock.close()
    assert "ok" in raw.ask(op="hello")


async def test_another_user_is_refused_even_with_a_way_to_the_socket(
    raw: Raw, launcher: Launcher
) -> None:
    os.chmod(os.path.dirname(launcher.socket), 0o755)
    os.chmod(launcher.socket, 0o666)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setresuid(launcher.base_uid, launcher.base_uid, launcher.base_uid)
            other = Raw(launcher.socket)
            other.sock.sendall(frame({"id": 1, "op": "hello"}))
            code = 0 if other.hung_up() else 2
        except (BrokenPipeError, ConnectionResetError):
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    os.chmod(launcher.socket, 0o600)
    os.chmod(os.path.dirname(launcher.socket), 0o700)


@pytest.mark.parametrize(
    "kernel",
    [
        *("", "../../etc.1", "0123456789abcdef", "0123456789abcdef.", "0123456789abcdef.1234567"),
        *("0123456789ABCDEF.1", "0123456789abcdef.1\n", "0123456789abcdef.1/..", "x" * 100 + ".1"),
        *("٠١٢٣٤٥٦٧٨٩.1", None, 7, ["0123456789abcdef.1"], {"a": 1}),
    ],
)
@pytest.mark.parametrize("op", ["prepare", "start", "settle", "remove", "kill", "files"])
async def test_only_kernel_ids_name_kernels(raw: Raw, op: str, kernel: object) -> None:
    assert raw.ask(op=op, kernel=kernel, spec=SPEC)["error"] == "request.invalid"


def changed(path: str, value: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(SPEC))
    *above, last = path.split(".")
    inner = found
    for key in above:
        inner = inner[key]
    inner[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("argv", "true"),
        ("argv", [1]),
        ("argv", ["a\0b"]),
        ("argv", ["\ud800"]),
        ("argv", ["x" * 600_000] * 2),
        ("argv_encoding", "utf-7"),
        ("env", {"": "x"}),
        ("env", {"A=B": "x"}),
        ("env", {"A": 1}),
        ("env", ["A"]),
        ("cwd", "work"),
        ("cwd", "/a\0b"),
        ("cwd", "/" * 5000),
        ("tty", 1),
        ("rows", 0),
        ("rows", 70000),
        ("cols", True),
        ("hostname", "a/b"),
        ("hostname", "-a"),
        ("hostname", "a\nb"),
        ("hostname", "x" * 64),
        ("log_limit_bytes", 1),
        ("log_limit_bytes", 1e30),
        ("grace_s", -1),
        ("image", None),
        ("image.kind", "tree"),
        ("image.layers", ["0" * 64]),
        ("image", {"kind": "layers", "layers": ["../../../etc"]}),
        ("image", {"kind": "layers", "layers": ["0" * 63 + "/"]}),
        ("image", {"kind": "layers", "layers": ["0" * 64] * 501}),
        ("size", 7),
        ("size.cpu", 0),
        ("size.cpu", -1),
        ("size.cpu", "1"),
        ("size.cpu", 1e30),
        ("size.mem_bytes", 1),
        ("size.mem_bytes", 1e400),
        ("size.pids", True),
        ("size.disk_bytes", -5),
        ("size.time_s", 0),
        ("size.nice", 1),
        ("uid", 0),
        ("mounts", ["/etc"]),
        ("network", "full"),
        ("network", {"mode": "host"}),
        ("network", {"mode": "allow"}),
        ("network", {"mode": "full", "allow": ["a.b"]}),
        ("network", {"mode": "allow", "allow": "a.b"}),
        ("network", {"mode": "allow", "allow": ["a.b accept; }"]}),
        ("network", {"mode": "allow", "allow": ["10.0.0.0/8 }"]}),
        ("network", {"mode": "allow", "allow": ["a.b:1-99999"]}),
        ("network", {"mode": "allow", "allow": ["a.b"] * 65}),
        ("network", {"mode": "full", "bandwidth_bits": "1m"}),
        ("network", {"mode": "full", "bandwidth_bits": -1}),
        ("network", {"mode": "full", "bandwidth_bits": 10**40}),
        ("network", {"mode": "full", "forbidden": []}),
    ],
)
async def test_a_spec_that_makes_no_sense_is_refused(raw: Raw, path: str, value: object) -> None:
    kernel = f"{new_id()}.1"
    answer = raw.ask(op="prepare", kernel=kernel, spec=changed(path, value))
    assert answer["error"] == "request.invalid"
    assert answer["text"]
    assert raw.ask(op="list")["ok"]["kernels"] == []


async def test_requests_out_of_order_are_errors(raw: Raw) -> None:
    kernel = f"{new_id()}.1"
    for op in ("start", "settle", "freeze", "thaw", "files"):
        assert raw.ask(op=op, kernel=kernel, spec=SPEC)["error"] == "object.not_found"
    for op in ("kill", "remove"):
        assert raw.ask(op=op, kernel=kernel)["ok"] == {}
    assert raw.ask(op="explode", kernel=kernel)["error"] == "request.invalid"
    assert raw.ask()["error"] == "request.invalid"


async def test_a_layer_that_is_a_link_is_refused(raw: Raw, launcher: Launcher) -> None:
    """The server owns the layers' folder: it could show a session any folder of the host."""
    digest = "ab" * 32
    link = Path(launcher.state, "layers", digest)
    link.symlink_to("/root")
    kernel = f"{new_id()}.1"
    asked = changed("image", {"kind": "layers", "layers": [digest]})
    assert "ok" in raw.ask(op="prepare", kernel=kernel, spec=asked)

    answer = raw.ask(op="start", kernel=kernel, spec=asked)

    link.unlink()
    assert answer["error"] == "runtime.failed"
    assert raw.ask(op="remove", kernel=kernel)["ok"] == {}


async def test_links_in_the_server_s_folders_lead_nowhere(
    sessions: Sessions, launcher: Launcher, tmp_path: Path
) -> None:
    """``io`` is the server's: what lies there is never followed by root."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (victim / "file").write_text("precious")
    kernel = await sessions.start("/bin/sleep", "1000")
    io = Path(sessions.runtime.kernel_dir(kernel), "io")
    (io / "e1").symlink_to(victim)
    (io / "e2").mkdir()
    (io / "e2" / "log").symlink_to(victim)

    await sessions.runtime.remove(kernel)

    assert (victim / "file").read_text() == "precious"
    assert victim.stat().st_mode & 0o777 == 0o755


ROUNDS = settings().max_examples // 100
"""1, or more with `make fuzz`."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
operations = st.sampled_from(
    "hello list prepare start kill freeze thaw settle remove files exec changed".split()
)
kernels = st.sampled_from(["0123456789abcdef.1", "0123456789abcdef.2"]) | json_values
specs = json_values | st.builds(
    changed,
    st.sampled_from(["argv", "env", "cwd", "image", "size", "size.cpu", "tty", "rows", "grace_s"]),
    json_values,
)


@settings(
    max_examples=150 * ROUNDS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(op=operations | json_values, kernel=kernels, asked=specs, number=json_values)
def test_any_json_gets_an_answer(
    fuzzed: Raw, op: object, kernel: object, asked: object, number: object
) -> None:
    message = {"id": number, "op": op, "kernel": kernel, "spec": asked}
    fuzzed.send(frame(message))
    answer = fuzzed.answer()
    assert "ok" in answer or isinstance(answer["error"], str)


texts = st.text(max_size=30) | st.sampled_from(["\ud800", "../x", "/" * 5000, "a\0b", "\udcff"])
near_specs = st.fixed_dictionaries(
    {"image": st.just(SPEC["image"]), "size": st.just(SPEC["size"])},
    optional={
        "argv": st.lists(texts, max_size=3),
        "env": st.dictionaries(texts, texts, max_size=3),
        "cwd": texts.map(lambda text: "/" + text),
        "hostname": texts,
        "owner": texts,
        "workspace": texts,
        "argv_encoding": st.sampled_from(["utf-8", "latin-1", "utf-16", "idna"]),
        "tty": st.booleans(),
        "stdin": st.booleans(),
        "rows": st.floats() | st.integers(),
        "cols": st.floats() | st.integers(),
        "grace_s": st.floats() | st.integers(),
        "log_limit_bytes": st.floats() | st.integers(),
        "build": st.booleans(),
    },
)


@settings(max_examples=300 * ROUNDS, deadline=None)
@given(near_specs)
def test_a_spec_that_is_nearly_right_is_refused_or_can_be_carried_out(
    asked: dict[str, Any],
) -> None:
    """What passes the checks must not fail later, where root or an init handles it."""
    try:
        found = checks.kernel_spec(json.loads(json.dumps(asked)))
    except PlatformError as exc:
        assert exc.text
        return
    checks.argv_bytes(found.argv, found.argv_encoding)
    for text in (found.cwd, *found.env, *found.env.values(), found.hostname):
        assert "\0" not in text
        os.fsencode(text)
    json.dumps(to_builtins(found)).encode()
    struct.pack("HHHH", found.rows, found.cols, 0, 0)


@settings(
    max_examples=25 * ROUNDS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("prepare start kill freeze thaw settle remove files".split()),
            st.sampled_from([1, 2]),
        ),
        max_size=12,
    )
)
def test_any_order_of_real_requests_gets_an_answer_each(
    fuzzed: Raw, steps: list[tuple[str, int]]
) -> None:
    """All at once, without waiting: on sessions that really start, end and vanish."""
    for number, (op, which) in enumerate(steps):
        message = {"id": number, "op": op, "kernel": f"0123456789abcdef.{which}"}
        more = {"spec": SPEC} if op in {"prepare", "start"} else {}
        fuzzed.send(frame(message | more))
    left = set(range(len(steps)))
    while left:
        left -= {message.get("id") for message in fuzzed.hear()}


@settings(max_examples=60 * ROUNDS, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_an_error(data: bytes) -> None:
    try:
        Frames().feed(data)
    except PlatformError as exc:
        assert exc.text


@pytest.fixture
def fuzzed(launcher: Launcher) -> Iterator[Raw]:
    import time

    for _ in range(500):
        if os.path.exists(launcher.socket):
            break
        time.sleep(0.01)
    connection = Raw(launcher.socket)
    yield connection
    for number in (1, 2):
        assert connection.ask(op="remove", kernel=f"0123456789abcdef.{number}")["ok"] == {}
    connection.sock.close()
