"""Whether a directory that is only read (``cache.sources``) can be believed: nobody but the site may have put anything into it.

Its blobs are believed by their names, like our own: to hash them all at each start would cost what the directory saves. So it counts only if
it, and what is used of it, belongs to root or to ``cache.user`` and nobody else may write to it. Who could write to the directory could give
one right blob the name of another; who owns a file could change it while it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from uenvd.cache.identity import CacheUser
from uenvd.errors import StorageError

_FOREIGN: Final = stat.S_IWGRP | stat.S_IWOTH


def why_not(status: os.stat_result, user: CacheUser) -> str | None:
    """Return why a file or directory may be somebody else's work; None if it may not."""
    if status.st_uid not in (0, os.geteuid(), user.uid):
        return f"it belongs to uid {status.st_uid}"
    if status.st_mode & _FOREIGN:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others may write to it"
    return None


def require_trusted(paths: tuple[Path, ...], user: CacheUser) -> None:
    """Raise `StorageError` unless all of these are the site's alone; what is not there is no danger."""
    for path in paths:
        try:
            with user:
                reason = why_not(path.stat(), user)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"{path} cannot be looked at: {error.strerror}") from error
        if reason is not None:
            raise StorageError(
                f"{path} is not used: {reason}",
                hint="directories of cache.sources, and what is in them, have to belong to root or cache.user alone",
            )
