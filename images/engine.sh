#!/bin/sh
# A Docker daemon and a base image for `make test-containers`, where there is none yet.
#   engine.sh start        a daemon that answers: the one there is, or (as root) one installed and started
#   engine.sh base NAME    NAME: Debian 12 with Python 3.11, made with debootstrap (as root)
#   engine.sh stop         stops the daemon that `start` started; what it built is kept
# State and log of that daemon are in $DFLASH_CACHE/docker, else ~/.cache/dflash-plugin/docker.
set -eu
state=${DFLASH_CACHE:-$HOME/.cache/dflash-plugin}/docker

say() { echo "$0: $*" >&2; }
answers() { docker info >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -ne 0 ]; then
        say "$1 needs root; run it as root, or give this user a Docker daemon"
        exit 1
    fi
}

# install COMMAND PACKAGE
install() {
    command -v "$1" >/dev/null && return
    as_root "installing $2"
    if ! command -v apt-get >/dev/null; then
        say "no $1, and no apt-get to install $2 with"
        exit 1
    fi
    say "installing $2"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends "$2" >&2
}

start() {
    answers && return
    install dockerd docker.io
    as_root "starting dockerd"
    mkdir -p "$state"
    say "starting dockerd; its log is $state/dockerd.log"
    setsid dockerd --pidfile "$state/dockerd.pid" >"$state/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 60); do
        answers && return
        sleep 1
    done
    say "dockerd does not answer after 60 s:"
    tail -n 5 "$state/dockerd.log" >&2
    exit 1
}

base() {
    docker image inspect "$1" >/dev/null 2>&1 && return
    install debootstrap debootstrap
    as_root debootstrap
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    say "making $1 with debootstrap (minutes)"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$folder" >"$folder.log" 2>&1 || {
        tail -n 5 "$folder.log" >&2
        exit 1
    }
    rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
    tar -C "$folder" -c . | docker import - "$1" >/dev/null
    rm -f "$folder.log"
}

stop() {
    [ -f "$state/dockerd.pid" ] || return 0
    pid=$(cat "$state/dockerd.pid")
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
}

case ${1:-} in
start | stop) "$1" ;;
base) base "${2:?NAME}" ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
