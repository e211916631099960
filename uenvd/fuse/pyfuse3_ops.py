"""The image tree through pyfuse3 and libfuse: the portable transport.

The image never changes, so all that the kernel can be told to remember it remembers: entries, absent entries, attributes and pages for
good. FLUSH, ACCESS, POLL and, for an image without extended attributes, the xattr requests are answered with ENOSYS, after which the
kernel does not ask again. The file handle is the inode number: nothing is allocated at open.

Blocks are decoded in threads (as many at once as there are cores), each block once however many requests want it; what needs no waiting
is answered at once.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import select
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol.reply import Attributes
from uenvd.fuse.tree import NAME_MAX_BYTES, Part, Tree
from uenvd.squashfs import Block, Span

_FOREVER_S = 10 * 365 * 86400
_MAX_TASKS = 32
"""Requests in hand at once; each may hold a reply of 1 MiB."""
_ALONE_BYTES = 128 << 10
"""A lone request's block is decoded at once when it is stored in no more."""
_NUDGE_S = 0.1

Result = TypeVar("Result")
P = ParamSpec("P")


def _guarded(
    operation: Callable[Concatenate[Operations, P], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, Result]]:
    """Let nothing but `FUSEError` out of an operation: whatever else a request meets is its own fault, not the server's end."""

    @functools.wraps(operation)
    async def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return await operation(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary
            raise pyfuse3.FUSEError(self.faults.note(error)) from None

    return guarded


class Operations(pyfuse3.Operations):
    """`pyfuse3.Operations` over a `Tree`. One instance serves one session.

    Args:
        tree: the image.
        faults: where faults are noted.
        on_init: called once, when the kernel has begun the session.

    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, tree: Tree, faults: Faults, on_init: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.tree = tree
        self.faults = faults
        self._on_init = on_init
        self._limiter = trio.CapacityLimiter(len(os.sched_getaffinity(0)))
        self._loading: dict[Block, trio.Event] = {}
        self._in_threads = 0
        self._poll: select.poll | None = None

    def init(self) -> None:
        """Tell that the kernel has answered. pyfuse3 demands that nothing is raised here."""
        if self._on_init is not None:
            try:
                self._on_init()
            except Exception as error:  # noqa: BLE001 - the boundary
                self.faults.note(error)

    # -- metadata

    @_guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Look up an entry; an absent one is answered as inode 0, which the kernel remembers."""
        found = self.tree.lookup(parent_inode, name)
        if found is None:
            absent = pyfuse3.EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = _FOREVER_S
            return absent
        return self._entry(found)

    @_guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        return self._entry(self.tree.attributes(inode))

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        ino, mode, nlink, uid, gid, rdev, size_bytes, mtime_s, blocks = attributes
        entry.st_ino = ino
        entry.entry_timeout = entry.attr_timeout = _FOREVER_S
        entry.st_mode = mode
        entry.st_nlink = nlink
        entry.st_uid = uid
        entry.st_gid = gid
        entry.st_rdev = rdev
        entry.st_size = size_bytes
        entry.st_blocks = blocks
        entry.st_blksize = self.tree.block_size_bytes
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_s * 1_000_000_000
        return entry

    @_guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the target of a symbolic link."""
        return self.tree.readlink(inode)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a directory: the handle is its number."""
        return inode

    async def releasedir(self, fh: int) -> None:
        """Nothing to release."""

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Answer with the entries and their attributes that fit; an error behind the first entry is left for the next request."""
        replied = False
        with closing(self.tree.listing(fh, start_id)) as listing:
            try:
                for listed in listing:
                    entry = self._entry(listed.attributes)
                    if not pyfuse3.readdir_reply(token, listed.name, entry, listed.next_offset):
                        break
                    replied = True
            except Exception as error:
                if not replied:
                    raise
                self.faults.note(error)

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Describe the image: full, in blocks of the image's block size."""
        superblock = self.tree.image.superblock
        stats = pyfuse3.StatvfsData()
        stats.f_bsize = stats.f_frsize = superblock.block_size_bytes
        stats.f_blocks = -(-superblock.bytes_used // superblock.block_size_bytes)
        stats.f_bfree = stats.f_bavail = 0
        stats.f_files = superblock.inode_count
        stats.f_ffree = stats.f_favail = 0
        stats.f_namemax = NAME_MAX_BYTES
        return stats

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the value of an extended attribute."""
        if not self.tree.has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        value = self.tree.xattrs(inode).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @_guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Return the names of the extended attributes."""
        if not self.tree.has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return list(self.tree.xattrs(inode))

    # -- content

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file: the handle is its number; its pages stay cached. The kernel has refused writing already: the mount is read-only."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def release(self, fh: int) -> None:
        """Nothing to release."""

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return a piece of a file, exactly ``size`` bytes but at its end."""
        spans = self.tree.plan(fh, off, size)
        parts: list[Part | Exception | None] = [self.tree.peek(span) for span in spans]
        missing = [i for i, part in enumerate(parts) if part is None]
        if len(missing) == 1:
            if self._alone():
                parts[missing[0]] = self.tree.peek(spans[missing[0]], _ALONE_BYTES)
            if parts[missing[0]] is None:
                await self._fetch(spans, parts, missing[0])
        elif missing:
            async with trio.open_nursery() as nursery:
                for i in missing:
                    nursery.start_soon(self._fetch, spans, parts, i)
        done: list[Part] = []
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if part is None:
                raise RuntimeError("a part of a file was not fetched")
            done.append(part)
        if len(done) == 1:
            return done[0]  # type: ignore[return-value]  # pyfuse3 takes any buffer
        return b"".join(done)

    def _alone(self) -> bool:
        """Tell whether nobody else waits for this process, so that decoding at once costs nobody anything and saves a thread's way."""
        return self._poll is not None and self._in_threads == 0 and not self._poll.poll(0)

    def watch(self, device_fd: int) -> None:
        """Tell the descriptor of ``/dev/fuse`` that libfuse reads: to see whether requests wait, and see `_nudged`.

        From the main thread; takes the handler of SIGALRM.
        """
        signal.signal(signal.SIGALRM, _nothing)
        self._poll = select.poll()
        self._poll.register(device_fd, select.POLLIN)

    async def _fetch(self, spans: list[Span], parts: list[Part | Exception | None], i: int) -> None:
        """Put a part, or the error that kept it away, to its place."""
        try:
            parts[i] = await self._part(spans[i])
        except Exception as error:  # noqa: BLE001 - raised again by the request
            parts[i] = error

    async def _part(self, span: Span) -> Part:
        """Return a part from a thread; a request whose block is being decoded for another one waits without occupying a thread."""
        if not span.block.compressed:
            return await self._in_thread(span)
        while (other := self._loading.get(span.block)) is not None:
            await other.wait()
            part = self.tree.peek(span)
            if part is not None:
                return part
        event = self._loading[span.block] = trio.Event()
        try:
            return await self._in_thread(span)
        finally:
            del self._loading[span.block]
            event.set()

    async def _in_thread(self, span: Span) -> Part:
        with self._nudged():
            return await trio.to_thread.run_sync(self.tree.part, span, limiter=self._limiter)

    @contextmanager
    def _nudged(self) -> Iterator[None]:
        """Interrupt this process now and then while threads work for it.

        pyfuse3 reads ``/dev/fuse`` when poll says that a request is there, holding Python's lock. If the asker is killed between the two,
        the read waits for somebody's next request, and meanwhile no thread can finish. A signal ends such a read.
        """
        self._in_threads += 1
        if self._in_threads == 1 and self._poll is not None:
            signal.setitimer(signal.ITIMER_REAL, _NUDGE_S, _NUDGE_S)
        try:
            yield
        finally:
            self._in_threads -= 1
            if self._in_threads == 0 and self._poll is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)


async def serve(*, terminate_on_signal: bool) -> None:
    """Answer requests until the kernel ends the session, or until SIGTERM, SIGINT or SIGHUP where that is wanted.

    `pyfuse3.init` was called before. Must run in the main thread.
    """
    logging.getLogger("pyfuse3").setLevel(
        logging.CRITICAL
    )  # a reply to a request that was interrupted is no news
    async with trio.open_nursery() as nursery:
        if terminate_on_signal:
            await nursery.start(_terminate_on_signal)
        await pyfuse3.main(max_tasks=_MAX_TASKS)
        nursery.cancel_scope.cancel()


def _nothing(_number: int, _frame: object) -> None:
    """Handle SIGALRM: being called is all."""


async def _terminate_on_signal(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for _number in signals:
            pyfuse3.terminate()
            return
