"""A user lets fusermount3 make a mount that looks like an image's: everybody sees it in his table, and nobody else is in a session by it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.publishing import Publisher
from support.slurmcentre import Centre
from support.users import TestUser, ordinary_user

pytestmark = pytest.mark.usefixtures("node")

UENVCTL = str(Path(sys.executable).parent / "uenvctl")


@contextlib.contextmanager
def forged(user: TestUser, source: str) -> Iterator[Path]:
    """Mount something with this source in the user's home, on the machine's own tree; nothing serves it."""
    place = user.home / "forged"
    place.mkdir()
    os.chown(place, user.uid, user.gid)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            ["fusermount3", "-o", f"fsname={source},subtype=uenvd", "--", place],
            env={**user.environ(), "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            user=user.uid,
            group=user.gid,
            extra_groups=[],
            check=True,
        )
        try:
            assert f"{place} " in Path("/proc/self/mountinfo").read_text()
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def test_others_are_in_no_session(centre: Centre) -> None:
    digest = Publisher(centre.registry.url).remote.manifest("deploy/demo/zen3/app/1.0", "v1").digest
    run = [UENVCTL, "run", "--socket", str(centre.login.socket_path), "--view=default", "app/1.0", "say"]
    with ordinary_user(centre.cluster.dir) as somebody, forged(somebody, f"uenvd:{digest}"):
        done = centre.srun("sh", "-c", 'echo "${UENV_LABEL:-nothing}"')
        assert (done.returncode, done.stdout, done.stderr) == (0, "nothing\n", "")
        done = centre.cluster.run(run, user=centre.user)
        assert (done.returncode, done.stdout, done.stderr) == (0, "one\n", "")
        himself = centre.cluster.run(run, user=somebody)
        assert himself.returncode == 93, "his own mounts are his own affair"
