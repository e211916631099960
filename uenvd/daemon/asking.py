"""Questions to the registry, and its answers, remembered for a while.

Concurrency: the tables are changed synchronously between awaits. Registry calls run in threads with a deadline that both
sides keep. When the registry does not answer, the last known answer is used and a note says so; for a moment after that
the registry is not asked again, so that one request meets one deadline, not one for each of its questions.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

from uenvd.daemon import disk
from uenvd.daemon.metrics import METRICS
from uenvd.daemon.question import Question
from uenvd.errors import RegistryDenied, RegistryUnreachable, UenvError
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

T = TypeVar("T")

_REGISTRY_THREADS: Final = 16
_QUIET_S: Final = 3.0
"""After a failure the registry is left alone for this long."""
_MAX_ANSWERS: Final = 20_000
_REWRITE_S: Final = 3600.0
"""An unchanged answer is written to disk again only this often."""
_THREAD_GRACE_S: Final = 0.4


class Asker:
    """Asks one registry."""

    def __init__(self, remote: Remote, ttl_s: float, *, on_change: Callable[[], None]) -> None:
        """``ttl_s``: how long an answer is fresh. ``on_change`` is called when an answer is another than the last one; no checkpoint."""
        self._remote = remote
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._limiter = trio.CapacityLimiter(_REGISTRY_THREADS)
        self._answers: OrderedDict[tuple[str, str], tuple[Any, float]] = OrderedDict()
        self._quiet_until = float("-inf")
        self._failure: UenvError | None = None

    async def remembered(
        self,
        key: tuple[str, str],
        question: Question,
        *,
        ask: Callable[[], T],
        recall: Callable[[], tuple[T, float] | None],
        remember: Callable[[T, float], None],
    ) -> T:
        """Return an answer that is fresh enough, or ask for it; without an answer of the registry the last known one, which is noted.

        Args:
            key: names the question in memory.
            question: of the user.
            ask: asks the registry (in a thread).
            recall: reads the answer and its time, seconds of the epoch, from disk (in a thread); None: nothing is known.
            remember: writes them.

        Raises what ``ask`` raises, where nothing is remembered.
        """
        known: tuple[T, float] | None = self._answers.get(key)
        if known is None:
            known = await disk.call(recall)
        now_s = time.time()
        if known is not None:
            question.oldest_s = max(question.oldest_s or 0.0, now_s - known[1])
            if question.remembered_only:
                return known[0]
        if known is not None and not question.refresh and 0 <= now_s - known[1] < self._ttl_s:
            return known[0]
        try:
            answer = await self.ask(question, ask)
        except (RegistryUnreachable, RegistryDenied) as error:
            if known is None:
                raise
            question.note_stale(error, now_s - known[1])
            return known[0]
        if known is None or known[0] != answer:
            self._on_change()
        self._answers[key] = (answer, now_s)
        self._answers.move_to_end(key)
        while len(self._answers) > _MAX_ANSWERS:
            self._answers.popitem(last=False)
        if known is None and not answer:
            return answer  # names that somebody made up do not fill the disk
        if known is None or known[0] != answer or now_s - known[1] > _REWRITE_S:
            await disk.call(remember, answer, now_s)
        return answer

    def known(self, key: tuple[str, str]) -> tuple[Any, float] | None:
        """Return the answer in memory and its time, seconds of the epoch."""
        return self._answers.get(key)

    async def ask(self, question: Question, ask: Callable[[], T]) -> T:
        """Ask the registry within the question's deadline. Raises `RegistryUnreachable` and the registry's other errors."""
        if question.remembered_only:
            raise RegistryUnreachable("the registry has not been asked that yet")
        if trio.current_time() < self._quiet_until and self._failure is not None:
            raise RegistryUnreachable(self._failure.message, hint=self._failure.hint)
        left_s = question.deadline_s - trio.current_time()

        def in_thread() -> T:
            with self._remote.deadline(max(left_s, 0.05)):
                return ask()

        try:
            with METRICS.question(), trio.fail_at(question.deadline_s + _THREAD_GRACE_S):
                answer = await trio.to_thread.run_sync(
                    in_thread, limiter=self._limiter, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            error: UenvError = RegistryUnreachable(
                f"the registry {self._remote.address} does not answer in time"
            )
            self._be_quiet(error)
            raise error from None
        except RegistryUnreachable as error:
            self._be_quiet(error)
            raise
        self._quiet_until = float("-inf")
        return answer

    def _be_quiet(self, error: UenvError) -> None:
        log.warning("%s", error)
        self._failure = error
        self._quiet_until = trio.current_time() + _QUIET_S
