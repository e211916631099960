import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from uenvd.cache import claim, identity
from uenvd.cache.claim import FlockClaim, HeartbeatClaim, Holder, Watch, look_at, unless_stale
from uenvd.cache.identity import CacheUser
from uenvd.errors import InUse

OWN = CacheUser()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.claim"


def test_a_watch_tells_how_long_nothing_has_changed() -> None:
    now_s = 100.0
    watch = Watch(lambda: now_s)
    assert watch.unchanged_s("x", 1) == 0
    now_s = 107.0
    assert watch.unchanged_s("x", 1) == 7
    assert watch.unchanged_s("y", 1) == 0
    assert watch.unchanged_s("x", 2) == 0
    now_s = 108.0
    assert watch.unchanged_s("x", 1) == 0, "another state, even if it was there before"


def test_a_watch_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "MAX", 3)
    now_s = 0.0
    watch = Watch(lambda: now_s)
    for name in "abcd":
        watch.unchanged_s(name, 1)
    now_s = 5.0
    assert [watch.unchanged_s(name, 1) for name in "dcba"] == [5, 5, 5, 0]


@pytest.mark.parametrize("kind", ["flock", "heartbeat"])
def test_one_at_a_time_until_it_is_given_back(path: Path, kind: str) -> None:
    def take() -> FlockClaim | HeartbeatClaim:
        return FlockClaim(path, OWN) if kind == "flock" else HeartbeatClaim(path, OWN, Watch())

    first = take()
    first.check()
    with pytest.raises(InUse):
        take()
    first.release()
    first.release()
    assert not path.exists()
    second = take()
    first.release()
    assert path.exists(), "whoever gave it back has no say any more"
    second.release()


def test_a_claim_that_somebody_took_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_LOOK_S", 0.0)
    mine = HeartbeatClaim(path, OWN, Watch())
    path.unlink()
    with pytest.raises(InUse, match="taken over"):
        mine.check()
    other = HeartbeatClaim(path, OWN, Watch())
    mine.release()
    assert path.exists()
    other.release()


def test_who_cannot_renew_counts_himself_out_before_others_may(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claim.FENCE_S + claim.BEAT_S < claim.STALE_S
    monkeypatch.setattr(claim, "BEAT_S", 3600.0)
    mine = HeartbeatClaim(path, OWN, Watch())
    mine.check()
    monkeypatch.setattr(claim, "_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + claim.FENCE_S + 1)
    with pytest.raises(InUse):
        mine.check()
    mine.release()
    assert path.exists(), "perhaps it is another's by now"


def test_a_claim_is_renewed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.02)
    mine = HeartbeatClaim(path, OWN, Watch())
    first = look_at(path)
    assert first is not None
    end_s = time.monotonic() + 5
    while (seen := look_at(path)) is not None and seen.state == first.state:
        assert time.monotonic() < end_s
    mine.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "x"}', b"\xff" * 100, b'{"token": 5}'])
def test_a_claim_that_cannot_be_read_is_somebodys(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(content)
    watch = Watch()
    with pytest.raises(InUse):
        HeartbeatClaim(path, OWN, watch)
    monkeypatch.setattr(claim, "STALE_S", 0.0)
    taken = HeartbeatClaim(path, OWN, watch)
    assert taken.inherited
    taken.release()


def test_a_dead_process_of_this_machine_is_known_to_be_dead(path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from uenvd.cache.claim import HeartbeatClaim, Watch\n"
        "from uenvd.cache.identity import CacheUser\n"
        "HeartbeatClaim(Path(sys.argv[1]), CacheUser(), Watch()); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.exists()
    taken = HeartbeatClaim(path, OWN, Watch())
    assert not taken.inherited
    taken.release()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    me = Holder.myself()
    assert not me.is_gone()
    assert me._replace(started=me.started - 1).is_gone()
    assert me._replace(pid=2**22 + 1).is_gone()
    for elsewhere in (me._replace(boot="other", pid=2**22 + 1), me._replace(pid_namespace=1, started=0)):
        assert not elsewhere.is_gone(), "nothing is known of other machines and containers"


def test_of_two_who_find_it_dead_one_gets_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has seen the dead claim, but when it moves the file, it is the first one's new claim."""
    monkeypatch.setattr(claim, "STALE_S", 0.0)
    dead = {"token": "dead", **Holder.myself()._replace(boot="b")._asdict()}
    path.write_text(json.dumps(dead))
    watch = Watch()
    really = claim.look_at
    winner: list[HeartbeatClaim] = []

    def look(at: Path, limit_bytes: int = 4096) -> claim.Seen | None:
        seen = really(at, limit_bytes)
        if not winner and seen is not None and seen.token == "dead" and at == path:
            path.unlink()
            winner.append(HeartbeatClaim(path, OWN, watch))
            monkeypatch.setattr(claim, "STALE_S", 1000.0)
        return seen

    monkeypatch.setattr(claim, "look_at", look)
    with pytest.raises(InUse):
        HeartbeatClaim(path, OWN, watch)
    monkeypatch.setattr(claim, "_LOOK_S", 0.0)
    winner[0].check()
    winner[0].release()
    assert os.listdir(path.parent) == []


def test_a_claim_given_back_while_the_disk_was_broken_is_free_at_once_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.claim"
    held = HeartbeatClaim(path, CacheUser(), Watch(), renewed=False)

    def broken(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as trouble:
        trouble.setattr(claim, "look_at", broken)
        held.release()
    assert path.exists()
    again = HeartbeatClaim(path, CacheUser(), Watch(), renewed=False)
    assert not again.inherited
    again.release()
    assert not path.exists()


def test_a_beat_that_comes_late_touches_no_other_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the descriptor belongs to somebody else when the claim was given back meanwhile."""
    entered, go = threading.Event(), threading.Event()
    utime = os.utime

    def slow(fd: int) -> None:
        entered.set()
        assert go.wait(10)
        utime(fd)

    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    monkeypatch.setattr(os, "utime", slow)
    held = HeartbeatClaim(path, OWN, Watch())
    (beat,) = (thread for thread in threading.enumerate() if thread.name == "claim x")
    assert entered.wait(10)
    held.release()
    with (path.parent / "other").open("wb") as other:
        utime(other.fileno(), (1, 1))
        go.set()
        beat.join(10)
        assert os.fstat(other.fileno()).st_mtime == 1


def test_a_file_that_is_replaced_again_and_again_is_looked_up_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS 4 client opens what it believes to have the name, and learns only at the next question that it is gone."""
    refreshed: list[Path] = []
    monkeypatch.setattr(claim, "refresh", refreshed.append)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def work() -> str:
        if len(refreshed) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return "read"

    assert unless_stale(work, tmp_path) == "read"
    assert refreshed == [tmp_path] * 3
    assert sum(waited) < 0.5


def test_what_stays_stale_or_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    for number in (errno.ESTALE, errno.EIO):
        with pytest.raises(OSError, match=os.strerror(number)):
            unless_stale(lambda number=number: fail(number), tmp_path)  # type: ignore[misc]


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


@pytest.mark.skipif(os.geteuid() != 0, reason="acts for another user")
def test_a_claim_is_taken_and_renewed_as_the_user_of_the_cache(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root is nobody on many file servers, also for the time of a file that is open."""
    nobody, path = CacheUser(65534, 65534), public_dir / "x.claim"
    os.chown(public_dir, 65534, 65534)
    renewed_as: list[int] = []
    third = threading.Event()

    def note(_fd: int) -> None:
        renewed_as.append(identity._current()[0])
        if len(renewed_as) == 3:
            third.set()

    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    monkeypatch.setattr(os, "utime", note)
    held = HeartbeatClaim(path, nobody, Watch())
    try:
        assert path.stat().st_uid == 65534
        assert third.wait(10)
        assert set(renewed_as) == {65534}
    finally:
        held.release()
    assert identity._current()[0] == 0
