"""Whatever writers of a part do and whatever goes wrong: what a follower shows is right, and stays right in the file that its readers have.

``UENVD_FOLLOW_STEPS`` (default 600) random steps, from ``UENVD_FOLLOW_SEED`` on.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.publishing import make_squashfs
from uenvd.cache import blobs, partmap
from uenvd.cache.directory import Directory
from uenvd.cache.partial import Partial
from uenvd.cache.partmap import map_of
from uenvd.cache.partview import Gone
from uenvd.daemon import following
from uenvd.daemon.following import Following
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList, chunk_list
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.squashfs import Image

STEPS = int(os.environ.get("UENVD_FOLLOW_STEPS", "600"))
SEED = int(os.environ.get("UENVD_FOLLOW_SEED", "1"))


class World:
    """Writers, a follower, and everybody who has ever been given a file by it."""

    def __init__(
        self, root: Path, data: bytes, chunks: ChunkList, chance: random.Random, patch: pytest.MonkeyPatch
    ) -> None:
        self.data, self.chunks, self.chance, self.patch = data, chunks, chance, patch
        self.layer = Descriptor("application/octet-stream", digest_of(data), len(data))
        self.nodes = [Directory(root, node=name) for name in "ab"]
        for node in self.nodes:
            node.prepare()
        self.there = Directory(root, node="c")
        self.boots = 0
        self.part: Partial = self.nodes[0].begin(self.layer)
        self.wrong: set[int] = set()
        self.asleep: list[Partial] = []
        self.readers: list[tuple[int, OwnBoard]] = []
        self.follower: Following | None = None
        self.trouble = 0
        self.done = Counter[str]()
        self.follow()

    # -- the follower

    def follow(self) -> None:
        view = self.there.blobs.follow(self.layer.digest, self.layer.size_bytes)
        if view is None:
            return
        board = OwnBoard(self.chunks.lengths, 5.0)
        real_read, real_look = view.read, view.look

        def troubled(work: Callable[..., Any]) -> Callable[..., Any]:
            def attempt(*args: Any) -> Any:
                if self.trouble:
                    self.trouble -= 1
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return work(*args)

            return attempt

        view.read, view.look = troubled(real_read), troubled(real_look)  # type: ignore[method-assign]
        self.follower = Following("app", self.layer, self.chunks, board, view, changed=lambda: None)
        self.follower.want(0, 1)
        self.given = False

    def step(self) -> None:
        if self.follower is None:
            self.follow()
        if self.follower is None:
            return
        try:
            self.follower._step()
            if not self.given and self.follower._view.has_file:
                self.given = True
                self.readers.append((self.follower.open_for_reader(), self.follower._board))
        except Gone:
            self.done["gone"] += 1
            self.follower._view.close()
            self.follower = None
        self.check()

    def check(self) -> None:
        for fd, board in self.readers[-8:]:
            for number in range(board.count):
                if board.is_here(number):
                    first, end = board.span(range(number, number + 1))
                    assert os.pread(fd, end - first, first) == self.data[first:end], f"chunk {number}"

    # -- what writers do

    def span(self, number: int) -> tuple[int, int]:
        first = sum(self.chunks.lengths[:number])
        return first, first + self.chunks.lengths[number]

    def any_chunk(self) -> int:
        return self.chance.randrange(len(self.chunks))

    def write(self) -> None:
        first, end = self.span(self.any_chunk())
        self.part.write_at(first, self.data[first:end])

    def write_wrong(self) -> None:
        number = self.any_chunk()
        first, end = self.span(number)
        gaps = list(self.part.held.gaps(first, end))
        if gaps:
            self.part.write_at(first, self.chance.randbytes(end - first))
            self.wrong.add(number)

    def discard_wrong(self) -> None:
        for number in sorted(self.wrong):
            first, end = self.span(number)
            if self.part.covers(first, end):
                self.wrong.remove(number)
                # Only what is wrong: another writer may have written it anew.
                if self.part.read_at(first, end - first) != self.data[first:end]:
                    self.part.discard(first, end)
                    break

    def begin_again(self, *, other_boot: bool) -> None:
        self.part.keep()
        self._begin(other_boot=other_boot)

    def kill(self) -> None:
        """What was not recorded is not known to who goes on."""
        self.part._close()
        self._begin(other_boot=False)

    def crash(self) -> None:
        """Of the map is left what was durable, and some more."""
        self.part._close()
        path = map_of(self.part.path)
        text = path.read_bytes()
        os.truncate(path, self.chance.randrange(text.rfind(b"\nd\n") + 3, len(text) + 1))
        self._begin(other_boot=True)

    def _begin(self, *, other_boot: bool) -> None:
        if other_boot:
            self.boots += 1
            self.patch.setattr(partmap, "boot_id", lambda: f"boot{self.boots}")
        self.part = self.chance.choice(self.nodes).begin(self.layer)

    def abort(self) -> None:
        self.part.abort()
        self.wrong.clear()
        self.part = self.chance.choice(self.nodes).begin(self.layer)

    def take_over(self) -> None:
        """The writer sleeps; another node removes his claim and his part, and begins anew. He may wake up and write."""
        name = self.layer.digest[7:]
        self.asleep.append(self.part)
        self.there.blobs.claims.joinpath(f"{name}.claim").unlink()
        self.there.blobs.drop_part(name)
        self.wrong.clear()
        self.part = self.chance.choice(self.nodes).begin(self.layer)

    def write_in_sleep(self) -> None:
        if self.asleep:
            first, end = self.span(self.any_chunk())
            self.asleep[-1].write_at(first, self.data[first:end])

    def damage_map(self) -> None:
        path = map_of(self.part.path)
        what = self.chance.choice([b"\0\0\0\0", b"w 5", b"x\n", b"w 9 8\nd\n", b"w 0 99999999999\nd\n"])
        with path.open("ab") as file:
            file.write(what)

    def want(self) -> None:
        if self.follower is not None:
            self.follower.want(*self.span(self.any_chunk()))

    def break_files(self) -> None:
        self.trouble = self.chance.randrange(1, 4)

    def act(self) -> None:
        actions: list[tuple[str, int, Callable[[], object]]] = [
            ("want", 12, self.want),
            ("write", 12, self.write),
            ("write wrong bytes", 4, self.write_wrong),
            ("sync", 8, lambda: self.part.sync()),
            ("record", 3, lambda: self.part.record()),
            ("discard wrong bytes", 3, self.discard_wrong),
            ("go on, same boot", 1, lambda: self.begin_again(other_boot=False)),
            ("go on, other boot", 2, lambda: self.begin_again(other_boot=True)),
            ("kill", 2, self.kill),
            ("crash", 2, self.crash),
            ("abort", 1, self.abort),
            ("take over", 1, self.take_over),
            ("write after a sleep", 2, self.write_in_sleep),
            ("damage the map", 1, self.damage_map),
            ("trouble", 1, self.break_files),
        ]
        name, _weight, action = self.chance.choices(actions, [weight for _, weight, _ in actions])[0]
        self.done[name] += 1
        action()

    def finish(self) -> None:
        """All goes well from now on: everything that is wanted is shown."""
        self.trouble = 0
        self.part.write_at(0, self.data)
        while self.wrong:
            self.discard_wrong()
        self.part.discard(0, 0)  # what follows damage in a map is not seen before it is written anew
        self.part.write_at(0, self.data)
        self.part.sync()
        for _ in range(4):
            self.step()
        assert self.follower is not None
        self.follower.want(0, len(self.data))
        for _ in range(4 * len(self.chunks)):
            self.step()
        assert self.follower.tables_here
        assert not self.follower.waiting

    def end(self) -> None:
        if self.follower is not None:
            self.follower._view.close()
        for fd, board in self.readers:
            os.close(fd)
            board.close()
        for part in (*self.asleep, self.part):
            part.keep()


def test_what_is_shown_is_right_and_stays_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.0)
    for name in ("LOOK_S", "LONGEST_LOOK_S", "WISH_S", "RIGHT_SOON_S", "TROUBLE_S", "_CHECK_S"):
        monkeypatch.setattr(following, name, 0.0)
    files = {f"f{number}": random.Random(number).randbytes(150_000) for number in range(6)}
    data = make_squashfs(tmp_path / "a.squashfs", files).read_bytes()

    def read(first: int, size: int) -> bytes:
        return data[first : first + size]

    chunks = chunk_list(Image(read, len(data)), read, len(data))
    seed, done = SEED, Counter[str]()
    while done.total() < STEPS:
        world = World(tmp_path / f"shared{seed}", data, chunks, random.Random(seed), monkeypatch)
        try:
            for _ in range(150):
                world.act()
                world.step()
            world.finish()
        except BaseException:
            print(f"seed {seed}: {dict(world.done)}")
            raise
        finally:
            world.end()
        done += world.done
        seed += 1
    print(dict(done))
