"""The program in which ReFrame runs: started inside the mount, with the tool's own interpreter, told everything by one file.

``python -I -m uenvd.publish.reframe.inside SPEC.json``. What started it (a session with an image's default view) is not to be seen by ReFrame:
the process environment is replaced before ReFrame is imported. Exit status: ReFrame's, or `NOT_MOUNTED`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from uenvd.publish.reframe.site import LAUNCHER

NOT_MOUNTED: Final = 124
MARK: Final = "UENVD_TEST_SESSION"
"""Variable by which the processes of a session are recognised when it ends."""


class Spec(NamedTuple):
    """What is to be done."""

    arguments: tuple[str, ...]
    """ReFrame's."""
    environ: dict[str, str]
    source: str | None
    """What has to be mounted, ``uenvd:…``; None if nothing."""

    def save(self, path: Path) -> None:
        """Write the file, which only the user can read."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._asdict(), file)

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read the file that `save` wrote."""
        body = json.loads(path.read_text())
        return cls(tuple(body["arguments"]), body["environ"], body["source"])


def is_mounted(source: str, mountinfo: str) -> bool:
    """Tell whether a text of the form of /proc/self/mountinfo (proc(5)) has a FUSE mount of this source."""
    wanted = source.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    for line in mountinfo.splitlines():
        fields = line.partition(" - ")[2].split(" ")
        if len(fields) > 1 and fields[0].startswith("fuse") and fields[1] == wanted:
            return True
    return False


def main(arguments: Sequence[str]) -> None:
    """Become ReFrame; ends with its exit status."""
    spec = Spec.load(Path(arguments[0]))
    if spec.source is not None and not is_mounted(
        spec.source, Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    ):
        print(f"{spec.source} is not mounted here", file=sys.stderr)
        raise SystemExit(NOT_MOUNTED)
    os.environ.clear()
    os.environ.update(spec.environ)
    _register_launcher()
    from reframe.frontend.cli import main as reframe

    sys.argv = ["reframe", *spec.arguments]
    reframe()


def _register_launcher() -> None:
    from reframe.core.backends import register_launcher
    from reframe.core.launchers import JobLauncher

    @register_launcher(LAUNCHER)
    class MpiexecIfParallel(JobLauncher):  # type: ignore[misc]  # ReFrame has no types
        """Local tests: the environment's own mpiexec for several tasks, nothing for one."""

        def command(self, job: object) -> list[str]:
            tasks = getattr(job, "num_tasks", None) or 1
            if tasks > 1:
                return ["mpiexec", "-n", str(tasks)]
            self.options: list[str] = []
            return []


if __name__ == "__main__":
    main(sys.argv[1:])
