"""Clones of mounts, made ahead of time: a job step that asks for an image is not kept waiting by the cloner, nor by a thread.

Concurrency: tables change synchronously. Each image that is open has at most `SPARES` detached clones lying here, made by tasks of
the daemon's nursery. A spare keeps its FUSE connection alive like any other clone, so `drop` closes them when the image is let go.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import trio

from uenvd.daemon.mounter import Mounter
from uenvd.errors import MountFailed

log = logging.getLogger(__name__)

SPARES: Final = 2
RESTOCK_S: Final = 0.05
"""After one was taken: the step that took it starts first."""


class Clones:
    """The clones of this daemon's mounts, by the mount's name."""

    def __init__(self, nursery: trio.Nursery, mounter: Mounter) -> None:
        self._nursery = nursery
        self._mounter = mounter
        self._spares: dict[str, list[int]] = {}

    def open(self, name: str) -> None:
        """Begin to keep spares of a mount; no checkpoint."""
        if name not in self._spares:
            self._spares[name] = []
            self._nursery.start_soon(self._restock, name, 0.0)

    async def take(self, name: str) -> int:
        """Return a descriptor of a detached clone with locked flags; the caller owns it. Raises `MountFailed`."""
        spare = self.take_nowait(name)
        return spare if spare is not None else await self._mounter.clone(name)

    def take_nowait(self, name: str) -> int | None:
        """Return a spare if there is one; no checkpoint."""
        spares = self._spares.get(name)
        if not spares:
            return None
        spare = spares.pop()
        if not spares:
            self._nursery.start_soon(self._restock, name, RESTOCK_S)
        return spare

    def drop(self, name: str) -> None:
        """Close the spares of a mount and keep no more; no checkpoint."""
        for spare in self._spares.pop(name, ()):
            os.close(spare)

    async def _restock(self, name: str, delay_s: float) -> None:
        await trio.sleep(delay_s)
        try:
            while len(self._spares.get(name, range(SPARES))) < SPARES:
                clone = await self._mounter.clone(name)
                spares = self._spares.get(name)
                if spares is not None and len(spares) < SPARES:
                    spares.append(clone)
                else:
                    os.close(clone)
        except MountFailed as error:
            log.debug("no spare clone of %s: %s", name, error)
