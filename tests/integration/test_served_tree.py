"""A mounted image equals what unsquashfs makes of it, byte for byte and attribute for attribute, whoever serves it.

``channel`` and ``pyfuse3`` are the transports as ``uenvd-fs`` has them, ``supervised`` is what the daemon starts: the channel with a supervisor,
confined workers and the memory that they share. Another one joins by a name in ``SERVERS`` and a branch in `Serve`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from support import images
from support.forkedfs import ForkedFs, forked_fs
from support.fusetools import NOBODY, SOMEBODY, open_to_all, rss_bytes, run_as, served, session, until
from support.minidaemon import mini_daemon
from support.supervised import DUTY, group_of, supervised_at

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="test images hold devices and other users' files")

TRANSPORTS = ("pyfuse3", "channel")
SERVERS = (*TRANSPORTS, "supervised")


CACHE_BYTES = DUTY.cache_bytes
WORKERS = 2


class Serve:
    """``with serve(image) as directory``: the image, mounted. ``pids`` are those who serve the one mounted last."""

    def __init__(self, how: str, forked: ForkedFs) -> None:
        self.how = how
        self._forked = forked
        self._pid = 0

    @contextmanager
    def __call__(self, image: Path, *, allow_other: bool = False) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as base:
            directory = Path(base) / "mount"
            directory.mkdir()
            Path(base).chmod(0o755)  # pytest's own directories are closed to others
            with self._server(image, directory, allow_other) as self._pid:
                yield directory

    def _server(self, image: Path, directory: Path, allow_other: bool) -> AbstractContextManager[int]:
        if self.how == "supervised":
            return supervised_at(self._forked, image, directory, allow_other=allow_other)
        options = [f"transport={self.how}", f"cache={CACHE_BYTES >> 20}"]
        options += [f"workers={WORKERS}"] if self.how == "channel" else []
        options += ["allow_other"] if allow_other else []
        return self._forked.mounted(image, directory, "-o", ",".join(options))

    @property
    def pids(self) -> list[int]:
        if self.how == "supervised":
            return group_of(self._pid)
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text()
        return [self._pid, *map(int, children.split())]

    def resident(self) -> dict[int, int] | None:
        """How much memory each of the same has had; None while not all are there."""
        try:
            found = {pid: rss_bytes(pid) for pid in self.pids}
        except FileNotFoundError:
            return None
        count = {"pyfuse3": 1, "channel": 1 + WORKERS, "supervised": 2 + DUTY.workers}[self.how]
        return found if len(found) == count else None


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedFs]:
    with forked_fs() as running:
        yield running


@pytest.fixture(scope="module", params=SERVERS)
def serve(request: pytest.FixtureRequest, forked: ForkedFs) -> Serve:
    open_to_all()
    return Serve(request.param, forked)


@pytest.fixture(scope="module")
def big_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, with sizes around the borders of all block sizes."""
    return images.build_tree(tmp_path_factory.mktemp("big") / "tree")


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, in little."""
    directory = tmp_path_factory.mktemp("small") / "tree"
    return images.build_tree(directory, block_sizes=(4 << 10, 128 << 10), many=300, large_bytes=(1 << 20) + 5)


@pytest.fixture(scope="module")
def reference(
    big_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[bytes, images.Node]]:
    """The big image and what unsquashfs makes of it."""
    base = tmp_path_factory.mktemp("reference")
    image = images.make_image(big_tree, base / "image.squashfs")
    return image, images.scan(images.extract(image, base / "extracted"))


@pytest.fixture(scope="module")
def mounted(serve: Serve, reference: tuple[Path, dict[bytes, images.Node]]) -> Iterator[Path]:
    """The big image, mounted for others too."""
    with serve(reference[0], allow_other=True) as directory:
        yield directory


def test_equals_unsquashfs(mounted: Path, reference: tuple[Path, dict[bytes, images.Node]]) -> None:
    assert not images.differences(reference[1], images.scan(mounted))
    assert not images.differences(reference[1], images.scan(mounted)), (
        "the second time, from the kernel's caches"
    )


@pytest.mark.parametrize("block_size", [4 << 10, 128 << 10, 1 << 20])
@pytest.mark.parametrize("compressor", images.COMPRESSORS)
def test_compressors_and_block_sizes(
    serve: Serve, small_tree: Path, tmp_path: Path, compressor: str, block_size: int
) -> None:
    image = images.make_image(small_tree, tmp_path / "i", compressor=compressor, block_size=block_size)
    with serve(image) as directory:
        assert not images.differences(images.scan(small_tree), images.scan(directory))


@pytest.mark.parametrize(
    "options",
    [
        ["-no-fragments"],
        ["-always-use-fragments"],
        ["-noI", "-noD", "-noF", "-noX", "-noId"],
        ["-no-exports"],
        ["-no-xattrs"],
        ["-all-root"],
    ],
    ids=lambda options: " ".join(options),
)
def test_options_of_mksquashfs(serve: Serve, small_tree: Path, tmp_path: Path, options: list[str]) -> None:
    image = images.make_image(small_tree, tmp_path / "i", extra=options)
    expected = images.scan(images.extract(image, tmp_path / "extracted"))
    with serve(image) as directory:
        assert not images.differences(expected, images.scan(directory))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_offset_of_the_image_in_its_file(transport: str, small_tree: Path, tmp_path: Path) -> None:
    image = images.make_image(small_tree, tmp_path / "i")
    wrapped = tmp_path / "wrapped"
    wrapped.write_bytes(b"#" * 12345 + image.read_bytes())
    directory = tmp_path / "mount"
    directory.mkdir()
    with served(wrapped, directory, "offset=12345", transport=transport):
        assert not images.differences(images.scan(small_tree), images.scan(directory))


def test_hard_links_are_one_inode(mounted: Path) -> None:
    inodes = {(mounted / name).stat().st_ino for name in ("links/first", "links/second", "third")}
    assert len(inodes) == 1
    assert (mounted / "third").stat().st_nlink == 3


def test_dot_and_dot_dot(mounted: Path) -> None:
    done = subprocess.run(["ls", "-ia", str(mounted / "links")], capture_output=True, check=True)
    names = {line.split(maxsplit=1)[1]: int(line.split(maxsplit=1)[0]) for line in done.stdout.splitlines()}
    assert names[b"."] == (mounted / "links").stat().st_ino
    assert names[b".."] == mounted.stat().st_ino


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("nothing", errno.ENOENT),
        ("links/nothing", errno.ENOENT),
        ("many/file-99999-", errno.ENOENT),
        ("empty/below", errno.ENOTDIR),
        ("n" * 256, errno.ENAMETOOLONG),
        ("links/dangling", errno.ENOENT),
    ],
)
def test_what_is_not_there(mounted: Path, path: str, number: int) -> None:
    for _attempt in range(2):
        with pytest.raises(OSError) as caught:
            os.stat(mounted / path)
        assert caught.value.errno == number


def test_nothing_can_be_changed(mounted: Path) -> None:
    for attempt in (
        lambda: (mounted / "new").write_bytes(b""),
        lambda: (mounted / "one").write_bytes(b""),
        lambda: (mounted / "one").unlink(),
        lambda: (mounted / "one").chmod(0o777),
        lambda: (mounted / "d").mkdir(),
        lambda: os.setxattr(mounted / "one", "user.x", b""),
        lambda: os.utime(mounted / "one"),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_listing_from_any_place(mounted: Path) -> None:
    """A directory of 5,000 entries, by several readers at once, rewound in between: each sees each name once."""
    with ExitStack() as stack:
        iterators = [stack.enter_context(os.scandir(mounted / "many")) for _ in range(3)]
        seen: list[list[str]] = [[], [], []]
        rng = random.Random(1)
        live = [0, 1, 2]
        while live:
            which = rng.choice(live)
            for _ in range(rng.randrange(1, 400)):
                entry = next(iterators[which], None)
                if entry is None:
                    live.remove(which)
                    break
                seen[which].append(entry.name)
    for names in seen:
        assert len(names) == len(set(names)) == images.MANY


def test_random_reads(mounted: Path, big_tree: Path) -> None:
    rng = random.Random(2)
    for name in (
        "large",
        "random",
        "holes/alternate",
        "holes/middle",
        f"sizes/{(128 << 10) + 1}",
        "sizes/4097",
    ):
        expected = (big_tree / name).read_bytes()
        fd = os.open(mounted / name, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(40):
                offset = rng.randrange(len(expected) + 5000)
                size = rng.randrange(1, 200_000)
                assert os.pread(fd, size, offset) == expected[offset : offset + size]
        finally:
            os.close(fd)


def test_concurrent_readers(
    serve: Serve, reference: tuple[Path, dict[bytes, images.Node]], big_tree: Path
) -> None:
    """Eight readers of everything at once, cold, each in an order of its own."""
    names = [
        path for path, node in reference[1].items() if node.kind == "-" and not path.startswith(b"many/")
    ]
    expected = {name: (big_tree / os.fsdecode(name)).read_bytes() for name in names}
    wrong: list[bytes] = []
    with serve(reference[0]) as directory:

        def read_all(seed: int) -> None:
            order = list(names)
            random.Random(seed).shuffle(order)
            for name in order:
                if (directory / os.fsdecode(name)).read_bytes() != expected[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a reader hangs"
    assert not wrong


def test_program_and_mapped_file(serve: Serve, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["cp", "/bin/ls", str(tree / "ls")], check=True)
    image = images.make_image(tree, tmp_path / "i")
    with serve(image) as directory:
        done = subprocess.run([directory / "ls", str(directory)], capture_output=True, text=True, check=True)
        assert done.stdout == "ls\n"


def test_permissions_are_the_images(mounted: Path) -> None:
    code = f"""
import errno, os
def attempt(path):
    try:
        with open({str(mounted)!r} + '/' + path, 'rb') as file: return file.read()
    except OSError as error: return errno.errorcode[error.errno]
print([attempt(path) for path in ('hello.txt', 'modes/0644', 'modes/0600', 'modes/0000', 'modes/private/secret')])
"""
    for uid, gid, secret in (
        (NOBODY, NOBODY, "EACCES"),
        (SOMEBODY, SOMEBODY, "EACCES"),
        (12345, 54321, b"0600"),
    ):
        done = run_as(uid, code, gid=gid)
        assert done.stdout == f"{[b'hello' + bytes([10]), b'0644', secret, 'EACCES', 'EACCES']}\n", (
            done.stderr
        )


def test_without_allow_other_nobody_else_enters(serve: Serve, small_tree: Path, tmp_path: Path) -> None:
    image = images.make_image(small_tree, tmp_path / "i")
    with serve(image) as directory:
        code = f"import os\ntry: os.listdir({str(directory)!r})\nexcept OSError as e: print(e.errno)"
        assert run_as(NOBODY, code).stdout == f"{errno.EACCES}\n"


def test_statfs(mounted: Path, reference: tuple[Path, dict[bytes, images.Node]]) -> None:
    stats = os.statvfs(mounted)
    assert stats.f_bsize == 128 << 10
    assert 0 <= stats.f_blocks * stats.f_frsize - reference[0].stat().st_size < 128 << 10
    assert stats.f_bfree == stats.f_favail == 0
    assert stats.f_files == len({node.same_as for node in reference[1].values()})
    assert stats.f_namemax == 255


def test_memory_is_bounded(serve: Serve, tmp_path: Path) -> None:
    """Read much more than the cache holds, in blocks of 1 MiB that compress to almost nothing."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for i in range(40):
        (tree / f"{i}").write_bytes(b"%d" % i * (6 << 20))
    image = images.make_image(tree, tmp_path / "i", block_size=1 << 20)
    with serve(image) as directory:
        idle = until(serve.resident, "all its processes", 20)
        for i in range(40):
            with open(directory / f"{i}", "rb") as file:
                while file.read(1 << 20):
                    pass
        after = until(serve.resident, "all its processes", 20)
        # One that knows more may have taken the standby's place.
        assert len({*after} - {*idle}) <= (serve.how == "supervised")
        assert sum(after.values()) - sum(idle.values()) < 64 << 20


def test_supervised_server_shows_nothing_privileged(
    reference: tuple[Path, dict[bytes, images.Node]], tmp_path: Path
) -> None:
    """Through the daemon's worker all is the same but device numbers, setuid and setgid bits, and security attributes."""
    expected = {
        path: dataclasses.replace(
            node,
            rdev=0,
            mode=node.mode & ~(stat.S_ISUID | stat.S_ISGID),
            xattrs={name: value for name, value in node.xattrs.items() if not name.startswith("security.")},
        )
        for path, node in reference[1].items()
    }
    assert expected != reference[1]
    with mini_daemon(tmp_path / "work") as daemon:
        daemon.add("i", reference[0])
        clone = daemon.clone("i")
        with session(0, clone, "/mnt") as user:
            os.close(clone)
            actual = images.scan(Path(f"/proc/{user.process.pid}/root/mnt"))
        assert not images.differences(expected, actual)
