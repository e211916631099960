"""Mutated images through the whole server: mounted, walked and read. Never a crash, a hang, too much memory, or anything but what is there.

``UENVD_FUZZ_IMAGES=COUNT`` or ``COUNT:FIRST`` runs more, or others, than `COUNT`: 20,000 take about half an hour. An image depends on its variant
and number alone; of each one that does not pass the line says which it is, and those that found a fault once stay in `KEPT`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support import images
from support.forkedfs import ForkedFs, forked_fs
from support.fusetools import has_ended, open_to_all, rss_bytes, until
from support.mutants import (
    CHECKSUMMED,
    VARIANTS,
    Comparison,
    Outcome,
    checksummed_places,
    make_originals,
    mutant,
    mutant_under_checksum,
    open_bytes,
)
from uenvd import mounts
from uenvd.errors import FormatError, StorageError
from uenvd.squashfs import Kind

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")

TRANSPORTS = ("pyfuse3", "channel")
COUNT = 100
"""Images of each transport in an ordinary run."""
KEPT: tuple[tuple[str, int], ...] = ()
"""Variant and number."""
CACHE_MIB = 16
MEMORY_BYTES = 96 << 20
"""Of one process at its highest: Python and the modules, the cache, what a request works on."""
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """By variant."""
    open_to_all()
    return make_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkedFs]:
    """What starts the servers."""
    with forked_fs() as running:
        yield running


@pytest.fixture(params=TRANSPORTS)
def bench(request: pytest.FixtureRequest, server: ForkedFs, tmp_path: Path) -> Bench:
    return Bench(server, tmp_path, request.param)


def planned() -> Iterator[tuple[str, int]]:
    """Yield (variant, number): what was kept, then as many as asked for, the variants in turn."""
    count, _, first = os.environ.get("UENVD_FUZZ_IMAGES", str(COUNT)).partition(":")
    yield from KEPT
    names = list(VARIANTS)
    for number in range(int(first or 0), int(first or 0) + int(count)):
        yield names[number % len(names)], number


class Bench:
    """Serves one image after the other at one place."""

    def __init__(self, server: ForkedFs, directory: Path, transport: str) -> None:
        self._server = server
        self._words = ("-o", f"transport={transport}", "-o", f"cache={CACHE_MIB}")
        self._image = directory / "image"
        self._point = directory / "mount"
        self._point.mkdir()
        self._device = self._point.stat().st_dev
        self.peak_bytes = 0

    def serve(self, data: bytes) -> Outcome | None:
        """Serve, walk, compare, unmount. None: the image was refused. AssertionError: a crash, a hang, too much memory."""
        self._image.write_bytes(data)
        pid = self._server.start(self._image, self._point, *self._words)
        ended: list[int | None] = [None]

        def ready() -> bool:
            ended[0] = self._server.status(pid)
            return ended[0] is not None or self._point.lstat().st_dev != self._device

        try:
            until(ready, "the mount or the refusal", DEADLINE_S)
            if ended[0] is not None:
                assert os.WIFEXITED(ended[0]), f"the server ended with {ended[0]}"
                assert os.WEXITSTATUS(ended[0]) in (FormatError.exit_status, StorageError.exit_status)
                assert refused(data), "refused, and the reader opens it"
                return None
            outcome = self._walk(data)
            pids = [pid, *children(pid)]
            peak = max(map(rss_bytes, pids))
            self.peak_bytes = max(self.peak_bytes, peak)
            assert peak < MEMORY_BYTES, f"{peak >> 20} MiB in one process"
            assert not any(map(has_ended, pids)), "a process of the server died"
            self._server.end(pid, self._point)
            return outcome
        finally:
            with suppress(OSError):
                mounts.umount(self._point, detach=True)
            if not has_ended(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _walk(self, data: bytes) -> Outcome:
        done: list[Outcome | BaseException] = []

        def work() -> None:
            try:
                done.append(Comparison(self._point, data).run())
            except BaseException as error:
                done.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(DEADLINE_S)
        assert done, "a reader hangs"
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def refused(data: bytes) -> bool:
    """Tell whether the reader refuses the image or its root, too."""
    try:
        image = open_bytes(data)
        return image.inode(image.root).kind is not Kind.DIRECTORY
    except FormatError:
        return True


def test_originals(bench: Bench, originals: dict[str, bytes]) -> None:
    """The comparison itself finds nothing to complain about."""
    for name, data in originals.items():
        outcome = bench.serve(data)
        assert outcome is not None, name
        assert not outcome.wrong, name
        assert outcome.errors == 0
        assert outcome.inodes == 72


def test_any_damage(bench: Bench, originals: dict[str, bytes]) -> None:
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for variant, number in planned():
        data = mutant(originals[variant], f"{variant}:{number}")
        try:
            outcome = bench.serve(data)
        except AssertionError as error:
            wrong.append(f"({variant!r}, {number}): {error}")
            outcome = None
        if outcome is not None:
            wrong += [f"({variant!r}, {number}): {line}" for line in outcome.wrong]
        seen["refused" if outcome is None else "with errors" if outcome.errors else "clean"] += 1
        assert len(wrong) < 50, wrong
    print(f"{dict(seen)}, highest memory {bench.peak_bytes >> 20} MiB", file=sys.stderr)
    assert not wrong, "\n".join(wrong)
    assert min(seen["refused"], seen["with errors"], seen["clean"]) > COUNT // 20


def test_damage_under_a_checksum_is_an_error_or_nothing(
    bench: Bench, originals: dict[str, bytes], tmp_path: Path
) -> None:
    """What is readable is what was packed."""
    for variant in CHECKSUMMED:
        original = originals[variant]
        places = checksummed_places(original)
        good = tmp_path / "good"
        good.write_bytes(original)
        nodes = images.read_image(good)
        failed = 0
        for number in range(max(8, int(os.environ.get("UENVD_FUZZ_IMAGES", str(COUNT)).split(":")[0]) // 20)):
            data = mutant_under_checksum(original, places, f"{variant}:{number}")
            outcome = bench.serve(data)
            if outcome is None:
                failed += 1
                continue
            assert not outcome.wrong, (variant, number)
            failed += bool(outcome.errors)
            bad = tmp_path / "bad"
            bad.write_bytes(data)
            with suppress(FormatError):
                # What the mount showed is what the reader sees; what the reader sees as a whole is the original.
                assert not images.differences(nodes, images.read_image(bad)), (variant, number)
        assert failed > 0
