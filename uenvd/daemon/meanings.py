"""What labels meant a moment ago: the steps of a job, and the sruns of a loop, ask for the same image again and again. No I/O, no checkpoint.

What is kept was worked out from remembered answers of the registry, and is as good as the oldest of them; it is dropped when any of them
changes. Who may use an image is not kept: that is asked each time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from uenvd.daemon.question import Image, Question
from uenvd.label import Label

MAX_MEANINGS: Final = 512


class Meanings:
    """Images by complete labels. ``ttl_s``: how long an answer of the registry is fresh."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self.version = 0
        """Another number after each `clear`."""
        self._kept: OrderedDict[Label, tuple[Image, float]] = OrderedDict()

    def recall(self, wanted: Label, question: Question) -> Image | None:
        """Return what a label means if that is known for sure and the user may have it; else all must be looked up."""
        image, since_s = self._kept.get(wanted, (None, 0.0))
        if image is None or question.refresh:
            return None
        if wanted.digest is None and not 0 <= time.time() - since_s < self._ttl_s:
            return None
        return image if question.permitted([image.found.repository]) else None

    def keep(self, wanted: Label, image: Image, question: Question) -> None:
        """Remember what was just looked up for ``question``: for ever if the label names a digest."""
        if image.raw_config is None:
            return  # its metadata is attached to it, and may change
        self._kept[wanted] = (image, time.time() - (question.oldest_s or 0.0))
        while len(self._kept) > MAX_MEANINGS:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """The registry has something new to say."""
        self._kept.clear()
        self.version += 1
