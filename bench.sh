#!/bin/sh
# Measure: `name value unit`, then the reference (docker, runc, a bare process) and the ratio.
#
#   ./bench.sh [--json FILE] [NAME…]      ./bench.sh --help tells the names
#
# As root it installs Debian's docker.io, crun, runc, runsc, bubblewrap and wrk; it starts a docker
# daemon of its own.
set -eu
root=$(cd "$(dirname "$0")" && pwd)
cd "$root"
log=$root/.venv.log
: >"$log"
. scripts/common.sh

packages bubblewrap ca-certificates crun docker.io e2fsprogs iptables runc runsc util-linux wrk
environment "$root/.venv" requirements/dev.txt
project "$root/.venv" -e
exec "$root/.venv/bin/python" bench/main.py "$@"
