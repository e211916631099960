"""Threads that may wait: moving an image goes on beside what somebody is waiting for."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Final

BACKGROUND_NICE: Final = 3
"""Half of the share of an ordinary process where processors are scarce (sched(7)); no difference where they are not."""


def step_back() -> None:
    """Lower the priority of the calling thread for the rest of its life; where the kernel refuses, nothing changes."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)
