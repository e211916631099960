"""Changes of what several clients write, in places that have no compare-and-swap: read, change, write, wait, read again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from uenvd.oci.remote import Remote

ROUNDS: Final = 12
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 2.0
_STEPS: Final = 3
"""How many of our steps somebody else's may take, where all are slow."""


def until_it_stays(remote: Remote, name: str, step: Callable[[], bool]) -> bool:
    """Call ``step`` until a change has survived a wait; tell whether it has, after at most `ROUNDS` rounds.

    ``step`` reads what there is and tells whether everything is as it should be; if not, it writes. That all is well proves nothing before a
    wait: somebody who read earlier may be about to write, and where our steps are slow his are, too. Where the place keeps everybody else out
    (`Remote.updating`), one call does.
    """
    pause_s, waited = _FIRST_PAUSE_S, False
    longest_step_s = 0.0
    with remote.updating(name) as alone:
        for _ in range(ROUNDS):
            began_s = time.monotonic()
            if (step() and waited) or alone:
                return True
            longest_step_s = max(longest_step_s, time.monotonic() - began_s)
            wait_s = max(pause_s, min(_STEPS * longest_step_s, _LONGEST_PAUSE_S))
            time.sleep(wait_s * random.uniform(0.7, 1.3))  # noqa: S311 -- spreads clients, no secret
            waited = True
            pause_s = min(pause_s * 1.4, _LONGEST_PAUSE_S)
    return False
