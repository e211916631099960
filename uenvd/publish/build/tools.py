"""The programs of the machine that builds: their versions, and what packages say of themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from uenvd.errors import BuildFailed, ResourceMissing

_ASK_S: Final = 60.0
_VERSION = re.compile(r"\d+(?:\.[0-9A-Za-z~+-]+)+")
_OPTIONS: Final = {"mksquashfs": "-version"}
ABSENT: Final = "absent"


def version_of(program: str) -> str:
    """Return the version that a program states, `ABSENT` where it is not installed."""
    return _version_of(shutil.which(program) or "", _OPTIONS.get(Path(program).name, "--version"))


@cache
def _version_of(path: str, option: str) -> str:
    if not path:
        return ABSENT
    try:
        done = subprocess.run(
            [path, option], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=_ASK_S, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ABSENT
    first = (done.stdout + done.stderr).partition("\n")[0]
    match = _VERSION.search(first)
    return match[0] if match else first[:60]


def installed_bytes(debs: Sequence[Path]) -> int:
    """Return what Debian packages take when they are unpacked, as they say themselves. Raises `BuildFailed`, `ResourceMissing`."""
    total = 0
    for deb in debs:
        try:
            done = subprocess.run(
                ["dpkg-deb", "--field", str(deb), "Installed-Size"], capture_output=True, text=True, check=False, timeout=_ASK_S,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ResourceMissing("dpkg-deb is missing", hint="install dpkg") from error
        except subprocess.TimeoutExpired as error:
            raise BuildFailed(f"dpkg-deb did not read {deb} within {_ASK_S:.0f} s") from error
        text = done.stdout.strip()
        total += int(text) << 10 if text.isdigit() else deb.stat().st_size * 4
    return total
