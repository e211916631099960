"""What was answered a moment ago, for requests that come again: the sruns of a loop, the steps of a job. No I/O, no checkpoint.

An answer is as good as the oldest answer of the registry that it was made of, and is dropped when any of those changes
(`uenvd.daemon.meanings`). Nothing is kept where it depends on who asks for more than his ids: with rules of access, with required signatures.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from uenvd.config import Config
from uenvd.daemon.meanings import Meanings
from uenvd.daemon.question import Question

T = TypeVar("T")

MAX_ANSWERS: Final = 512


class Answered(Generic[T]):
    """Answers by question. ``kept_s``: at most so long, and no longer than the registry's answers are fresh."""

    def __init__(self, config: Config, meanings: Meanings, kept_s: float = float("inf")) -> None:
        self._meanings = meanings
        self._kept_s = min(kept_s, config.resolve_ttl_s)
        self._usable = not config.access and not config.signatures.required
        self._kept: OrderedDict[Hashable, tuple[T, float, int]] = OrderedDict()

    def recall(self, asked: Hashable) -> T | None:
        """Return the answer if it would be the same now."""
        known = self._kept.get(asked)
        if known is None:
            return None
        answer, since_s, version = known
        if version == self._meanings.version and 0 <= time.time() - since_s < self._kept_s:
            return answer
        del self._kept[asked]
        return None

    def keep(self, asked: Hashable, answer: T, question: Question) -> None:
        """Remember an answer that was just worked out for ``question``, unless there was something to tell with it."""
        if not self._usable or question.refresh or question.notes:
            return
        self._kept[asked] = (answer, time.time() - (question.oldest_s or 0.0), self._meanings.version)
        while len(self._kept) > MAX_ANSWERS:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
