"""Builds for real: ``madang up``, isolated sessions, packages from the index and from the tests."""

from __future__ import annotations

import http.server
import io
import os
import secrets
import tarfile
import threading
from collections.abc import Iterator

import pytest

from madang.agent.launcher import registry
from madang.client import Client, calls
from madang.testing.platform import Platform, start
from madang.wire.image import BuildRequest, Image, ImageStatus
from madang.wire.session import Reason, Session, SizeRequest
from madang.wire.size import MIB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: isolated sessions"),
]

STANDARD = SizeRequest()
WAITING = """
import http.client, os, time, urllib.request
proxy = urllib.request.ProxyHandler({"http": os.environ["HTTP_PROXY"]})
index = urllib.request.build_opener(proxy)
while True:
    try:
        if index.open(URL + "/go", timeout=5).read() == b"go":
            break
    except (OSError, http.client.HTTPException):
        pass  # a proxy that is killed may leave half an answer
    time.sleep(0.05)

def build_wheel(folder, settings=None, metadata=None):
    import zipfile
    name = "waiting-1.0-py3-none-any.whl"
    info = "waiting-1.0.dist-info"
    files = {
        "waiting.py": "x = 1\\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: waiting\\nVersion: 1.0\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""
"""The back end of a source package: while it is built, it waits for the test's word."""


class Index:
    """A package index on the loopback with one package, ``waiting``."""

    def __init__(self) -> None:
        self.building = threading.Event()
        """Some build waits."""
        self.go = threading.Event()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = index.answer(self.path)
                self.send_response(200 if data is not None else 404)
                self.send_header("Content-Length", str(len(data or b"")))
                self.send_header("Content-Type", "text/html" if data else "text/plain")
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._archive = self._source()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self, path: str) -> bytes | None:
        match path:
            case "/waiting/":
                return b'<!DOCTYPE html><a href="/waiting-1.0.tar.gz">waiting-1.0.tar.gz</a>'
            case "/waiting-1.0.tar.gz":
                return self._archive
            case "/go":
                self.building.set()
                return b"go" if self.go.is_set() else b"no"
        return None

    def _source(self) -> bytes:
        backend = f"URL = {self.url!r}\n{WAITING}"
        project = '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w:gz") as tar:
            for name, text in (("pyproject.toml", project), ("b.py", backend)):
                info = tarfile.TarInfo(f"waiting-1.0/{name}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        return made.getvalue()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def shared_index() -> Iterator[Index]:
    index = Index()
    yield index
    index.close()


@pytest.fixture
def index(shared_index: Index) -> Index:
    shared_index.building.clear()
    shared_index.go.clear()
    return shared_index


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, shared_index: Index) -> Iterator[Platform]:
    with start(
        tmp_path_factory.mktemp("platform"), environment={"UV_INDEX": shared_index.url}
    ) as platform:
        yield platform


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as client:
        yield client


def _ended(client: Client, session: Session) -> Session:
    return client.wait_session(session.id, timeout_s=100)


def _build(client: Client, name: str, *requirements: str, size: SizeRequest = STANDARD) -> Image:
    request = BuildRequest(name=name, requirements=requirements, size=size)
    _ended(client, client.call(calls.build_image(request, secrets.token_hex(8))))
    return client.get_image(name)


def _python(client: Client, image: str, code: str) -> str:
    run = client.run(["python", "-c", code], image=image)
    text = b"".join(chunk.data for chunk in run).decode()
    ended = run.wait().ended
    assert ended is not None
    assert ended.exit_code == 0, text
    return text.strip()


def _layers(platform: Platform) -> set[str]:
    return {name for name in os.listdir(platform.state / "layers") if name != ".keys"}


def _kernel(platform: Platform, session: Session) -> registry.Record:
    found = registry.load(str(platform.state / "kernels" / f"{session.id}.{session.attempt}"))
    assert found is not None
    return found


def test_two_versions_of_a_library_run_side_by_side(client: Client) -> None:
    for name, version in (("old", "3.4"), ("new", "3.10")):
        assert _build(client, name, f"idna=={version}").status is ImageStatus.READY
    code = (
        "import idna, os, sys; print(idna.__version__, sys.prefix, sys.executable, "
        "os.path.exists(idna.__cached__), os.access(idna.__file__, os.W_OK))"
    )
    assert _python(client, "old", code) == "3.4 /env /env/bin/python True False"
    assert _python(client, "new", code) == "3.10 /env /env/bin/python True False"


def test_a_library_with_compiled_parts_and_a_script_works(client: Client) -> None:
    image = _build(client, "numbers", "numpy")
    assert image.status is ImageStatus.READY, image.reason
    assert [layer.name for layer in image.layers] == ["numpy", "python"]
    assert _python(client, "numbers", "import numpy; print(numpy.ones((3, 3)).sum())") == "9.0"
    run = client.run(["f2py", "-v"], image="numbers")
    assert b"".join(chunk.data for chunk in run).decode().strip() == image.layers[0].version


def test_building_again_makes_no_new_layer(client: Client, platform: Platform) -> None:
    first = _build(client, "again", "markupsafe==3.0.2")
    before = _layers(platform)
    second = _build(client, "again", "markupsafe==3.0.2")
    assert second.digest == first.digest
    assert second.build != first.build
    assert _layers(platform) == before


def test_a_build_has_no_way_to_the_machine(client: Client, index: Index) -> None:
    """It reaches the index that the operator named, by the proxy; nothing else here."""
    index.go.set()
    assert _build(client, "waited", "waiting").status is ImageStatus.READY
    assert _python(client, "waited", "import waiting; print(waiting.x)") == "1"
    other = index.url.rpartition(":")[0] + ":443"
    failed = _build(client, "reaching", f"idna @ {other}/idna-3.4.tar.gz")
    assert failed.status is ImageStatus.FAILED


@pytest.mark.parametrize("how", ["stop", "kill the program", "kill its keeper"])
def test_a_build_that_is_cut_short_leaves_nothing_and_can_be_repeated(
    client: Client, platform: Platform, index: Index, how: str
) -> None:
    before = _layers(platform)
    session = client.build_image("cut", ["idna==3.9", "waiting"])
    assert index.building.wait(30)
    match how:
        case "stop":
            client.stop(session.id)
        case "kill the program":
            client.signal(session.id, 9)
        case _:
            session = client.get_session(session.id)
            keeper = _kernel(platform, session).keeper
            assert keeper is not None
            os.kill(keeper.pid, 9)
    session = _ended(client, session)

    image = client.get_image("cut")
    assert session.ended is not None
    assert session.ended.reason in {Reason.USER, Reason.SIGNAL, Reason.LOST}
    assert image.status is ImageStatus.FAILED
    assert image.reason
    assert _layers(platform) == before
    client.remove_image("cut")
    assert "cut" not in [each.name for each in client.list_images()]
    assert _build(client, "cut", "idna==3.10").status is ImageStatus.READY
    client.remove_image("cut")


def test_a_build_outlives_its_server(client: Client, platform: Platform, index: Index) -> None:
    session = client.build_image("outlived", ["waiting"])
    assert index.building.wait(30)
    index.building.clear()  # Before: the new server may be back sooner than we are.
    pid = platform.kill("server")
    assert index.building.wait(30), "the new server opened the way to the index again"
    assert platform.child("server") != pid
    index.go.set()
    session = _ended(client, session)
    assert session.ended is not None
    assert client.get_image("outlived").status is ImageStatus.READY, session.ended.text


def test_a_build_whose_disk_is_full_says_so(client: Client, platform: Platform) -> None:
    before = _layers(platform)
    image = _build(client, "large", "numpy==2.2.6", size=SizeRequest(disk_bytes=40 * MIB))
    assert image.status is ImageStatus.FAILED
    assert "disk" in image.reason
    assert _layers(platform) == before
