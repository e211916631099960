import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from uenvd.cache import partmap
from uenvd.cache.partial import Partial
from uenvd.cache.partmap import map_of, received_bytes
from uenvd.errors import DigestMismatch, InUse, StorageError
from uenvd.oci.manifest import Descriptor

DATA = bytes(range(256)) * 400
LAYER = Descriptor("x", "sha256:" + hashlib.sha256(DATA).hexdigest(), len(DATA))
HALF = len(DATA) // 2


class LostClaim:
    def __init__(self) -> None:
        self.lost = self.released = False

    def check(self) -> None:
        if self.lost:
            raise InUse("another node has it")

    def release(self) -> None:
        self.released = True


def begin(tmp_path: Path, claim: LostClaim | None = None) -> Partial:
    part = tmp_path / "blob.part"
    return Partial(LAYER, part, tmp_path / "blob", claim or LostClaim())


def test_bytes_in_any_order(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(HALF, DATA[HALF:])
        assert (partial.offset_bytes, partial.held_bytes) == (0, len(DATA) - HALF)
        partial.write_at(0, DATA[:HALF])
        assert partial.offset_bytes == len(DATA)
        assert partial.read_at(HALF - 10, 20) == DATA[HALF - 10 : HALF + 10]
        partial.commit()
    assert (tmp_path / "blob").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_what_was_recorded_is_continued_wherever_it_lies(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(1000, DATA[1000:2000])
        partial.write_at(HALF, DATA[HALF:])
    assert received_bytes(tmp_path / "blob.part") == 1000 + len(DATA) - HALF
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(1000, 2000), (HALF, len(DATA))]
        assert partial.resumed_bytes == partial.held_bytes
        for first, end in list(partial.held.gaps(0, len(DATA))):
            partial.write_at(first, DATA[first:end])
        partial.commit()
    assert (tmp_path / "blob").read_bytes() == DATA


def test_after_a_power_failure_only_what_was_durable_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA[:1000])
        partial.sync()
        partial.write_at(5000, DATA[5000:6000])
    monkeypatch.setattr(partmap, "boot_id", lambda: "another-boot")
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 1000)]
        partial.write_at(2000, DATA[2000:3000])
    monkeypatch.setattr(partmap, "boot_id", lambda: "a-third-boot")
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 1000)], "what was durable stays so in a new map"


class Interrupted(Partial):
    """Other threads write while it makes durable what there is."""

    def _flush(self) -> None:
        super()._flush()
        self.write_at(5000, DATA[5000:6000])
        self.record()


def test_what_is_written_while_the_rest_is_made_durable_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Interrupted(LAYER, tmp_path / "blob.part", tmp_path / "blob", LostClaim()) as partial:
        partial.write_at(0, DATA[:1000])
        partial.sync()
        assert partial.undurable_bytes == 1000
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 1000), (5000, 6000)]
    monkeypatch.setattr(partmap, "boot_id", lambda: "another-boot")
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 1000)]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\0" * 100,
        b"uenvd-map-1 5 x\nw 0 5\n",
        b"uenvd-map-1 102400 BOOT\nw 0 1000\nw 5 3\nw 2000 3000\n",
        b"uenvd-map-1 102400 BOOT\nw 0 1000\n\0\0\0\0\0\0\nw 2000 3000\n",
        b"uenvd-map-1 102400 BOOT\nw 0 1000\nw 2000 30",
        b"uenvd-map-1 102400 BOOT\nw 0 1000\nw -5 3\nw 0 99999999999999999999999\nw 0 102401\n",
    ],
)
def test_a_damaged_map_is_believed_up_to_the_damage(tmp_path: Path, damage: bytes) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA)
    boot = partmap.boot_id().encode()
    map_of(tmp_path / "blob.part").write_bytes(damage.replace(b"BOOT", boot))
    with begin(tmp_path) as partial:
        assert list(partial.held) in ([], [(0, 1000)])
        assert bool(partial.held_bytes) == (b"BOOT" in damage)


def test_a_map_does_not_speak_for_bytes_that_are_not_in_the_file(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA)
    os.truncate(tmp_path / "blob.part", 5000)
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 5000)]
    (tmp_path / "blob.part").unlink()
    with begin(tmp_path) as partial:
        assert partial.held_bytes == 0, "the map of a part that was removed is nobody's"
    (tmp_path / "blob.part").write_bytes(DATA + b"more")
    with begin(tmp_path) as partial:
        assert partial.held_bytes == 0


def test_wrong_bytes_are_forgotten_for_good(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA[:1000] + bytes(1000) + DATA[2000:])
        partial.catch_up()
        partial.discard(1000, 2000)
        assert partial.offset_bytes == 1000
    with begin(tmp_path) as partial:
        assert list(partial.held) == [(0, 1000), (2000, len(DATA))]
        partial.write_at(1000, DATA[1000:2000])
        partial.commit()
    assert (tmp_path / "blob").read_bytes() == DATA


def test_the_whole_is_checked(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA[:-1] + b"?")
        with pytest.raises(DigestMismatch):
            partial.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_lost_claim_neither_commits_nor_removes(tmp_path: Path) -> None:
    claim = LostClaim()
    partial = begin(tmp_path, claim)
    partial.write_at(0, DATA)
    claim.lost = True
    with pytest.raises(InUse):
        partial.commit()
    assert claim.released and (tmp_path / "blob.part").exists() and not (tmp_path / "blob").exists()
    claim = LostClaim()
    partial = begin(tmp_path, claim)
    claim.lost = True
    partial.abort()
    assert (tmp_path / "blob.part").exists()


def test_nobody_writes_after_the_end(tmp_path: Path) -> None:
    partial = begin(tmp_path)
    stop = threading.Event()
    ends: list[BaseException] = []

    def write() -> None:
        try:
            while not stop.is_set():
                partial.write_at(0, DATA[:5000])
        except InUse as error:
            ends.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    partial.keep()
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    for thread in threads:
        thread.join(10)
    stop.set()
    for file in files:
        os.close(file)
    assert len(ends) == 4, "and not a write into a file that got the same number"


def test_bytes_outside_of_the_blob(tmp_path: Path) -> None:
    with begin(tmp_path) as partial:
        for first, data in ((-1, b"x"), (len(DATA), b"x"), (len(DATA) - 1, b"xy")):
            with pytest.raises(ValueError, match="no part"):
                partial.write_at(first, data)
        with pytest.raises(ValueError, match="not there"):
            partial.read_at(0, 1)


# --- the end --------------------------------------------------------------------------------------------------------------------------


def test_a_sleeper_does_not_publish_what_has_the_name_of_its_part_now(tmp_path: Path) -> None:
    """It looked at its claim, slept, was replaced, and wakes up just before it publishes."""

    class Sleeper(LostClaim):
        def check(self) -> None:
            (tmp_path / "blob.part").unlink()
            (tmp_path / "blob.part").write_bytes(b"what a successor has so far")

    partial = begin(tmp_path, Sleeper())
    partial.write(DATA)
    with pytest.raises(InUse, match="successor"):
        partial.commit()
    assert not (tmp_path / "blob").exists()
    assert (tmp_path / "blob.part").read_bytes() == b"what a successor has so far"


def test_a_blob_that_somebody_published_meanwhile_stays_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    inode = (tmp_path / "blob").stat().st_ino
    with begin(tmp_path) as partial:
        partial.write(DATA)
        partial.commit()
    assert (tmp_path / "blob").stat().st_ino == inode, "who reads it on another node would get ESTALE"
    assert received_bytes(tmp_path / "blob.part") == 0


def test_a_crash_between_the_two_names_does_not_open_the_blob_for_writing(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    os.link(tmp_path / "blob", tmp_path / "blob.part")
    with begin(tmp_path) as partial:
        assert partial.held_bytes == 0
        partial.write(b"\0" * 100)
    assert (tmp_path / "blob").read_bytes() == DATA


def test_without_hard_links_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object, **_more: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    with begin(tmp_path) as partial:
        partial.write(DATA)
        partial.commit()
    assert (tmp_path / "blob").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    """A late answer with wrong bytes for a range that was hashed already would spoil a blob whose digest was right."""
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA[:HALF])
        partial.catch_up()
        partial.write_at(HALF - 100, b"\xff" * 100 + DATA[HALF:])
        partial.commit()
    assert (tmp_path / "blob").read_bytes() == DATA


def test_a_write_that_hangs_holds_nobody_up_and_keeps_the_claim_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def hanging(fd: int, data: bytes, at: int) -> int:
        inside.set()
        assert go_on.wait(20)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", hanging)
    claim = LostClaim()
    partial = begin(tmp_path, claim)
    writer = threading.Thread(target=partial.write_at, args=(0, DATA[:HALF]))
    writer.start()
    try:
        assert inside.wait(20)
        assert partial.stuck_s >= 0.0
        partial.keep()
        assert not claim.released, "a successor would share the file with the writer"
    finally:
        go_on.set()
        writer.join(20)
    assert claim.released
    assert partial.stuck_s == 0.0


def break_once(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Let a call fail once, as fsync(2) does: the next one says nothing of what was lost."""
    real = getattr(os, call)
    failed: list[int] = []

    def fail_once(fd: int) -> None:
        if failed:
            real(fd)
        else:
            failed.append(fd)
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail_once)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_what_could_not_be_stored_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """NFS takes bytes and refuses them later; a disk that fails keeps them in memory only. Whoever asks again is told that all is well."""
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA)
        break_once(monkeypatch, call, number)
        with pytest.raises(StorageError):
            if call == "fsync":
                partial.commit()
            else:
                partial.sync()
        if call == "fdatasync":
            with pytest.raises(StorageError, match="could not be stored"):
                partial.commit()
    assert list(tmp_path.iterdir()) == []
    with begin(tmp_path) as partial:
        assert partial.resumed_bytes == 0


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("stat_works", [True, False])
def test_a_file_that_a_successor_removed_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stat_works: bool
) -> None:
    """NFS says it in several ways, and may still show the attributes from before."""
    fstat = os.fstat
    gone = OSError(number, os.strerror(number))

    def link(*_args: object, **_kwargs: object) -> None:
        partial.path.unlink()
        if not stat_works:
            monkeypatch.setattr(os, "fstat", lambda fd: fail(gone) if fd == partial._fd else fstat(fd))
        raise gone

    with begin(tmp_path) as partial:
        partial.write(DATA)
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(InUse, match="removed by a successor"):
            partial.commit()
    assert not (tmp_path / "blob").exists()


def fail(error: OSError) -> NoReturn:
    raise error


def test_a_file_that_is_gone_while_it_is_read_back_belongs_to_a_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(tmp_path) as partial:
        partial.write_at(0, DATA)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_args: fail(OSError(errno.ESTALE, os.strerror(errno.ESTALE))))
            with pytest.raises(InUse, match="removed by a successor"):
                partial.commit()


@pytest.mark.parametrize("end", ["keep", "abort", "commit"])
def test_an_end_that_the_server_refuses_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """close(2) of a file on NFS writes what is left, and says what became of it."""
    close = os.close
    claim = LostClaim()
    partial = begin(tmp_path, claim)
    partial.write_at(0, DATA[:HALF])
    fd = partial._fd

    def refuse(number: int) -> None:
        close(number)
        if number == fd:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refuse)
        if end == "commit":
            partial.write_at(HALF, DATA[HALF:])
            partial.commit()
            assert (tmp_path / "blob").read_bytes() == DATA, "it was durable before it had its name"
        else:
            getattr(partial, end)()
    assert claim.released
    with begin(tmp_path) as partial:
        assert partial.resumed_bytes == 0, "nobody knows what of it is there"
