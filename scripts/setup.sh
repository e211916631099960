#!/bin/bash
# Prepare this checkout: Debian packages, /dev/fuse, and .venv with the project and its tools.
#
#   scripts/setup.sh            do what is not done yet; costs well under a second when there is nothing to do
#   scripts/setup.sh --where    print the directory in which the virtual environment lives, do nothing
#
# Jobs, image workers and tests run programs of the virtual environment as ordinary users, so it has to lie where they
# can traverse. When a directory above the checkout is closed to others (a CI runner's clone, a checkout in a home
# directory), the environment is made below /var/tmp, .venv is a link to it, and it holds a copy of the package
# (renewed whenever a source changes) instead of a reference to the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$(pwd -P)
umask 022
# The system's interpreter: others that are first on PATH may sit below a closed home directory.
python=/usr/bin/python3

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# True if every directory from the root to $1 can be traversed by everybody.
traversable() {
    local directory=$1 mode
    while :; do
        mode=$(stat -c %a "$directory")
        (( 8#$mode & 1 )) || return 1
        [ "$directory" = / ] && return 0
        directory=$(dirname "$directory")
    done
}

if traversable "$checkout"; then
    mode=editable
    venv=$checkout/.venv
else
    mode=copied
    venv=/var/tmp/uenvd-venv-$(printf '%s' "$checkout" | sha256sum | cut -c1-12)
fi
if [ "${1:-}" = --where ]; then
    echo "$venv"
    exit 0
fi

# 1. Debian packages.
wanted=$(sed -e 's/#.*//' -e 's/[[:space:]].*//' -e '/^$/d' scripts/apt-packages.txt)
missing=
if command -v dpkg-query >/dev/null; then
    # shellcheck disable=SC2086  # a list of words
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $wanted 2>/dev/null | sed -n 's/^installed //p' || true)
    missing=$(comm -23 <(sort <<<"$wanted") <(sort <<<"$installed") | tr '\n' ' ')
else
    say "this is not Debian: install what scripts/apt-packages.txt lists by other means"
fi
if [ -n "${missing// /}" ]; then
    if [ "$(id -u)" != 0 ]; then
        say "not root, so these Debian packages are not installed and tests that need them fail or are skipped: $missing"
    else
        say "installing Debian packages: $missing"
        # Only the programs are wanted: the services that some packages bring are not started.
        policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            printf '#!/bin/sh\nexit 101\n' > $policy
            chmod 755 $policy
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update
        # shellcheck disable=SC2086
        apt-get -qq -y --no-install-recommends install $missing </dev/null >/dev/null
    fi
fi

# 2. /dev/fuse. udev makes it 0666 on every machine that runs systemd; where no udev runs nobody does.
if [ ! -c /dev/fuse ]; then
    say "there is no /dev/fuse (modprobe fuse; in a container: --device /dev/fuse): tests that mount are skipped"
elif [ "$(stat -c %a /dev/fuse)" != 666 ]; then
    if [ "$(id -u)" = 0 ]; then
        chmod 0666 /dev/fuse
        say "/dev/fuse is now open to ordinary users (mode 0666, what udev sets wherever it runs)"
    else
        say "/dev/fuse is closed to ordinary users (udev's mode is 0666) and only root can change that"
    fi
fi

# 3. .venv.
state() {
    printf '%s %s %s\n' "$mode" "$venv" "$($python -V)"
    sha256sum pyproject.toml scripts/setup.sh uenvd/__init__.py
    if [ $mode = copied ]; then
        find uenvd -name '*.py' -print0 | sort -z | xargs -0 sha256sum
    fi
}
[ -x $python ] || fail "$python is missing (Debian package python3)"
stamp=$(state | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/uenvctl ] && [ "$(cat "$venv/.uenvd-setup" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

if [ "$venv" = "$checkout/.venv" ]; then
    if [ -L .venv ]; then rm .venv; fi
else
    # /var/tmp belongs to everybody: take only a directory that nobody else made or can change.
    mkdir -m 755 "$venv" 2>/dev/null || true
    owner=$(stat -c '%u %F' "$venv")
    [ "$owner" = "$(id -u) directory" ] || fail "$venv is not a directory of yours: remove it"
    chmod 755 "$venv"
    if [ ! -L .venv ]; then rm -rf .venv; fi
    ln -sfn "$venv" .venv
    say "ordinary users cannot reach $checkout, so .venv is a link to $venv"
fi
if ! grep -qs '^home = /usr/bin$' "$venv/pyvenv.cfg" || [ ! -x "$venv/bin/pip" ]; then
    say "making $venv"
    $python -m venv --clear "$venv"
fi
say "installing the project and its tools into $venv"
pip() { "$venv/bin/pip" --quiet --disable-pip-version-check "$@" </dev/null; }
if [ $mode = editable ]; then
    project=(--editable '.[dev,publish,firecrest]')
else
    project=('.[dev,publish,firecrest]')
fi
# Without the network when all requirements are met, with the build back end that lives in the environment.
if ! pip install --no-index --no-build-isolation "${project[@]}" >/dev/null 2>&1; then
    pip install 'hatchling>=1.24' editables
    pip install --use-pep517 "${project[@]}"
fi
if [ $mode = copied ]; then
    pip install --no-index --no-build-isolation --no-deps --force-reinstall .
fi
printf '%s\n' "$stamp" > "$venv/.uenvd-setup"
