"""``madang run`` from outside: streams, exit codes, files, signals."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time

import pytest
from tests.cli.conftest import COMMAND, Cli

from madang.cli.root import print_error
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import BuildFailed
from madang.wire.session import SessionStatus


def test_program_output_alone_is_on_stdout_and_its_exit_code_is_ours(cli: Cli) -> None:
    done = cli.run("run", "--", "sh", "-c", "echo out; echo err >&2; exit 3")

    assert done.returncode == 3
    assert done.stdout == b"out\n"
    lines = done.stderr.decode().splitlines()
    assert "err" in lines
    assert lines[-1].startswith("failed exit 3 ")
    assert [line.split()[0] for line in lines if line != "err"] == ["plan", "start", "failed"]


def test_quiet_says_nothing_of_its_own(cli: Cli) -> None:
    done = cli.run("run", "-q", "--", "echo", "hi")

    assert (done.stdout, done.stderr) == (b"hi\n", b"")


def test_a_signal_becomes_128_and_its_number(cli: Cli) -> None:
    assert cli.run("run", "-q", "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_binary_output_survives(cli: Cli) -> None:
    data = os.urandom(500_000)

    assert cli.run("run", "-q", "--", "cat", input=data).stdout == data


def test_stdin_is_fed_only_from_pipes_or_when_asked(cli: Cli) -> None:
    assert cli.run("run", "-q", "--", "cat", input=b"piped").stdout == b"piped"
    assert cli.run("run", "-q", "--no-stdin", "--", "cat", input=b"piped").stdout == b""
    assert cli.run("run", "-q", "--", "cat").stdout == b""


def test_arguments_that_are_not_utf8_arrive(cli: Cli) -> None:
    assert cli.run("run", "-q", "--", "printf", "%s", b"a\xff").stdout == b"a\xff"


def test_options_of_the_program_are_not_ours(cli: Cli) -> None:
    assert cli.run("run", "-q", "echo", "--name", "-h").stdout == b"--name -h\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--image", "nope", "--", "true"], 122, "no image 'nope'"),
        (["--mem", "1e30", "--", "true"], 122, "is not a size"),
        (["--cpu", "0", "--", "true"], 122, "above zero"),
        (["--cpu", "-1", "--", "true"], 122, "above zero"),
        (["--time", "soon", "--", "true"], 122, "is not a duration"),
        (["--label", "x", "--", "true"], 122, "KEY=VALUE"),
        (["--nonsense", "--", "true"], 2, "No such option"),
    ],
)
def test_bad_input_is_told_in_words(cli: Cli, args: list[str], code: int, words: str) -> None:
    done = cli.run("run", *args)

    assert done.returncode == code
    assert words in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_no_server_is_told_with_the_next_step(cli: Cli) -> None:
    cli.env["MADANG_URL"] = "http://127.0.0.1:9"

    done = cli.run("run", "--", "true")

    assert done.returncode == 120
    assert b"madang up" in done.stderr


def test_a_wrong_token_is_told(cli: Cli) -> None:
    cli.env["MADANG_TOKEN"] = "wrong"

    done = cli.run("run", "--", "true")

    assert done.returncode == 121
    assert b"auth.missing" in done.stderr


def test_the_working_directory_is_sent_once(cli: Cli) -> None:
    (cli.project / "train.py").write_text("print(1)")
    os.utime(cli.project / "train.py", (1, 1))

    first = cli.run("run", "--", "true")
    cli.run("run", "--", "true")

    assert b"1 file, 8 B (1 sent)" in first.stderr
    assert list(cli.server.blobs.values()) == [b"print(1)"]


def test_a_server_that_forgot_the_working_directory_gets_it_again(cli: Cli) -> None:
    (cli.project / "a").write_text("x")
    cli.run("run", "--", "true")
    cli.server.manifests.clear()
    cli.server.blobs.clear()

    assert cli.run("run", "--", "true").returncode == 0
    assert len(cli.server.blobs) == 1


def test_an_empty_folder_and_no_sync_make_no_call(cli: Cli) -> None:
    cli.run("run", "--", "true")
    (cli.project / "a").write_text("x")
    cli.run("run", "--no-sync", "--", "true")

    assert "POST /v1/workspaces" not in cli.server.requests


def test_the_home_folder_is_not_sent_by_accident(cli: Cli) -> None:
    cli.env["HOME"] = str(cli.project)
    (cli.project / "private").write_text("x")

    done = cli.run("run", "--", "true")

    assert done.returncode == 0
    assert b"your home folder, so it is not sent" in done.stderr
    assert cli.server.blobs == {}


def test_a_working_directory_that_is_too_large_is_refused(cli: Cli) -> None:
    (cli.project / "data").mkdir()
    (cli.project / "data/big").write_bytes(b"x" * 200_000)

    done = cli.run("run", "--sync-limit", "100k", "--", "true")

    assert done.returncode == 122
    assert b"data (195.3 KiB)" in done.stderr
    assert cli.server.jobs == {}


def test_outputs_come_back_and_are_never_sent(cli: Cli) -> None:
    script = "mkdir -p ../outputs/deep; echo saved > ../outputs/deep/model"
    done = cli.run("run", "--name", "first-run", "--", "sh", "-c", script)

    assert (cli.project / "runs/first-run/deep/model").read_text() == "saved\n"
    assert b"saved  runs/first-run/ (1 file, 6 B)" in done.stderr
    assert (cli.project / "runs/.gitignore").read_text() == "*\n"
    cli.run("run", "--", "true")
    assert cli.server.blobs == {}
    assert "POST /v1/workspaces" not in cli.server.requests


def test_outputs_go_where_they_are_asked_to_or_nowhere(cli: Cli) -> None:
    script = "echo x > ../outputs/file"
    cli.run("run", "--output", "here", "--", "sh", "-c", script)
    cli.run("run", "--no-output", "--", "sh", "-c", script)

    assert (cli.project / "here/file").read_text() == "x\n"
    assert not (cli.project / "runs").exists()


def test_detached_runs_print_their_name_alone(cli: Cli) -> None:
    done = cli.run("run", "-d", "--name", "quiet-owl", "--", "sleep", "30")

    assert done.stdout == b"quiet-owl\n"
    assert cli.server.session("quiet-owl").status is not SessionStatus.TERMINATED


def test_a_dry_run_starts_nothing(cli: Cli) -> None:
    done = cli.run("run", "--dry-run", "--cpu", "0.5", "--mem", "512m", "--", "true")

    assert b"0.5 CPU" in done.stdout
    assert b"512 MiB memory" in done.stdout
    assert cli.server.jobs == {}


def test_json_gives_the_session_at_the_end(cli: Cli) -> None:
    done = cli.run("run", "--json", "--", "echo", "hi")

    assert done.stdout == b"hi\n"
    assert json.loads(done.stderr)["ended"]["exit_code"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_without_a_terminal_signals_detach_and_say_so(cli: Cli, number: signal.Signals) -> None:
    process = cli.start("run", "--name", "calm-otter", "--", "sh", "-c", "echo up; sleep 30")
    assert process.stdout is not None
    assert process.stdout.read(3) == b"up\n"

    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == (119 if number == signal.SIGINT else 128 + number)
    assert b"calm-otter goes on" in err
    assert cli.server.session("calm-otter").status is SessionStatus.RUNNING


def test_who_leaves_before_the_first_word_is_told_the_session_s_name(cli: Cli) -> None:
    cli.server.thinks_s = 1.0
    process = cli.start("run", "--name", "calm-otter", "--", "sleep", "30")
    deadline = time.monotonic() + PATIENCE_S
    while not cli.server.jobs and time.monotonic() < deadline:
        time.sleep(0.01)

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 119
    assert b"calm-otter goes on" in err


def test_a_reader_that_leaves_ends_the_command_but_not_the_session(cli: Cli) -> None:
    process = cli.start("run", "--name", "calm-otter", "--", "sh", "-c", "yes; sleep 30")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()

    assert process.wait(PATIENCE_S) == 141
    assert process.stderr is not None
    with process.stderr:
        assert b"calm-otter goes on" in process.stderr.read()


def test_a_restart_of_the_server_is_told_and_survived(cli: Cli) -> None:
    process = cli.start("run", "--", "sh", "-c", "echo up; sleep 1; echo end")
    assert process.stdout is not None
    assert process.stdout.read(3) == b"up\n"

    cli.server.stop()
    cli.server.start()
    out, err = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, out) == (0, b"end\n")
    assert b"Trying again" in err


def test_the_session_that_waits_says_for_what_and_can_be_stopped(cli: Cli) -> None:
    cli.server.hold.clear()
    process = cli.start("run", "--name", "calm-otter", "--", "true")
    while "calm-otter" not in {job.session.name for job in list(cli.server.jobs.values())}:
        assert process.poll() is None

    stopped = cli.run("stop", "calm-otter")
    _, err = process.communicate(timeout=PATIENCE_S)

    assert stopped.returncode == 0
    assert process.returncode == 143
    assert b"stopped before it began" in err


def test_logs_are_limited_stamped_and_apart(cli: Cli) -> None:
    script = "echo 1; echo 2; echo 3; echo e >&2; printf 4"
    cli.run("run", "--name", "log-cat", "--", "sh", "-c", script)

    assert cli.run("logs", "log-cat", "--stdout").stdout == b"1\n2\n3\n4"
    assert cli.run("logs", "log", "--stdout", "--tail", "2").stdout == b"3\n4"
    assert cli.run("logs", "log", "--tail", "0").stdout == b""
    only = cli.run("logs", "log", "--stderr")
    assert (only.stdout, only.stderr) == (b"", b"e\n")
    stamped = cli.run("logs", "log", "--stdout", "--timestamps").stdout.splitlines()
    assert all(b"Z " in line for line in stamped)
    assert cli.run("logs", "log", "--since", "0").returncode == 122
    parts = cli.run("logs", "log", "--json").stdout.splitlines()
    assert {json.loads(part)["stream"] for part in parts} == {"stdout", "stderr"}


def test_followed_logs_end_with_the_session(cli: Cli) -> None:
    cli.run("run", "-d", "--name", "log-cat", "--", "sh", "-c", "echo a; sleep 0.3; echo b")

    assert cli.run("logs", "-f", "log-cat").stdout == b"a\nb\n"


def test_sessions_are_listed_shown_stopped_and_removed(cli: Cli) -> None:
    cli.run("run", "-d", "--name", "one-owl", "--", "sleep", "30")
    cli.run("run", "--name", "two-owls", "--", "sh", "-c", "exit 4")

    assert b"one-owl" in cli.run("ps").stdout
    assert b"two-owls" not in cli.run("ps").stdout
    assert b"failure (4)" in cli.run("ps", "--all").stdout
    assert {s["name"] for s in json.loads(cli.run("ps", "-a", "--json").stdout)["items"]} == {
        "one-owl",
        "two-owls",
    }
    shown = cli.run("show", "two").stdout
    assert b"exit 4" in shown
    assert b"history" in shown
    assert b"one-owl" in cli.run("top", "--once").stdout
    assert cli.run("stop", "one-owl", "nothing").returncode == 122
    assert cli.server.session("one-owl").status is SessionStatus.TERMINATED
    assert cli.run("rm", "--all-ended").returncode == 0
    assert cli.server.jobs == {}
    assert cli.run("rm").returncode == 2


def test_sessions_are_frozen_and_thawed_by_name_and_prefix(cli: Cli) -> None:
    for name in ("one-owl", "two-owls"):
        cli.run("run", "-d", "--name", name, "--", "sleep", "30")

    done = cli.run("freeze", "one", "two-owls")
    assert (done.returncode, done.stdout) == (0, b"one-owl frozen 0s\ntwo-owls frozen 0s\n")
    assert b"frozen" in cli.run("ps").stdout
    assert b"frozen" in cli.run("top", "--once").stdout
    shown = cli.run("show", "one").stdout
    assert b"running" in shown
    assert b"madang thaw one-owl" in shown
    assert cli.run("thaw", "one-owl").stdout == b"one-owl running\n"
    (found,) = json.loads(cli.run("thaw", "two", "--json").stdout)
    assert (found["name"], found["frozen_since"]) == ("two-owls", None)
    cli.run("stop", "one-owl")
    refused = cli.run("freeze", "one-owl", "two-owls")
    assert refused.returncode != 0
    assert b"one-owl is TERMINATED" in refused.stderr
    assert refused.stdout == b"two-owls frozen 0s\n"


def test_exec_gives_output_and_exit_code(cli: Cli) -> None:
    cli.run("run", "-d", "--name", "host-owl")

    done = cli.run("exec", "host-owl", "--", "sh", "-c", "cat; exit 4", input=b"in")

    assert (done.returncode, done.stdout) == (4, b"in")
    assert cli.run("exec", "host-owl", "--").returncode == 2
    assert cli.run("shell", "host-owl", input=b"echo from the shell\n").stdout == (
        b"from the shell\n"
    )


def test_files_are_put_listed_and_got_as_cp_does_it(cli: Cli) -> None:
    cli.run("run", "-d", "--name", "file-owl")
    (cli.project / "data").mkdir()
    (cli.project / "data/a").write_text("a")
    (cli.project / "b").write_text("b")

    assert cli.run("put", "data", "b", "file-owl:").returncode == 0
    assert cli.run("put", "b", "file-owl:c").returncode == 0
    assert cli.run("get", "file-owl:c", "here").returncode == 0
    assert cli.run("get", "file-owl:data", "copy").returncode == 0
    listed = cli.run("ls", "file-owl:").stdout.decode()

    assert (cli.project / "here").read_text() == "b"
    assert (cli.project / "copy/a").read_text() == "a"
    assert [line.split()[-1] for line in listed.splitlines()[1:]] == ["b", "c", "data/"]
    assert cli.run("get", "file-owl:nothing").returncode == 122
    assert cli.run("put", "missing", "file-owl:").returncode == 122
    assert cli.run("get", "nowhere").returncode == 122


def test_an_image_is_built_with_its_log_live(cli: Cli) -> None:
    (cli.project / "req.txt").write_text("# ours\nnumpy\nscipy==1.0 # why\n\n")

    done = cli.run("image", "build", "img", "--pip", "six", "-r", "req.txt")

    assert done.returncode == 0
    assert done.stdout == b"resolve\nlayer\n"
    assert cli.server.images["img"].requirements == ("six", "numpy", "scipy==1.0")
    assert b"img" in cli.run("image", "ls").stdout
    assert b"python" in cli.run("image", "show", "img").stdout
    assert cli.run("image", "rm", "img").returncode == 0
    assert cli.server.images == {}


def test_a_failed_build_and_ctrl_c_in_one_are_told(cli: Cli) -> None:
    failed = cli.run("image", "build", "img", "--pip", "x", "--label", "CODE=3")
    process = cli.start("image", "build", "img", "--pip", "x", "--label", "SLEEP=30")
    assert process.stdout is not None
    assert process.stdout.readline() == b"resolve\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)

    assert failed.returncode == 122
    assert b"was not built" in failed.stderr
    assert process.returncode == 122
    assert b"was not built" in err
    assert all(s.session.status is SessionStatus.TERMINATED for s in cli.server.jobs.values())


def test_requirement_files_with_options_are_refused(cli: Cli) -> None:
    (cli.project / "req.txt").write_text("-e .\n")

    done = cli.run("image", "build", "img", "-r", "req.txt")

    assert done.returncode == 122
    assert b"option of pip" in done.stderr


def test_login_keeps_the_token_for_its_owner_alone(cli: Cli) -> None:
    del cli.env["MADANG_URL"], cli.env["MADANG_TOKEN"]

    done = cli.run("login", cli.server.url, "--token-stdin", input=b"mdg_test\n")

    assert done.returncode == 0, done.stderr
    file = cli.project.parent / "home/.config/madang/client.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"admin" in cli.run("whoami").stdout
    wrong = cli.run("login", cli.server.url, "--token-stdin", input=b"wrong\n")
    assert wrong.returncode == 121
    assert b"admin" in cli.run("whoami").stdout


def test_a_wrong_setting_names_the_file(cli: Cli) -> None:
    file = cli.project / "client.toml"
    file.write_text('urll = "x"\n')
    cli.env["MADANG_CONFIG"] = str(file)

    done = cli.run("ps")

    assert done.returncode == 122
    assert b"unknown setting 'urll'" in done.stderr


def test_explanations_need_no_server(cli: Cli) -> None:
    cli.env["MADANG_URL"] = "http://127.0.0.1:9"

    assert b"image ls" in cli.run("explain", "image.unknown").stdout
    assert b"120" in cli.run("explain", "exit-codes").stdout
    assert b"Do you mean exit-codes" in cli.run("explain", "exit_codes").stderr
    assert b"time limit" in cli.run("explain", "124").stdout
    assert b"SIGKILL" in cli.run("explain", "137").stdout
    assert cli.run("explain", "999").returncode == 122
    assert b"Do you mean image.unknown" in cli.run("explain", "image.unknwn").stderr
    assert len(json.loads(cli.run("explain", "--json").stdout)) > 20


def test_a_mistyped_command_gets_a_suggestion(cli: Cli) -> None:
    done = cli.run("runn", "--", "true")

    assert done.returncode == 2
    assert b"Do you mean `madang run`" in done.stderr


def test_every_command_explains_itself(cli: Cli) -> None:
    from madang.cli.root import COMMANDS

    shown = cli.run("--help").stdout.decode()
    for name in COMMANDS:
        assert f"  {name}" in shown
    for name in ("run", "logs", "up", "image"):
        assert cli.run(name, "--help").returncode == 0


def test_a_closed_stdout_gives_no_traceback(cli: Cli) -> None:
    process = cli.start("explain")
    assert process.stdout is not None
    process.stdout.close()

    assert process.wait(PATIENCE_S) == 141
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""


def test_closed_standard_streams_do_no_harm(cli: Cli) -> None:
    shell = 'exec <&- >&-; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *COMMAND, "run", "-i", "--", "cat"],
        cwd=cli.project,
        env=cli.env,
        stderr=subprocess.PIPE,
        check=False,
        timeout=30,
    )

    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_what_others_wrote_does_not_steer_the_terminal(cli: Cli) -> None:
    cli.run("run", "--name", "bad-owl", "--label", "a=\x1b[2J", "--", "true", "\x1b]0;x")

    for command in (("ps", "-a"), ("show", "bad-owl")):
        assert b"\x1b" not in cli.run(*command).stdout


def test_the_shell_can_complete_commands(cli: Cli) -> None:
    cli.env |= {"_MADANG_COMPLETE": "bash_complete", "COMP_WORDS": "madang lo", "COMP_CWORD": "1"}

    assert cli.run().stdout.split() == [b"plain,logs", b"plain,login", b"plain,logout"]


@pytest.mark.parametrize("command", [("run", "-q", "--", "echo", "hi"), ("ps",), ("explain",)])
def test_a_full_disk_below_stdout_is_told_without_traceback(
    cli: Cli, command: tuple[str, ...]
) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *command],
            cwd=cli.project,
            env=cli.env,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=30,
        )

    assert done.returncode == 125
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_outputs_that_find_no_room_are_told_even_when_quiet(cli: Cli) -> None:
    script = "echo x > ../outputs/file"
    done = cli.run("run", "-q", "--output", "/proc/x", "--", "sh", "-c", script)

    assert b"error  the outputs could not all be brought back: /proc/x" in done.stderr
    assert b"They are kept: madang get" in done.stderr


def test_an_error_s_words_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """They may hold what a session or an image's packages chose."""
    print_error(BuildFailed("x\x1b]0;title\x07 failed:\nno \x9b2J"))

    assert capsys.readouterr().err.startswith("error: x�]0;title� failed:\nno �2J\n")
