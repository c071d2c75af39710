"""Settings: where they come from, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from madang.daemon import config
from madang.wire.errors import ConfigInvalid


def load(text: str = "", folder: Path | None = None, **more: object) -> config.Configuration:
    path = None
    if folder is not None:
        file = folder / "madang.toml"
        file.write_text(text)
        path = str(file)
    flags = {"server.state": "/tmp/x"} | dict(more.pop("flags", {}))  # type: ignore[call-overload]
    environment = more.pop("environment", {})
    return config.load(path=path, flags=flags, environment=environment)  # type: ignore[arg-type]


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    text = '[defaults]\ncpu = 2\nmem = "3g"\ntime = "2h"\n[server]\nport = 1111\n'
    found = load(
        text,
        tmp_path,
        environment={"MADANG_SERVER_PORT": "2222", "MADANG_DEFAULTS_CPU": "0.5"},
        flags={"server.port": 3333, "server.host": None},
    )

    assert found.settings.server.port == 3333
    assert found.settings.defaults.cpu == 0.5
    assert found.settings.defaults.mem_bytes == 3 * 1024**3
    assert found.settings.defaults.time_s == 7200
    assert found.settings.server.host == "127.0.0.1"
    origins = {line.name: line.origin for line in found.shown()}
    assert origins["server.port"] == "flag"
    assert origins["defaults.cpu"] == "MADANG_DEFAULTS_CPU"
    assert origins["defaults.mem"] == str(tmp_path / "madang.toml")
    assert origins["server.host"] == "default"


def test_every_setting_has_a_meaning_and_a_shown_value() -> None:
    for line in load().shown():
        assert len(line.meaning) > 5, line.name
        assert line.variable.startswith("MADANG_")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server]\nprot = 1\n", "server.port"),
        ("[servr]\nport = 1\n", "server.port"),
        ("port = 1\n", "server.port"),
        ("[server]\nport = 70000\n", "65535"),
        ("[server]\nport = true\n", "wrong type"),
        ("[server]\nport = -1\n", "out of range"),
        ("[server]\nlog_level = 'loud'\n", "debug, info"),
        ("[defaults]\nmem = 'much'\n", "not a size"),
        ("[defaults]\ntime = '1e30'\n", "not a duration"),
        ("[defaults]\ncpu = 0\n", "out of range"),
        ("[defaults]\ncpu = nan\n", "out of range"),
        ("[server\n", "can't be read"),
        ('[server]\nstate = "a\\u0000b"\n', "NUL"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(text, tmp_path, flags={"server.state": None})
    assert says in caught.value.text


def test_a_misspelt_variable_is_refused_but_the_clients_are_not_ours() -> None:
    load(environment={"MADANG_URL": "x", "MADANG_TOKEN": "y", "MADANG_CONFIG": "z"})
    with pytest.raises(ConfigInvalid, match="Did you mean MADANG_NODE_SLOTS"):
        load(environment={"MADANG_NODE_SLOT": "3"})


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no such file"):
        config.load(path=str(tmp_path / "none.toml"), environment={})


def test_a_password_is_not_shown() -> None:
    found = load(environment={"MADANG_DATABASE_URL": "postgresql://me:s3cret@host/name"})
    assert "s3cret" not in "".join(line.value for line in found.shown())
    assert found.settings.database.url.endswith("s3cret@host/name")


def test_lists_and_nothing_can_be_said(tmp_path: Path) -> None:
    found = load('[node]\nhost_paths = ["/a", "/b"]\n[defaults]\ntime = "none"\n', tmp_path)
    assert found.settings.node.host_paths == ("/a", "/b")
    assert found.settings.defaults.time_s is None
    assert load(environment={"MADANG_NODE_HOST_PATHS": "/a:/b"}).settings.node.host_paths == (
        "/a",
        "/b",
    )


def test_only_rules_that_nothing_stands_on_can_be_widened(tmp_path: Path) -> None:
    found = load('[sandbox]\nwiden = ["perf"]\naccept_unkept = true\n', tmp_path)
    assert found.settings.sandbox.widen == ("perf",)
    assert found.settings.sandbox.accept_unkept
    for name in ("io-uring", "clone3", "no-such"):
        with pytest.raises(ConfigInvalid, match=name):
            load(f'[sandbox]\nwiden = ["{name}"]\n', tmp_path)


def test_networks_are_set_in_words_and_checked(tmp_path: Path) -> None:
    text = """
[network]
modes = ["none", "allow"]
addresses = "10.99.0.0/16"
forbidden = []
resolvers = ["192.0.2.53", "2001:db8::53"]
bandwidth = "1.5gbit"
"""
    found = load(text, tmp_path).settings.network
    assert found.modes == ("none", "allow") and found.forbidden == ()
    assert found.bandwidth_bits == 1_500_000_000
    assert load("", tmp_path).settings.network.modes == ("none",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('modes = ["host"]', "'host' is none of none, allow, full"),
        ('addresses = "10.1.2.3/16"', "does not begin where its range does"),
        ('addresses = "10.0.0.0/30"', "no range of /8 to /28"),
        ('addresses = "fd00::/8"', "no IPv4"),
        ('forbidden = ["intranet"]', "no IPv4"),
        ('resolvers = ["dns.example"]', "no address of a name server"),
        ('bandwidth = "10MB"', "bits/s"),
    ],
)
def test_a_network_setting_that_makes_no_sense_is_named(
    tmp_path: Path, line: str, words: str
) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        load(f"[network]\n{line}\n", tmp_path)
