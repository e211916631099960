"""The few questions that are asked of git. The repository is that of a directory; nothing in it is changed and none of its programs is run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

from uenvd.errors import ResourceMissing, UsageError

TIMEOUT_S: Final = 120.0
MAX_FILE_BYTES: Final = 8 << 20
_SAFE = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.quotePath=off")


def resolve(directory: Path, revision: str) -> str:
    """Return the commit (hex) of a branch, tag or commit. Raises `UsageError` if there is none."""
    return _git(
        directory,
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        f"{revision}^{{commit}}",
        fault=f"git knows no commit {revision!r} in {directory}",
        hint="in a shallow clone of a CI system, fetch it first: git fetch origin BRANCH (GitHub: fetch-depth: 0; GitLab: GIT_DEPTH: 0)",
    ).strip()


def merge_base(directory: Path, commit: str) -> str:
    """Return the commit where ``HEAD`` left ``commit``. Raises `UsageError` if they have nothing in common."""
    return _git(
        directory,
        "merge-base",
        commit,
        "HEAD",
        fault=f"HEAD and {commit[:12]} have no commit in common",
        hint="the clone may be too shallow: GitHub: fetch-depth: 0; GitLab: GIT_DEPTH: 0",
    ).strip()


def changed_files(directory: Path, commit: str) -> tuple[Path, ...]:
    """Return the files, absolute, in which the working tree differs from a commit, deleted and untracked ones too."""
    top = Path(
        _git(directory, "rev-parse", "--show-toplevel", fault=f"{directory} is in no git repository").rstrip(
            "\n"
        )
    )
    options = (
        "--name-only",
        "-z",
        "--no-renames",
        "--no-ext-diff",
        "--no-textconv",
        "--ignore-submodules=none",
    )
    differing = _git(directory, "diff", *options, commit, "--", fault="git cannot compare")
    new = _git(top, "ls-files", "-z", "--others", "--exclude-standard", fault="git cannot list files")
    return tuple(sorted({top / name for text in (differing, new) for name in text.split("\0") if name}))


def show(directory: Path, commit: str, path: str) -> str | None:
    """Return a file of a commit, ``path`` relative to the directory; None if it has none. Raises `UsageError`."""
    listed = _git(directory, "ls-tree", "-z", commit, "--", path, fault=f"git cannot read {commit}")
    if not listed:
        return None
    match = re.match(r"(\d+) blob ([0-9a-f]+)\t", listed)
    if match is None or match[1] == "120000":
        raise UsageError(f"{path} is no ordinary file in {commit[:12]}")
    size = int(_git(directory, "cat-file", "-s", match[2], fault=f"git cannot read {path}"))
    if size > MAX_FILE_BYTES:
        raise UsageError(f"{path} in {commit[:12]} is longer than {MAX_FILE_BYTES} bytes")
    return _git(directory, "cat-file", "blob", match[2], fault=f"git cannot read {path}")


def _git(directory: Path, *words: str, fault: str, hint: str = "") -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *_SAFE, "-C", str(directory), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise ResourceMissing("git is not installed", hint="install git") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"{fault}: git took more than {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise UsageError(f"{fault}: {said}" if said else fault, hint=hint)
    return done.stdout.decode(errors="surrogateescape")
