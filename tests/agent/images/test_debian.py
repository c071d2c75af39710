"""A Debian system from an archive: what is chosen, checked, and laid out."""

from __future__ import annotations

import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent.buildscript import debian
from madang.agent.buildscript.debian import Archive, DebianError, Package, Tree, choose

signs = pytest.mark.skipif(
    not (shutil.which("gpg") and shutil.which("gpgv")), reason="needs gnupg and gpgv"
)


SET = "set\n"


def package(name: str, **fields: str) -> Package:
    plain = {"Package": name, "Version": "1", "Architecture": "amd64", **fields}
    return Package(name, "1", "amd64", f"pool/{name}.deb", "", 1, plain)


def names(*packages: Package, wanted: tuple[str, ...] = ()) -> list[str]:
    return [each.name for each in choose(packages, wanted)]


def test_what_every_system_needs_and_what_that_needs() -> None:
    found = names(
        package("dpkg", Essential="yes", **{"Pre-Depends": "libc6 (>= 2), tar:any"}),
        package("libc6", Depends="libgcc | libother"),
        package("libgcc"), package("tar"), package("libother"), package("games"),
    )  # fmt: skip
    assert found == ["dpkg", "libc6", "tar", "libgcc"]


def test_what_is_provided_already_is_not_installed_twice() -> None:
    found = names(
        package("base-files", Essential="yes", **{"Pre-Depends": "awk"}),
        package("gawk", Provides="awk"),
        package("mawk", Provides="awk", Priority="required"),
    )
    assert found == ["base-files", "mawk"]


def test_a_merged_usr_is_taken_as_it_is() -> None:
    found = names(
        package("init", Essential="yes", Depends="usrmerge | usr-is-merged"),
        package("usrmerge", Depends="perl"), package("usr-is-merged"), package("perl"),
    )  # fmt: skip
    assert found == ["init", "usr-is-merged"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DebianError, match="init needs a or b"):
        names(package("init", Essential="yes", Depends="a | b"))
    with pytest.raises(DebianError, match="no package apt"):
        names(wanted=("apt",))


def tar_of(**files: Any) -> bytes:
    """Path → text, or (mode, text), or a link's target in a list; names with / by __."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:xz", format=tarfile.GNU_FORMAT) as tar:
        for name, value in files.items():
            info = tarfile.TarInfo("./" + name.replace("__", "/"))
            if isinstance(value, list):
                info.type, info.linkname = tarfile.SYMTYPE, value[0]
                tar.addfile(info)
                continue
            mode, text = value if isinstance(value, tuple) else (0o644, value)
            info.mode, info.size = mode, len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


def deb(control: bytes, data: bytes) -> bytes:
    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        return head.encode() + content + b"\n" * (len(content) % 2)

    parts = (("debian-binary", b"2.0\n"), ("control.tar.xz", control), ("data.tar.xz", data))
    return b"!<arch>\n" + b"".join(member(*part) for part in parts)


def test_a_package_is_unpacked_for_dpkg_to_configure(tmp_path: Path) -> None:
    control = tar_of(
        control="Package: x\nVersion: 1\n", conffiles="/etc/x\n", preinst=(0o755, "\x7fELF")
    )
    data = tar_of(
        bin__x=(0o4755, "#!"), lib__l=["x.so"], etc__x=SET, usr__share__man__man1__x="page",
        usr__share__doc__x__copyright="free",
    )  # fmt: skip
    tree = Tree(str(tmp_path))
    tree.add(package("x"), deb(control, data))

    assert (tmp_path / "usr/bin/x").stat().st_mode & 0o7777 == 0o4755
    assert (tmp_path / "lib/l").is_symlink()
    assert not (tmp_path / "usr/share/man").exists()
    assert (tmp_path / "usr/share/doc/x/copyright").read_text() == "free"
    info = tmp_path / "var/lib/dpkg/info"
    assert (info / "x.preinst").stat().st_mode & 0o777 == 0o755
    assert b"/bin/x\n" in (info / "x.list").read_bytes()
    digest = hashlib.md5(SET.encode(), usedforsecurity=False).hexdigest()
    said = f"Status: install ok unpacked\nVersion: 1\nConffiles:\n /etc/x {digest}\n"
    assert tree.status == [f"Package: x\n{said}"]


def test_no_package_writes_outside_of_its_tree(tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree = Tree(str(root))
    control = tar_of(control="Package: x\nVersion: 1\n")
    with pytest.raises(DebianError, match="a package names"):
        tree.add(package("x"), deb(control, tar_of(**{"a__..__..__..__evil": "x"})))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("raw", [b"", b"!<arch>\n", b"PK"])
def test_what_is_no_package_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(DebianError):
        Tree(str(tmp_path / "r")).add(package("x"), raw)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-gen-key", "test@example.org", "ed25519"], check=True)
    subprocess.run([*gpg, "--output", str(home / "ring.gpg"), "--export"], check=True)
    yield home
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)


def signed(keys: Path, text: str) -> bytes:
    gpg = ["gpg", "--homedir", str(keys), "--batch", "--quiet", "--passphrase", "", "--clearsign"]
    return subprocess.run(gpg, input=text.encode(), capture_output=True, check=True).stdout


@signs
def test_only_what_is_signed_is_believed(keys: Path) -> None:
    good = signed(keys, "Suite: x\n- dash\n")
    ring = str(keys / "ring.gpg")
    assert debian.verified(good, "x", ring) == "Suite: x\n- dash"
    for bad in (
        good.replace(b"Suite", b"Other"),
        b"Before: 1\n" + good,
        good + b"After: 1\n",
        good + good,
        b"Suite: x\n",
    ):
        with pytest.raises(DebianError, match="signed"):
            debian.verified(bad, "x", ring)


@signs
def test_packages_are_those_of_the_signed_index(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = lzma.compress(
        b"Package: x\nVersion: 1\nArchitecture: amd64\nFilename: p/x\nSHA256: 0\nSize: 5\n"
    )
    digest = hashlib.sha256(index).hexdigest()
    release = signed(keys, f"SHA256:\n {digest} {len(index)} main/binary-amd64/Packages.xz\n")
    monkeypatch.setattr(debian.verified, "__defaults__", (str(keys / "ring.gpg"),))
    packages = "m/dists/sid/main/binary-amd64/Packages.xz"
    files = {"m/dists/sid/InRelease": release, packages: index, "m/p/x": b"other"}
    archive = Archive("m/", "sid", "amd64", lambda url, most: files[url])
    (found,) = archive.packages()
    assert (found.name, found.size) == ("x", 5)
    with pytest.raises(DebianError, match="not what the index says"):
        archive.deb(found)
    files[packages] = index + b"x"
    with pytest.raises(DebianError, match="not what its index says"):
        archive.packages()


def test_a_suite_is_a_name() -> None:
    with pytest.raises(DebianError, match="no name of a suite"):
        Archive("m", "../x", "amd64")
