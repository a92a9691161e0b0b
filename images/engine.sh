#!/bin/sh
# A Docker daemon and a base image for cells in containers, where there is none yet.
#   engine.sh start   a daemon that answers: the one there is, or (as root) one started here
#   engine.sh base    prints what DFLASH_IMAGE_BASE has to be: nothing where the registry gives the
#                     base, else the name of one made with debootstrap (Debian 12, Python 3.11; as root)
#   engine.sh stop    stops the daemon that `start` started; what it built is kept
# What is not there is installed with apt-get (as root), unless DFLASH_INSTALL=no.
# State and log of that daemon are in $DFLASH_CACHE/docker, else ~/.cache/dflash-plugin/docker.
set -eu
state=${DFLASH_CACHE:-$HOME/.cache/dflash-plugin}/docker
registry=docker.io/library/python:3.11-slim-bookworm
made=dflash-base:bookworm

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
    if [ "${DFLASH_INSTALL:-yes}" = no ]; then
        say "no $1 (package $2), and nothing is installed here"
        exit 1
    fi
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
        kill -0 $! 2>/dev/null || break
        sleep 1
    done
    stop
    say "dockerd does not answer: $(tail -n 1 "$state/dockerd.log")"
    exit 1
}

base() {
    if [ -n "${DFLASH_IMAGE_BASE:-}" ]; then
        echo "$DFLASH_IMAGE_BASE"
        return
    fi
    timeout 300 docker pull --quiet "$registry" >/dev/null 2>&1 && return
    docker image inspect "$made" >/dev/null 2>&1 || bootstrap
    echo "$made"
}

bootstrap() {
    install debootstrap debootstrap
    as_root debootstrap
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    say "$registry cannot be pulled: making $made with debootstrap (a minute)"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$folder" >"$folder.log" 2>&1 || {
        tail -n 5 "$folder.log" >&2
        exit 1
    }
    rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
    tar -C "$folder" -c . | docker import - "$made" >/dev/null
    rm -f "$folder.log"
}

stop() {
    [ -f "$state/dockerd.pid" ] || return 0
    pid=$(cat "$state/dockerd.pid")
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
}

case ${1:-} in
start | base | stop) "$1" ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
