# Shared by try.sh, test.sh and bench.sh; sourced, POSIX sh. Needs: root=REPOSITORY log=FILE

fail() { printf '\n✗ %s\n' "$1" >&2; exit 1; }

# step TEXT COMMAND…: run quietly with one line of progress; on failure show the log's end.
step() {
    _text=$1; shift
    _begin=$(date +%s)
    printf '· %s … ' "$_text"
    printf '\n== %s\n' "$_text" >>"$log"
    if "$@" >>"$log" 2>&1 </dev/null; then
        printf '✓ %ss\n' "$(($(date +%s) - _begin))"
        return
    fi
    printf '✗\n\n' >&2
    tail -n 40 "$log" >&2
    fail "$_text: failed. Everything that was printed: $log"
}

# packages NAME…: Debian packages that are missing; needs root only if there are any.
packages() {
    _missing=
    for _name; do
        dpkg-query -W -f '${Status}' "$_name" 2>/dev/null | grep -q 'ok installed' \
            || _missing="$_missing $_name"
    done
    [ -z "$_missing" ] && return
    [ "$(id -u)" = 0 ] || fail "As root: apt-get install$_missing"
    step 'read the list of packages' apt-get update
    # shellcheck disable=SC2086 # a list of words
    step "install$_missing" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends $_missing
}

# python_command: one that every user of the machine may execute; 3.11 to 3.13.
python_command() {
    for _python in /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 \
        /usr/bin/python3 "$(command -v python3)"; do
        [ -x "$_python" ] && "$_python" -c \
            'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null && { printf '%s' "$_python"; return; }
    done
    return 1
}

digest() { cat "$@" 2>/dev/null | sha256sum | cut -c1-16; }

# environment VENV REQUIREMENTS: a virtual environment with exactly those, checked by hash.
environment() {
    _venv=$1 _file=$2
    python_command >/dev/null || packages python3 python3-venv
    _python=$(python_command) || fail 'Python 3.11, 3.12 or 3.13 is needed; none was found.'
    _stamp="$("$_python" -V) $_venv $(digest "$_file")"
    [ "$(cat "$_venv/.requirements" 2>/dev/null)" = "$_stamp" ] && return
    rm -rf "$_venv"
    step "make a virtual environment with $_python" "$_python" -m venv "$_venv"
    step "install the dependencies ($(grep -c '==' "$_file") pinned packages)" \
        "$_venv/bin/python" -m pip install --require-hashes --disable-pip-version-check \
        --no-input --progress-bar off -r "$_file"
    printf '%s' "$_stamp" >"$_venv/.requirements"
}

# project VENV [OPTION]: Madang itself, from this folder, without fetching anything.
project() {
    _venv=$1; shift
    _stamp=$(find "$root/src" -name '*.py' -o -name '*.sql' -o -name '*.toml' | LC_ALL=C sort \
        | xargs sha256sum "$root/pyproject.toml" | digest -)
    [ "$*" = -e ] && _stamp="editable $(digest "$root/pyproject.toml")"
    [ "$(cat "$_venv/.project" 2>/dev/null)" = "$_stamp" ] && return
    step 'install Madang' "$_venv/bin/python" -m pip install --no-deps --no-build-isolation \
        --disable-pip-version-check --no-input --force-reinstall "$@" "$root"
    printf '%s' "$_stamp" >"$_venv/.project"
}
