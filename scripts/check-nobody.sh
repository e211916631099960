#!/bin/bash
# Prove that an ordinary user can run the programs of .venv: job users and image workers have to.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(readlink -f .venv)/bin/uenvctl
if [ "$(id -u)" != 0 ]; then
    echo "check-nobody: not root, so nobody else's view of $program can be tried; it runs as $(id -un):"
    "$program" --version
    exit 0
fi
if ! version=$(cd / && setpriv --reuid nobody --regid nogroup --clear-groups env -i PATH=/usr/bin:/bin "$program" --version 2>&1); then
    printf '%s\n' "$version" >&2
    echo "check-nobody: user nobody cannot run $program; look for a closed directory in:" >&2
    namei -m "$program" >&2
    exit 1
fi
echo "check-nobody: user nobody runs $program: $version"
