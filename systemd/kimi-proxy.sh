#!/bin/sh
# `kimi-proxy setup`, `check` and `ask`: kimi_proxy's own commands, with the settings and secrets of its service.
# `setup` runs as root, as it writes them; `check` shares the service's user and state; `ask` runs as the one who called
# sudo, whose files it may be given.
set -eu
case ${1:-} in
    check) as="-p DynamicUser=yes -p User=kimi-proxy -p StateDirectory=kimi-proxy -p StateDirectoryMode=0700" ;;
    ask) as="-p User=${SUDO_USER:-root} --same-dir" ;;
    setup) as= ;;
    *)
        echo "use: kimi-proxy setup, kimi-proxy check, or kimi-proxy ask \"question\"; each tells more with --help" >&2
        exit 2
        ;;
esac
if [ "$(id -u)" -ne 0 ]; then
    echo "kimi-proxy: this needs root, to read the service's secrets: sudo $0 $1" >&2
    exit 1
fi
if [ "$1" = setup ]; then
    cd /etc/kimi-proxy # where the service takes a token file from
    exec /opt/kimi-proxy/venv/bin/python /opt/kimi-proxy/kimi_proxy.py "$@" --env-file /etc/kimi-proxy/kimi-proxy.env
fi
for word; do # systemd would put variables in place of $NAME
    set -- "$@" "$(printf '%s' "$word" | sed 's/\$/$$/g')"
    shift
done
command=$1
shift
# shellcheck disable=SC2086 # $as is several words
exec systemd-run --quiet --collect --wait --pty --pipe $as -p UMask=0077 \
    -p EnvironmentFile=-/etc/kimi-proxy/kimi-proxy.env \
    -p LoadCredential=token:/etc/kimi-proxy/token -p 'SetCredential=token:\n' \
    -p LoadCredential=keys:/etc/kimi-proxy/keys -p 'SetCredential=keys:\n' \
    /opt/kimi-proxy/venv/bin/python /opt/kimi-proxy/kimi_proxy.py "$command" --env-file /dev/null "$@"
