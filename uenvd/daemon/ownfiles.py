"""Users' own images by their labels, for a request: which file, looked for with the rights of the user for whom it is asked.

Nothing that a user has written is read here, only names are looked up, in a thread that has his rights for files (`CacheUser`), with a
deadline: his file server may hang, and nothing else may wait for that. The file itself is opened by a process of his.
"""

from __future__ import annotations

import os.path
import pwd
import threading
from collections import Counter
from typing import Final

import trio

from uenvd import ownfiles
from uenvd.cache.identity import CacheUser
from uenvd.daemon.peer import Identity
from uenvd.daemon.question import Question
from uenvd.daemon.threads import ThreadLimit
from uenvd.errors import AccessDenied, StorageError, UnknownLabel
from uenvd.label import Label
from uenvd.own import file_of, need_file_label
from uenvd.ownfiles import Found

LOOK_S: Final = 1.5
"""Of the 2.5 s in which a request is answered (docs/protocol.md)."""
THREADS: Final = 16
THREADS_OF_A_USER: Final = 2
"""A user whose file server hangs stops his own requests only."""

_threads: Final = ThreadLimit("threads that look for own images", THREADS)
_busy: Counter[int] = Counter()
_lock = threading.Lock()


async def find(source: str, wanted: Label, question: Question, *, elsewhere: bool = False) -> Found:
    """Return the file that a label means to the user for whom it is asked.

    Args:
        source: the directory, with ``%h`` and ``%u`` for the user's home and name.
        wanted: with the source's namespace.
        question: says who asks, and how long there is time.
        elsewhere: the file is for other nodes: where this one has not even the directory, the label is believed.

    Raises:
        LabelError, UnknownLabel, AmbiguousLabel, StorageError: `uenvd.ownfiles.find`.
        AccessDenied: this node does not know the user.

    """
    need_file_label(wanted)
    owner = question.owner
    if owner is None:
        raise AccessDenied("nobody is known for whom the file would be opened")
    look = _Look(source, wanted, owner, elsewhere=elsewhere)
    try:
        with trio.fail_at(min(question.deadline_s, trio.current_time() + LOOK_S)):
            return await trio.to_thread.run_sync(look.run, limiter=_threads.limiter(), abandon_on_cancel=True)
    except trio.TooSlowError:
        path = file_of(look.directory, wanted) if look.directory is not None else None
        if path is not None and wanted.version is not None:
            return Found(wanted, path)  # a slow file server: who opens the file has more time
        raise StorageError(
            f"the file system of {source} does not answer", hint="see whether its server is up"
        ) from None
    finally:
        look.leave()


class _Look:
    """One search in a thread. Raises `StorageError` when too many of the user's are under way."""

    def __init__(self, source: str, wanted: Label, owner: Identity, *, elsewhere: bool) -> None:
        self._source = source
        self._wanted = wanted
        self._owner = owner
        self._elsewhere = elsewhere
        self._counted = True
        self._running = False
        self.directory: str | None = None
        """The user's, once it is known."""
        with _lock:
            if _busy[owner.uid] >= THREADS_OF_A_USER:
                raise StorageError(
                    f"the file system of {source} has not answered yet", hint="see whether its server is up"
                )
            _busy[owner.uid] += 1

    def run(self) -> Found:
        """Search (in the thread)."""
        self._running = True
        try:
            self.directory = directory_of(self._source, self._owner)
            return _find(self.directory, self._wanted, self._owner, elsewhere=self._elsewhere)
        finally:
            self._end()

    def leave(self) -> None:
        """The request goes on; a thread that is still searching stays counted."""
        if not self._running:
            self._end()

    def _end(self) -> None:
        with _lock:
            if self._counted:
                self._counted = False
                _busy[self._owner.uid] -= 1
                if _busy[self._owner.uid] == 0:
                    del _busy[self._owner.uid]


def _find(directory: str, wanted: Label, owner: Identity, *, elsewhere: bool) -> Found:
    with CacheUser(owner.uid, owner.gid, owner.groups):
        try:
            return ownfiles.find(directory, wanted)
        except UnknownLabel:
            path = file_of(directory, wanted)
            if elsewhere and path is not None and ownfiles.is_directory_missing(directory):
                return Found(wanted, path)
            raise


def directory_of(source: str, owner: Identity) -> str:
    """Return a source's directory for a user (blocking: may ask LDAP). Raises `AccessDenied` for one whom the node does not know."""
    if "%" in source:
        try:
            entry = pwd.getpwuid(owner.uid)
        except KeyError:
            raise AccessDenied(f"this node knows no user with uid {owner.uid}") from None
        source = source.replace("%h", entry.pw_dir).replace("%u", entry.pw_name)
    return os.path.normpath(source)
