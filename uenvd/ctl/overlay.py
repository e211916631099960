"""Files of the machine that a session sees as copies.

In a session's user namespace only the user himself exists: what root owns looks like ``nobody``'s. ssh refuses configuration files of a
foreigner when they are *included* (readconf.c, SSHCONF_CHECKPERM; the main file is read as it is), so every site with
``/etc/ssh/ssh_config.d`` would lose ssh, and git over ssh. The session gets copies of such files that belong to the user, mounted over them;
only of files that ssh would have accepted outside. Root's files cannot be changed by that, and nobody else sees it.
"""

# ruff: noqa: PTH120, PTH123, PTH208 - pathlib is slow to import
from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from uenvd import mounts

SSH_ROOTS = ("/etc/ssh/ssh_config", "/usr/etc/ssh/ssh_config")
MAX_FILES = 64
MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16
"""What ssh allows, too (readconf.c: READCONF_MAX_DEPTH)."""
_WORKPLACE = "/tmp"  # noqa: S108 - only a directory to mount on, in a namespace of our own


def included_patterns(text: str, directory: str = "/etc/ssh") -> list[str]:
    """Return the absolute patterns of the ``Include`` lines of a system-wide ssh_config(5); others (``~``, tokens) are left out."""
    found = []
    for line in text.splitlines():
        keyword, _, rest = line.strip().replace("=", " ", 1).replace("\t", " ").partition(" ")
        if keyword.lower() == "include":
            for word in rest.split():
                pattern = word.strip('"')
                if pattern and pattern[0] != "~" and not set(pattern) & set("%$"):
                    found.append(pattern if pattern[0] == "/" else f"{directory}/{pattern}")
    return found


def ssh_includes() -> dict[str, bytes]:
    """Return path and content of the root-owned files that ssh includes on this machine. Call it before the namespace is entered."""
    found: dict[str, bytes] = {}
    waiting = [(path, 0) for path in SSH_ROOTS]
    while waiting:
        path, depth = waiting.pop()
        text = _trusted(path)
        if text is None or path in found:
            continue
        if depth:
            found[path] = text
        if depth < MAX_DEPTH and b"nclude" in text.lower():
            for pattern in included_patterns(text.decode(errors="replace"), os.path.dirname(SSH_ROOTS[0])):
                waiting += [(os.path.realpath(one), depth + 1) for one in _matching(pattern)]
        if len(found) >= MAX_FILES:
            break
    return found


def _matching(pattern: str) -> list[str]:
    directory, _, name = pattern.rpartition("/")
    if not set("*?[") & set(pattern):
        return [pattern]
    if set("*?[") & set(directory):
        return []  # nobody's site does that
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    if not names:
        return []
    import fnmatch  # only where there is something

    return [f"{directory}/{one}" for one in sorted(names) if fnmatch.fnmatchcase(one, name) and one[0] != "."]


def _trusted(path: str) -> bytes | None:
    """Return the content of a file that root owns and nobody else can write; None for any other."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
                return None
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return None
    return data if len(data) <= MAX_FILE_BYTES else None


def attach_copies(files: Mapping[str, bytes]) -> None:
    """Mount private copies over files of these paths, in the namespace that was just entered.

    A convenience: what cannot be done is left out, and the session goes on without it.
    """
    if not files:
        return
    try:
        mounts.mount_tmpfs(_WORKPLACE)
    except OSError:
        return
    clones: list[tuple[int, str]] = []
    try:
        for number, (path, data) in enumerate(files.items()):
            copy = f"{_WORKPLACE}/{number}"
            with open(copy, "xb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o644)
            clones.append((mounts.open_tree_clone(copy), path))
    except OSError:
        pass
    finally:
        mounts.umount(_WORKPLACE, detach=True)
    for clone, path in clones:
        try:
            mounts.move_mount(clone, path)
        except OSError:
            continue
        finally:
            os.close(clone)
