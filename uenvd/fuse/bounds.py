"""How much memory the processes of one image may have: what the kernel enforces, and what the limits of a user count. Pure.

Sources: getrlimit(2), RLIMIT_DATA (private writable memory, since Linux 4.7).
"""

from __future__ import annotations

from typing import Final

_DATA_BYTES: Final = 192 << 20
"""Bound of the memory of its own that a process of one thread may have beyond twice its cache; 20 MiB are usual."""
_THREADED_DATA_BYTES: Final = 1 << 30
"""The same where threads have stacks, and arenas of malloc."""
_SUPERVISORS: Final = 2
"""The active one and its standby."""
_SUPERVISOR_BYTES: Final = 32 << 20
"""Twice what they have."""


def data_limit_bytes(cache_bytes: int, *, threads: bool = False) -> int:
    """Return how much memory of its own (RLIMIT_DATA) a process that reads images may have."""
    return (_THREADED_DATA_BYTES if threads else _DATA_BYTES) + 2 * cache_bytes


def most_bytes(workers: int, cache_bytes: int, *, threads: bool = False) -> int:
    """Return the most memory that the processes of one image can have: its ``workers`` by their limit, what they share, and the supervisors.

    These parse nothing; what they need is known.

    ``threads``: one process through libfuse.
    """
    if threads:
        return data_limit_bytes(cache_bytes, threads=True)
    return workers * data_limit_bytes(cache_bytes) + _SUPERVISORS * _SUPERVISOR_BYTES + cache_bytes
