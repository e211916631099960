"""Own images by their labels, as the daemon looks for them: with the asker's rights, within his time, and at nobody else's cost."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from uenvd.daemon import ownfiles
from uenvd.daemon.access import Permit
from uenvd.daemon.peer import Identity
from uenvd.daemon.question import Question
from uenvd.errors import AccessDenied, AmbiguousLabel, LabelError, StorageError, UenvError, UnknownLabel
from uenvd.label import parse_namespaced_label
from uenvd.ownfiles import Found

ME = Identity(os.getuid(), os.getgid(), ())
ADA = Identity(12345, 12345, ())
BOB = Identity(12346, 12346, ())


@pytest.fixture
def source() -> Iterator[str]:
    """A directory that everybody can reach, with images of Ada's that only she can see."""
    top = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    try:
        top.chmod(0o755)
        (top / "ada/app").mkdir(parents=True)
        for name in ("app/1", "app/2"):
            (top / "ada" / f"{name}.squashfs").touch()
        if os.geteuid() == 0:
            for path in (top / "ada", top / "ada/app"):
                os.chown(path, ADA.uid, ADA.gid)
                path.chmod(0o700)
        yield str(top / "ada")
    finally:
        shutil.rmtree(top, ignore_errors=True)


def asked_by(owner: Identity, seconds: float = 10) -> Question:
    question = Question(trio.current_time() + seconds, refresh=False)
    question.permit = Permit(owner, [], {})
    return question


async def meant(
    source: str, text: str, owner: Identity, *, elsewhere: bool = False
) -> Found | type[UenvError]:
    label = parse_namespaced_label(text)
    try:
        return await ownfiles.find(source, label, asked_by(owner), elsewhere=elsewhere)
    except UenvError as error:
        return type(error)


async def test_what_a_label_means(source: str) -> None:
    owner = ADA if os.geteuid() == 0 else ME
    exact = Found(parse_namespaced_label("mine::app/1"), f"{source}/app/1.squashfs")
    assert await meant(source, "mine::app/1", owner) == exact
    assert await meant(source, "mine::app", owner) is AmbiguousLabel
    os.unlink(f"{source}/app/2.squashfs")
    assert await meant(source, "mine::app", owner) == exact, "as uenvctl does"
    assert await meant(source, "mine::app/2", owner) is UnknownLabel
    assert await meant(source, "mine::app@daint", owner) is LabelError


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to look for another user")
async def test_nobody_learns_of_what_he_cannot_see(source: str) -> None:
    for text in ("mine::app", "mine::app:v1", "mine::nothing"):
        assert await meant(source, text, BOB) is AccessDenied
    for text in ("mine::app/1", "mine::app/9"):
        found = await meant(source, text, BOB)
        assert isinstance(found, Found), "there or not: it is refused by whoever opens it"
    assert await meant(source, "mine::app", Identity(0, 0, ())) is AmbiguousLabel
    assert os.stat(f"{source}/app").st_uid == ADA.uid, "and this process is what it was"
    assert os.listdir(f"{source}/app")


async def test_directories_of_other_nodes(source: str) -> None:
    owner = ADA if os.geteuid() == 0 else ME
    missing = f"{source}/no/such"
    assert await meant(missing, "mine::app/1", owner) is UnknownLabel
    believed = await meant(missing, "mine::app/1", owner, elsewhere=True)
    assert believed == Found(parse_namespaced_label("mine::app/1"), f"{missing}/app/1.squashfs")
    assert isinstance(await meant(missing, "mine::app", owner, elsewhere=True), Found)
    assert await meant(missing, "mine::app:v1", owner, elsewhere=True) is UnknownLabel
    assert await meant(source, "mine::app/9", owner, elsewhere=True) is UnknownLabel


async def test_a_file_server_that_hangs(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    look = ownfiles.ownfiles.find

    def slow(directory: str, wanted: object) -> Found:
        if "slow" in directory:
            hanging.wait(30)
        return look(directory, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(ownfiles.ownfiles, "find", slow)
    monkeypatch.setattr(ownfiles, "LOOK_S", 0.05)
    label = parse_namespaced_label("mine::app/1")
    try:
        found = await ownfiles.find("/slow", label, asked_by(ME))
        assert found == Found(label, "/slow/app/1.squashfs"), (
            "a file that is named is left to whoever opens it"
        )
        with pytest.raises(StorageError, match="does not answer"):
            await ownfiles.find("/slow", parse_namespaced_label("mine::app"), asked_by(ME))
        with pytest.raises(StorageError, match="has not answered yet"):
            await ownfiles.find("/slow", label, asked_by(ME))
        other = ADA if os.geteuid() == 0 else Identity(ME.uid + 1, ME.gid, ())
        if os.geteuid() == 0:
            assert (await ownfiles.find(source, label, asked_by(other))).path, "others are not held up"
    finally:
        hanging.set()
    with trio.fail_after(10):
        while ownfiles._busy:
            await trio.sleep(0.01)
    assert await meant(source, "mine::app/1", ADA if os.geteuid() == 0 else ME) != StorageError


async def test_a_request_without_time_left_counts_nobody(source: str) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await ownfiles.find(source, parse_namespaced_label("mine::app/1"), asked_by(ME))
    with trio.fail_after(10):
        while ownfiles._busy:
            await trio.sleep(0.01)
