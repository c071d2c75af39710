#!/bin/sh
# From a bare Debian 12 to a real training in an isolated session, and faster than a container.
#
#   ./try.sh          install what is missing, start Madang, train a model; again and again
#   ./try.sh --down   stop it and remove everything that this script made
#
# Everything lies in .try/ beside this file, except Debian packages where some were missing.
set -eu
began=$(pwd)
root=$(cd "$(dirname "$0")" && pwd)
home=$root/.try
log=$home/install.log
. "$root/scripts/common.sh"

state=$home/state
MADANG_CONFIG=$home/client.toml
XDG_CACHE_HOME=$home/cache
export MADANG_CONFIG XDG_CACHE_HOME

down() {
    if [ -x "$home/venv/bin/madang" ] && [ -d "$state" ]; then
        "$home/venv/bin/madang" down --state "$state" || fail 'Something could not be stopped.'
    fi
    rm -rf "$home"
    printf '✓ removed %s\n' "$home"
}

case "${1:-}" in
    '') ;;
    --down) down; exit 0 ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

mkdir -p "$home"
: >>"$log"
printf '== %s\n\n' 'Madang: one machine, from nothing to a running session'

packages ca-certificates e2fsprogs nftables
environment "$home/venv" "$root/requirements/runtime.txt"
project "$home/venv"
bin=$home/venv/bin

# A short way to type: `.try/madang ps`.
printf '#!/bin/sh\nMADANG_CONFIG=%s XDG_CACHE_HOME=%s exec %s "$@"\n' \
    "'$MADANG_CONFIG'" "'$XDG_CACHE_HOME'" "'$bin/madang'" >"$home/madang.new"
chmod +x "$home/madang.new"
mv "$home/madang.new" "$home/madang"
madang=$home/madang

# A server of an older installation is replaced; sessions would go on.
version=$(cat "$home/venv/.project")
if [ "$(cat "$home/started" 2>/dev/null)" != "$version" ] || ! "$madang" whoami >/dev/null 2>&1
then
    "$madang" down --state "$state" --keep-sessions >>"$log" 2>&1 || true
    "$madang" up -d --port 0 --state "$state" >"$home/up.out" || fail 'Madang could not be started.'
    sed '/^  next/d' "$home/up.out"
    printf '%s' "$version" >"$home/started"
fi

cd "$root/examples/digits"
wanted=$(digest requirements.txt)
if [ "$(cat "$home/image" 2>/dev/null)" != "$wanted" ] \
    || ! "$madang" image show digits >/dev/null 2>&1
then
    printf '\n== image «digits»: numpy, scikit-learn, pillow, each a read-only layer\n'
    "$madang" image build digits -r requirements.txt || fail 'The image could not be built.'
    printf '%s' "$wanted" >"$home/image"
fi

printf '\n== madang run --image digits --cpu 1 --mem 1g -- python train.py\n'
rm -rf "$home/outputs"
"$madang" run --image digits --cpu 1 --mem 1g --output "$home/outputs" -- python train.py \
    || fail 'The training did not succeed.'
cd "$began"
"$bin/python" "$root/scripts/summary.py" "$home"
