"""Which index a build uses follows from how the server's pip and uv are set up."""

from __future__ import annotations

from pathlib import Path

import pytest

from madang.agent import debian
from madang.agent.registry import Registry, registry


def _environment(found: Registry) -> dict[str, str]:
    return {name: secret.reveal() for name, secret in found.environment.items()}


def test_without_settings_no_host_is_exempt(tmp_path: Path) -> None:
    found = registry({"HOME": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"})
    assert found.hosts == frozenset()
    assert _environment(found) == {}


@pytest.mark.parametrize(
    ("variables", "index"),
    [
        (
            {"UV_DEFAULT_INDEX": "https://a/simple", "PIP_INDEX_URL": "https://b"},
            "https://a/simple",
        ),
        ({"UV_INDEX_URL": "https://b/simple"}, "https://b/simple"),
        ({"PIP_INDEX_URL": "http://c:3141/root"}, "http://c:3141/root"),
    ],
)
def test_the_index_of_the_environment_wins(
    tmp_path: Path, variables: dict[str, str], index: str
) -> None:
    found = registry({"HOME": str(tmp_path), **variables})
    assert _environment(found)["UV_DEFAULT_INDEX"] == index
    assert len(found.hosts) == 1


def test_pips_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text(
        "[global]\nindex-url = https://mirror:8443/simple\n"
        "extra-index-url = file:///opt/x\n  https://extra/simple\n"
    )
    found = registry({"HOME": str(tmp_path)})
    assert _environment(found) == {
        "UV_DEFAULT_INDEX": "https://mirror:8443/simple",
        "UV_INDEX": "https://extra/simple",
    }
    assert found.hosts == {("mirror", 8443), ("extra", 443)}


def test_folders_and_file_addresses_are_left_out(tmp_path: Path) -> None:
    variables = {"UV_DEFAULT_INDEX": "file:///srv/simple", "UV_INDEX": "/srv corp=https://h/s"}
    found = registry({"HOME": str(tmp_path), **variables})
    assert _environment(found) == {"UV_INDEX": "corp=https://h/s"}
    assert ("h", 443) in found.hosts


def test_a_damaged_pip_configuration_does_not_stop_builds(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_bytes(b"\xff no section\n")
    variables = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    assert registry(variables).hosts == frozenset()


def test_passwords_are_known_but_not_shown(tmp_path: Path) -> None:
    variables = {
        "UV_DEFAULT_INDEX": "https://me:p%40ss@h/simple",
        "UV_INDEX_CORP_PASSWORD": "other",
    }
    found = registry({"HOME": str(tmp_path), **variables})
    assert {secret.reveal() for secret in found.secrets} == {"p%40ss", "p@ss", "other"}
    assert "p%40ss" not in repr(found)
    assert "UV_INDEX_CORP_PASSWORD" in found.environment


def test_the_operators_certificates_come_along(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("authority")
    found = registry({"HOME": str(tmp_path), "SSL_CERT_FILE": str(bundle)})
    assert found.certificates == "authority"


def test_the_sites_proxy_is_read_from_the_environment(tmp_path: Path) -> None:
    variables = {"https_proxy": "http://me:pw@gate:3128", "NO_PROXY": "localhost, .corp.example"}
    found = registry({"HOME": str(tmp_path), **variables}).upstream
    assert found is not None
    assert (found.host, found.port) == ("gate", 3128)
    assert found.authorization is not None
    assert found.authorization.reveal() == "Basic bWU6cHc="
    assert found.serves("index.example")
    assert not found.serves("index.corp.example")
    assert not found.serves("localhost")
    assert registry({"HOME": str(tmp_path)}).upstream is None


@pytest.mark.parametrize(
    "text",
    [
        "deb [signed-by=/k.gpg] http://m.example.org/debian bookworm main\n",
        "Types: deb\nURIs: http://m.example.org/debian/\nSuites: bookworm\n",
    ],
)
def test_the_mirror_of_debian_is_the_machine_s(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.list").write_text("deb http://other.example.org/ubuntu x main\n")
    (tmp_path / "b.list").write_text(text)
    patterns = [f"{tmp_path}/*.list"]
    found = registry(debian.with_mirror({"HOME": str(tmp_path)}, patterns))
    assert _environment(found)["DEBIAN_MIRROR"] == "http://m.example.org/debian"
    assert ("m.example.org", 80) in found.hosts
    named = debian.with_mirror({"DEBIAN_MIRROR": "http://own.example.org/debian"}, patterns)
    assert named["DEBIAN_MIRROR"] == "http://own.example.org/debian"
