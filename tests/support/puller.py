"""Pulls in processes that can be killed, without a start of Python for each: a process that imports once and forks.

Run by `Pullers`: ``python -m support.puller``; reads a JSON object a line (what to pull), says its child's pid, then its exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class Pullers:
    """Starts pulls one at a time; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.puller"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def __enter__(self) -> Pullers:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def pull_and_kill(self, cache: Path, after_s: float, **what: Any) -> int:
        """Begin a pull, SIGKILL it after a while, return how it ended (0: it was faster)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cache": str(cache), **what}) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        time.sleep(after_s)
        # Its parent has not waited for it yet if it ended: the pid is its own.
        os.kill(pid, signal.SIGKILL)
        self._process.stdin.write("wait\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _pull(what: dict[str, Any]) -> None:
    from uenvd.cache.pull import pull_blob
    from uenvd.cache.store import Store
    from uenvd.cache.transfer import Tuning
    from uenvd.oci.credentials import Credential
    from uenvd.oci.manifest import Descriptor
    from uenvd.oci.reference import parse_registry
    from uenvd.oci.remote import never, no_progress, open_remote

    store = Store(Path(what["cache"]))
    store.prepare()
    remote = open_remote(
        parse_registry(what["registry"]),
        credential=Credential(what["user"], what["password"]),
        timeout_connect_s=1,
        timeout_read_s=0.3,
    )
    layer = Descriptor("application/x-squashfs", what["digest"], what["size_bytes"])
    tuning = Tuning(what["connections"], what["piece_bytes"])
    pull_blob(remote, what["repository"], layer, store, progress=no_progress, cancelled=never, tuning=tuning)


def main() -> None:
    """Fork a child for each line."""
    import uenvd.cache.pull
    import uenvd.oci.registry  # noqa: F401 -- imported once for all children

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _pull(json.loads(line))
            except BaseException:
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
