"""The blocking client against real sockets and real child processes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.client.fake import TOKEN, FakeServer

from madang.client import Client
from madang.client.events import Output
from madang.kit.codec import to_builtins
from madang.wire.api import ClientOp
from madang.wire.errors import (
    Conflict,
    ImageUnknown,
    InvalidRequest,
    NodeUnavailable,
    NotFound,
    PlatformError,
    RateLimited,
    ServerUnreachable,
    SessionNotRunning,
    Shutdown,
    Unauthenticated,
)
from madang.wire.log import LogGap, LogRecord, Stream
from madang.wire.session import Session, SessionSpec, SessionStatus

COUNT = 'i=0; while [ $i -lt 300 ]; do echo "line $i"; i=$((i+1)); done'
COUNTED = b"".join(b"line %d\n" % i for i in range(300))


def collect(output: object) -> bytes:
    assert hasattr(output, "__iter__")
    return b"".join(item.data for item in output if isinstance(item, LogRecord))


@contextmanager
def later(seconds: float, *work: object) -> Iterator[None]:
    """Call each of *work* after a while, in another thread."""

    def run() -> None:
        time.sleep(seconds)
        for item in work:
            assert callable(item)
            item()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_run_gives_output_streams_apart_and_the_exit_code(client: Client) -> None:
    with client.run(["sh", "-c", "echo out; echo err >&2; exit 3"]) as run:
        records = list(run)
        session = run.wait()

    assert {(r.stream, r.data) for r in records} == {
        (Stream.STDOUT, b"out\n"),
        (Stream.STDERR, b"err\n"),
    }
    assert session.ended is not None
    assert session.ended.exit_code == 3


def test_bytes_survive_in_both_directions(client: Client) -> None:
    data = os.urandom(3_000_000)

    with client.run(["cat"], stdin=True) as run:
        run.write(data)
        run.close_stdin()
        echoed = collect(run)

    assert echoed == data


def test_arguments_that_are_not_utf8_arrive(client: Client) -> None:
    with client.run(["printf", "%s", b"a\xff\xe4b"]) as run:
        assert collect(run) == b"a\xff\xe4b"


def test_one_string_instead_of_a_list_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="give a list"):
        client.run("echo hello")


def test_nul_bytes_in_arguments_are_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="NUL"):
        client.run(["echo", "a\0b"])


def test_errors_are_the_classes_of_the_catalogue(client: Client) -> None:
    with pytest.raises(NotFound, match="nothing-like-it"):
        client.get_session("nothing-like-it")
    with pytest.raises(ImageUnknown), client.run(["true"], image="nope") as run:
        run.wait()
    with pytest.raises(NotFound):
        client.attach("nothing-like-it")


def test_a_wrong_token_is_told(server: FakeServer) -> None:
    with Client(server.url, "wrong") as stranger:
        with pytest.raises(Unauthenticated):
            stranger.whoami()
        with pytest.raises(Unauthenticated):
            stranger.run(["true"])


def test_nobody_listening_is_told_at_once_with_the_next_step() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Client(f"http://127.0.0.1:{unused.getsockname()[1]}", TOKEN) as client:
            begun = time.monotonic()
            with pytest.raises(ServerUnreachable, match="madang up"):
                client.whoami()
            with pytest.raises(ServerUnreachable, match="madang up"):
                client.run(["true"])
            assert time.monotonic() - begun < 5


def test_something_else_that_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 404 Nope\r\nContent-Length: 2\r\n\r\nno")

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN) as client:
            with pytest.raises(PlatformError, match="Is it a Madang server"):
                client.whoami()
            with pytest.raises(PlatformError, match="Is it a Madang server"):
                client.run(["true"])
        thread.join()


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host", "http://", "http://host:0x1", "/x"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="server address"):
        Client(url)


def test_lists_come_page_by_page(server: FakeServer, client: Client) -> None:
    for _ in range(5):
        client.run(["true"]).wait()

    assert list(client.list_sessions()) == []
    assert len(list(client.list_sessions(ended=True))) == 5
    assert len({s.id for s in client.list_sessions(ended=True)}) == 5


def test_a_session_can_be_waited_for(server: FakeServer, client: Client) -> None:
    session = client.create_session(SessionSpec(argv=("sleep", "0.2")))

    running = client.wait_session(session.id, until=[SessionStatus.RUNNING])
    ended = client.wait_session(session.id, timeout_s=10)

    assert running.status is SessionStatus.RUNNING
    assert ended.status is SessionStatus.TERMINATED


def test_waiting_ends_after_its_time(client: Client) -> None:
    session = client.create_session(SessionSpec(argv=("sleep", "30")))

    seen = client.wait_session(session.id, timeout_s=0.1)

    assert seen.status is not SessionStatus.TERMINATED


def test_a_session_can_be_stopped_and_removed(client: Client) -> None:
    session = client.create_session(SessionSpec(argv=("sleep", "30")))
    client.wait_session(session.id, until=[SessionStatus.RUNNING])

    client.stop(session.name)
    ended = client.wait_session(session.id)
    client.remove(session.name)

    assert ended.ended is not None
    assert ended.ended.exit_code == 143
    with pytest.raises(NotFound):
        client.get_session(session.id)


def test_a_session_can_be_frozen_and_thawed(client: Client) -> None:
    session = client.create_session(SessionSpec(argv=("sleep", "30")))
    client.wait_session(session.id, until=[SessionStatus.RUNNING])

    assert client.freeze(session.name).frozen_since is not None
    assert client.get_session(session.id).frozen_since is not None
    assert client.thaw(session.name).frozen_since is None
    client.stop(session.id)
    client.wait_session(session.id)
    with pytest.raises(SessionNotRunning):
        client.freeze(session.id)


def test_the_same_key_makes_one_session(server: FakeServer, client: Client) -> None:
    spec = SessionSpec(argv=("true",))

    first = client.create_session(spec, key="k1")
    again = client.create_session(spec, key="k1")

    assert first.id == again.id
    assert len(server.jobs) == 1


def test_a_stream_cut_in_the_middle_loses_nothing_and_repeats_nothing(
    server: FakeServer, client: Client
) -> None:
    server.cut_after = 500
    server.hold.clear()
    broken: list[str] = []

    with client.run(["sh", "-c", f"{COUNT}; sleep 0.2; echo end"]) as run:
        run.on_break = broken.append
        server.hold.set()
        output = collect(run)

    assert output == COUNTED + b"end\n"
    assert len(broken) == 1
    assert [m.op for m in server.messages].count(ClientOp.ATTACH) == 1
    assert len(server.jobs) == 1


def test_a_run_survives_a_restart_of_the_server(server: FakeServer, client: Client) -> None:
    script = "echo one; sleep 0.6; echo two; exit 5"

    with later(0.2, server.stop, lambda: time.sleep(0.2), server.start):
        with client.run(["sh", "-c", script]) as run:
            output = collect(run)
            session = run.wait()

    assert output == b"one\ntwo\n"
    assert session.ended is not None
    assert session.ended.exit_code == 5


def test_a_server_that_does_not_come_back_ends_the_wait(server: FakeServer) -> None:
    with Client(server.url, TOKEN, patience_s=0.3) as client:
        with client.run(["sleep", "30"]) as run:
            assert run.session.name
            server.stop()
            with pytest.raises(ServerUnreachable):
                run.wait()


def test_the_end_of_stdin_is_told_again_after_a_break(server: FakeServer, client: Client) -> None:
    with client.run(["sh", "-c", "cat; sleep 0.5; echo bye"], stdin=True) as run:
        run.write(b"hello\n")
        assert next(iter(run)).data == b"hello\n"
        run.close_stdin()
        run.pump(timeout_s=0.1)
        server.stop()
        server.start()
        assert collect(run) == b"bye\n"

    assert [m.op for m in server.messages].count(ClientOp.STDIN_END) == 2


def test_a_failing_create_is_sent_again_with_the_same_key(
    server: FakeServer, client: Client
) -> None:
    server.fail_next = [Shutdown("stopping"), RateLimited("too many")]

    session = client.create_session(SessionSpec(argv=("true",)))

    assert session.id in server.jobs
    assert server.requests.count("POST /v1/sessions") == 3


@pytest.mark.parametrize("error", [Conflict("no"), NodeUnavailable("away")])
def test_other_errors_are_not_tried_again(
    server: FakeServer, client: Client, error: PlatformError
) -> None:
    server.fail_next = [error]

    with pytest.raises(type(error)):
        client.create_session(SessionSpec(argv=("true",)))

    assert server.requests.count("POST /v1/sessions") == 1


def test_an_idle_connection_that_the_server_closed_is_no_error(
    server: FakeServer, client: Client
) -> None:
    client.whoami()
    server.stop()
    server.start()

    assert client.whoami().user == "admin"


def test_logs_come_whole_from_an_offset_and_from_the_end(client: Client) -> None:
    session = client.run(["sh", "-c", COUNT]).wait()

    whole = list(client.logs(session.id))
    assert collect(whole) == COUNTED
    assert session.log_end == whole[-1].end
    assert list(client.logs(session.id, offset=whole[-1].end)) == []
    assert collect(client.logs(session.id, since=time.time() + 100)) == b""


def test_followed_logs_survive_a_cut_and_a_restart(server: FakeServer, client: Client) -> None:
    script = f"{COUNT}; sleep 0.5; echo end"
    session = client.create_session(SessionSpec(argv=("sh", "-c", script)))
    client.wait_session(session.id, until=[SessionStatus.RUNNING])
    server.cut_after = 333

    with later(0.2, server.stop, server.start):
        output = collect(client.logs(session.id, follow=True))

    assert output == COUNTED + b"end\n"


def test_output_that_is_gone_is_told_as_a_gap(server: FakeServer, client: Client) -> None:
    session = client.run(["sh", "-c", "echo one; sleep 0.05; echo two"]).wait()
    program = server.jobs[session.id].program
    assert program is not None
    gone = program.records.pop(0)

    found: list[Output] = list(client.logs(session.id))

    assert found == [LogGap(0, gone.end), *program.records]


def test_a_program_can_be_executed_in_a_session(client: Client) -> None:
    session = client.create_session(SessionSpec())
    client.wait_session(session.id, until=[SessionStatus.RUNNING])

    with client.exec(session.id, ["sh", "-c", "cat; exit 7"], stdin=True) as program:
        program.write(b"in")
        program.close_stdin()
        assert collect(program) == b"in"
        assert program.wait().exit_code == 7


def test_an_exec_whose_connection_breaks_is_not_started_twice(
    server: FakeServer, client: Client
) -> None:
    session = client.create_session(SessionSpec())
    client.wait_session(session.id, until=[SessionStatus.RUNNING])

    with client.exec(session.id, ["sleep", "30"]) as program:
        program.pump()
        server.stop()
        with pytest.raises(ServerUnreachable):
            program.wait()

    assert [m.op for m in server.messages].count(ClientOp.EXEC) == 1


def test_signals_and_detaching_leave_the_right_things(server: FakeServer, client: Client) -> None:
    script = "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.02; done"
    with client.run(["sh", "-c", script]) as run:
        assert next(iter(run)).data == b"ready\n"
    session = run.session
    assert server.session(session.id).status is SessionStatus.RUNNING

    with client.attach(session.id) as attached:
        assert next(iter(attached)).data == b"ready\n"
        attached.signal(10)
        assert collect(attached) == b"caught\n"
        ended = attached.wait()

    assert ended.ended is not None
    assert ended.ended.exit_code == 9


def test_events_go_on_where_they_were_cut(server: FakeServer, client: Client) -> None:
    client.run(["true"]).wait()
    client.run(["true"]).wait()
    server.cut_after = 0

    stream = client.events(last_id=0)
    seen = [next(stream).id for _ in range(6)]
    stream.close() if hasattr(stream, "close") else None

    assert seen == [1, 2, 3, 4, 5, 6]


def test_single_files_are_read_in_parts_and_replaced(server: FakeServer, client: Client) -> None:
    session = client.create_session(SessionSpec())

    client.write_file(session.id, "/work/a b\udcff", b"0123456789", mode=0o600)

    assert client.read_file(session.id, "/work/a b\udcff") == b"0123456789"
    assert client.read_file(session.id, "/work/a b\udcff", start=2, length=3) == b"234"
    path = os.fsencode(server.folder) + b"/work/a b\xff"
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_the_token_shows_itself_nowhere(client: Client) -> None:
    assert TOKEN not in repr(vars(client))
    assert TOKEN not in repr(vars(client._transport))


def test_sessions_can_be_written_as_json(client: Client) -> None:
    session = client.run(["true"]).wait()

    assert to_builtins(session)["status"] == "TERMINATED"
    assert isinstance(session, Session)


def test_a_run_that_is_never_used_makes_no_session(server: FakeServer, client: Client) -> None:
    """Who is interrupted before the first word leaves nothing behind."""
    client.run_spec(SessionSpec(argv=("echo", "hi"))).close()

    assert client.is_healthy()
    assert server.jobs == {}
