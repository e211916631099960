"""Faults met while serving: each goes to the reader as an errno, and to the log once."""

from __future__ import annotations

import errno
import logging
import re

from uenvd.errors import UenvError

_log = logging.getLogger(__name__)
_MAX_KINDS = 64
_ANSWERS = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL})
"""What a question deserves that makes no sense: nothing to log."""
_PARTICULARS = re.compile(r"""0x[0-9a-f]+|[0-9]+|b'(?:[^'\\]|\\.)*'|b"[^"]*\"""")
"""Numbers and names in a message."""


class Faults:
    """Logs each kind of fault once (a kind is the text without its numbers), at most 64 kinds: a bad image cannot fill the log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds: set[str] = set()
        self.count = 0

    def note(self, error: Exception) -> int:
        """Log the error if its kind is new; return the errno that the reader gets.

        `OSError` keeps its errno (EIO if it has none), all else is EIO; an error that is neither `OSError` nor of uenvd's tree is a bug and is
        logged with its traceback.
        """
        if isinstance(error, OSError) and error.errno in _ANSWERS:
            return error.errno
        self.count += 1
        kind = f"{type(error).__name__} {_PARTICULARS.sub('N', str(error))}"
        if kind not in self._kinds and len(self._kinds) < _MAX_KINDS:
            self._kinds.add(kind)
            known = isinstance(error, OSError | UenvError | MemoryError)
            _log.error(
                "%s: %s: %s (said once)",
                self._name,
                type(error).__name__,
                error,
                exc_info=None if known else error,
            )
            if len(self._kinds) == _MAX_KINDS:
                _log.error("%s: more kinds of faults than %d, the rest is not logged", self._name, _MAX_KINDS)
        return (error.errno or errno.EIO) if isinstance(error, OSError) else errno.EIO
