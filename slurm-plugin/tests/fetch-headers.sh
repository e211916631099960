#!/bin/sh
# Usage: fetch-headers.sh DIR SUITE...
#
# Unpacks the development files of each Debian suite's Slurm below DIR/SUITE, unless they are there already. apt's own configuration is
# neither used nor changed. Exit status 75: the mirror cannot be reached.
set -eu

directory=$1
shift
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

for suite; do
    [ ! -e "$directory/$suite/usr/include/slurm/spank.h" ] || continue
    work=$(mktemp -d "$directory/.fetch-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"
    run_apt() {
        apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists" \
            -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root -o Acquire::Retries=1 -o Acquire::http::Timeout=15 "$@"
    }
    run_apt -o APT::Update::Error-Mode=any update || exit 75
    (cd "$work" && run_apt download -t "$suite" libslurm-dev) || exit 75
    dpkg-deb -x "$work"/libslurm-dev_*.deb "$work/unpacked"
    mv "$work/unpacked" "$directory/$suite"
    rm -rf "$work"
    trap - EXIT
done
