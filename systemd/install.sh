#!/bin/sh
# `make install` and `make uninstall`: the module, its environment and the units, on a Linux with systemd.
#
#   PREFIX    a directory of its own for module and environment (/opt/kimi-proxy)
#   UNITDIR   where the units go (/etc/systemd/system)
#   DESTDIR   all goes below this directory, for a package or a test; systemd is left alone then
#   DRY_RUN   if it is set, what would be done is printed, and nothing done
#   PYTHON    makes the environment (python3)
#
# Each file is written whole or not at all, and all may be done again at any time. Configuration is written only where
# there is none, and never removed; the state is not touched.
set -eu
umask 022 # the service's user has to read what root writes
cd "$(dirname "$0")/.."

PREFIX=${PREFIX:-/opt/kimi-proxy}
UNITDIR=${UNITDIR:-/etc/systemd/system}
DESTDIR=${DESTDIR:-}
DRY_RUN=${DRY_RUN:-}
PYTHON=${PYTHON:-python3}
CONFIG=/etc/kimi-proxy
STATE=/var/lib/kimi-proxy
UNITS="kimi-proxy.service kimi-proxy@.service kimi-proxy.socket"
VENV=$DESTDIR$PREFIX/venv

die() {
    echo "kimi-proxy: $*" >&2
    exit 1
}

run() {
    if [ -n "$DRY_RUN" ]; then
        echo "would run: $*"
    else
        "$@"
    fi
}

write() { # MODE FILE: standard input becomes the file
    if [ -n "$DRY_RUN" ]; then
        echo "would write: $2"
    else
        (umask 077 && cat > "$2.new")
        chmod "$1" "$2.new"
        mv -f "$2.new" "$2"
    fi
}

has_systemd() { # whether there is a running one that this is about
    [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

check() {
    for directory in "$PREFIX" "$UNITDIR"; do
        case $directory in
            *[!A-Za-z0-9/._+-]* | [!/]* | */ | *//* | */./* | */.. | */../*) die "$directory: not a plain absolute path" ;;
        esac
    done
    case $PREFIX/ in # ProtectHome and PrivateTmp
        /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*) die "PREFIX=$PREFIX: the service does not see what is there" ;;
        /opt/ | /usr/ | /usr/local/ | /srv/ | /var/ | /var/lib/ | /etc/*) die "PREFIX=$PREFIX: name a directory of its own" ;;
    esac
    if [ -z "$DESTDIR$DRY_RUN" ] && [ "$(id -u)" -ne 0 ]; then
        die "this needs root: sudo make $1"
    fi
}

# What has to be the same for an environment to go on being used: the version, the interpreter, and a working pip.
identify() {
    "$1" -c 'import os, sys, pip; print(sys.version_info[:2], os.path.realpath(sys.executable))' 2> /dev/null
}

install_all() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || die "Python 3.11 or later is needed; name it with: make install PYTHON=/usr/bin/python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null \
        || die "Python's venv is missing; on Debian and Raspberry Pi OS: sudo apt install python3-venv"
    case $("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
        /home/* | /root/*)
            home="PYTHON=$PYTHON is in a home directory, which the service does not see"
            [ -n "$DESTDIR$DRY_RUN" ] || die "$home; name another: make install PYTHON=/usr/bin/python3"
            echo "kimi-proxy: warning: $home" >&2
            ;;
    esac

    run mkdir -p "$DESTDIR$PREFIX/bin" "$DESTDIR$UNITDIR" "$DESTDIR${CONFIG%/*}"
    found=$(identify "$VENV/bin/python") || found=
    if [ -z "$found" ] || [ "$found" != "$(identify "$PYTHON")" ]; then
        run "$PYTHON" -m venv --clear "$VENV"
    fi
    run "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -r requirements.txt
    write 644 "$DESTDIR$PREFIX/kimi_proxy.py" < kimi_proxy.py
    # Compiled beforehand, since the service cannot write here: a quicker start, and 20 MB less at its peak.
    run "$VENV/bin/python" -m compileall -q --invalidation-mode checked-hash -s "$DESTDIR/" -p / \
        "$DESTDIR$PREFIX/kimi_proxy.py"
    sed "s|/opt/kimi-proxy|$PREFIX|g" systemd/kimi-proxy.sh | write 755 "$DESTDIR$PREFIX/bin/kimi-proxy"
    for unit in $UNITS; do
        sed "s|/opt/kimi-proxy|$PREFIX|g" "systemd/$unit" | write 644 "$DESTDIR$UNITDIR/$unit"
    done
    [ -d "$DESTDIR$CONFIG" ] || run mkdir -m 700 "$DESTDIR$CONFIG"
    [ -e "$DESTDIR$CONFIG/kimi-proxy.env" ] || write 600 "$DESTDIR$CONFIG/kimi-proxy.env" < systemd/kimi-proxy.env
    if has_systemd; then
        run systemctl daemon-reload
    fi
    [ -z "$DRY_RUN" ] || return 0

    echo "kimi-proxy is in $DESTDIR$PREFIX; its settings are in $DESTDIR$CONFIG."
    if [ -n "$DESTDIR" ]; then
        return
    elif has_systemd && systemctl --quiet is-active kimi-proxy.service 'kimi-proxy@*.service'; then
        echo "What runs is still the version before: systemctl restart kimi-proxy (or 'kimi-proxy@*')"
    else
        echo "To start it, now and with the machine: systemctl enable --now kimi-proxy.socket kimi-proxy.service"
    fi
}

uninstall_all() {
    if has_systemd; then
        run systemctl --quiet stop kimi-proxy.socket kimi-proxy.service 'kimi-proxy@*.service' || true
        run systemctl --quiet disable $UNITS 2> /dev/null || true
    fi
    for unit in $UNITS; do
        run rm -f "$DESTDIR$UNITDIR/$unit"
    done
    if [ -e "$VENV/pyvenv.cfg" ]; then # else it is not ours
        run rm -rf "$VENV"
    fi
    run rm -f "$DESTDIR$PREFIX/kimi_proxy.py" "$DESTDIR$PREFIX/bin/kimi-proxy" "$DESTDIR$PREFIX"/__pycache__/kimi_proxy.*.pyc
    for directory in "$DESTDIR$PREFIX/__pycache__" "$DESTDIR$PREFIX/bin" "$DESTDIR$PREFIX"; do
        [ ! -d "$directory" ] || run rmdir --ignore-fail-on-non-empty "$directory"
    done
    if has_systemd; then
        run systemctl daemon-reload
    fi
    echo "Left where they are: the configuration ($DESTDIR$CONFIG, and drop-ins in $DESTDIR$UNITDIR/kimi-proxy*.d)"
    echo "and the state ($DESTDIR$STATE, which is in $DESTDIR/var/lib/private/kimi-proxy)."
}

case ${1:-} in
    install | uninstall)
        check "$1"
        "$1_all"
        ;;
    *) die "use: install.sh install, or install.sh uninstall" ;;
esac
