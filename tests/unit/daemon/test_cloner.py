"""The cloner's two ends, without any image."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from uenvd.daemon.cloner import request_clone, start_cloner
from uenvd.errors import MountFailed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces and mounts")


@pytest.fixture
def cloner(tmp_path: Path) -> Iterator[socket.socket]:
    process, channel = start_cloner(str(tmp_path))
    yield channel
    channel.close()
    assert process.wait(10) == 0, "EOF ends it"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/", "x" * 256])
def test_names_that_are_no_names(cloner: socket.socket, name: str) -> None:
    with pytest.raises(MountFailed, match="Invalid argument"):
        request_clone(cloner, name)


def test_an_error_is_one_requests_own(cloner: socket.socket) -> None:
    for _attempt in range(3):
        with pytest.raises(MountFailed, match="cannot clone the mount nothing: No such file or directory"):
            request_clone(cloner, "nothing")


def test_cloner_has_no_way_back(tmp_path: Path) -> None:
    """It is in namespaces of its own, as nobody there, and has nothing open but its socket."""
    process, channel = start_cloner(str(tmp_path))
    try:
        for kind in ("user", "mnt"):
            assert os.stat(f"/proc/{process.pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
        assert Path(f"/proc/{process.pid}/uid_map").read_text() == ""
        opened = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert len([name for name in opened if name.startswith("socket:")]) == 1
    finally:
        channel.close()
        process.wait(10)


def test_start_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MountFailed, match="cannot start"):
        start_cloner(str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no"))
    with pytest.raises(MountFailed, match="cannot start: No such file"):
        start_cloner(str(tmp_path))


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """A cloner that is a thread of the test."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=lambda: (theirs.recv(300), answer(theirs), theirs.close()))
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"E13", "Permission denied"),
        (b"E", "talks nonsense"),
        (b"Ex", "talks nonsense"),
        (b"ok", "without a descriptor"),
        (b"what", "talks nonsense"),
    ],
)
def test_answers_that_are_none(answer: bytes, words: str) -> None:
    with answering(lambda peer: peer.send(answer)) as channel, pytest.raises(MountFailed, match=words):
        request_clone(channel, "x")


def test_end_of_the_cloner() -> None:
    with answering(lambda _peer: None) as channel, pytest.raises(MountFailed, match="it ended"):
        request_clone(channel, "x")


def test_silence_has_a_deadline_and_closes_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uenvd.daemon.cloner.CLONE_DEADLINE_S", 0.05)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        with pytest.raises(MountFailed, match="does not answer: timed out"):
            request_clone(ours, "x")
        assert ours.fileno() == -1, "a late answer must not be taken for the next one's"


def test_descriptors_are_close_on_exec() -> None:
    with answering(lambda peer: socket.send_fds(peer, [b"ok"], [0])) as channel:
        fd = request_clone(channel, "x")
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_daemon_without_descriptors_left(tmp_path: Path) -> None:
    """EMFILE is an ordinary event: an error, and the next request works."""
    code = (
        "import os, resource, socket, sys\nfrom uenvd.daemon.cloner import request_clone\n"
        "from uenvd.errors import MountFailed\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "fds = []\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "while True:\n    try: fds.append(os.dup(0))\n    except OSError: break\n"
        "socket.send_fds(theirs, [b'ok'], [0])\n"
        "try: request_clone(ours, 'x')\nexcept MountFailed as error: print(error)\n"
        "os.close(fds.pop())\nsocket.send_fds(theirs, [b'ok'], [0])\nprint(request_clone(ours, 'x') > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.stdout.splitlines()[1:] == ["True"], done.stderr
    assert "without a descriptor" in done.stdout
