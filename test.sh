#!/bin/sh
# Format, lint, types, import contracts, tests, documentation: from a bare Debian 12 on.
#
#   ./test.sh [--fast | --full] [PYTEST ARGUMENT…]
#
# --fast leaves out what takes long (tests marked slow, the documentation); --full installs every
# language that Debian has for the matrix, which is skipped otherwise for what is not there.
set -eu
root=$(cd "$(dirname "$0")" && pwd)
cd "$root"
log=$root/.venv.log
: >"$log"
. scripts/common.sh

fast= full=
case ${1:-} in
--fast) fast=1; shift ;;
--full) full=1; shift ;;
esac

# Tests use the real thing: PostgreSQL, file systems, languages, OCI runtimes, Docker, a registry of
# images, Debian's own packages, a browser, a firewall.
registry=$(command -v docker-registry || true)
packages busybox-static ca-certificates chromium crun debian-archive-keyring docker-registry \
    docker.io e2fsprogs gcc gnupg gpgv iproute2 libc6-dev lua5.4 nftables nodejs \
    openjdk-17-jre-headless php-cli postgresql python3-matplotlib python3-numpy r-base-core runc \
    runsc uidmap zstd
# Debian's package starts a registry for everybody; tests start their own.
if [ -z "$registry" ] && [ -d /run/systemd/system ]; then
    systemctl disable --now docker-registry >>"$log" 2>&1 || true
fi
[ -z "$full" ] || packages g++ ghc golang-go libmono-system-core4.0-cil mono-mcs mono-runtime \
    node-typescript octave openjdk-17-jdk-headless ruby rustc
environment "$root/.venv" requirements/dev.txt
project "$root/.venv" -e
# The real Jupyter, which tests drive from outside.
if [ -z "$fast" ]; then
    environment "$root/.venv-jupyter" requirements/jupyter.txt
    project "$root/.venv-jupyter" -e
fi

bin=$root/.venv/bin
failed=
check() {
    _name=$1; shift
    printf '\n== %s\n' "$_name"
    "$@" || failed="$failed $_name,"
}

check format "$bin/ruff" format --check .
check lint "$bin/ruff" check .
check types "$bin/mypy"
check imports "$bin/lint-imports"
if [ -z "$fast" ] && [ -f docs/conf.py ]; then
    check documentation "$bin/sphinx-build" -W -q -b html docs "$root/docs/_build/html"
fi
set -- "$@"
[ -z "$fast" ] || set -- -m 'not slow' "$@"
check tests "$bin/python" scripts/contained.py "$bin/python" -m pytest -n 2 --dist worksteal "$@"

if [ -n "$failed" ]; then
    printf '\n✗ test.sh: failed:%s\n' " ${failed# }" | sed 's/,$//'
    exit 1
fi
printf '\n✓ test.sh: everything passed\n'
