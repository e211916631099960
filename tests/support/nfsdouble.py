"""A client of a file server as NFS clients are, for kernels without one: a FUSE file system over a directory (the "server").

Each mount is one client in a process of its own. What it does as the Linux NFS client does (nfs(5), "Data and metadata coherence"):

* names and attributes, found or **not found**, are remembered for `REMEMBERED_S`;
* opening a directory asks the server whether it has changed, and forgets the remembered names below it if so;
* opening a file asks the server for its attributes and drops remembered data (close-to-open consistency); a file that is gone is ESTALE
  first, whereupon the kernel looks the name up again;
* a file that was removed on the server cannot be read any more, open or not: ESTALE;
* locks (flock) are this client's own business, as with ``local_lock=all`` or Lustre without ``-o flock``;
* with ``squash`` the server takes uid 0 for nobody;
* while there is a file `BROKEN` in the server's directory, every question to the server ends with EIO.

Run: ``python -m support.nfsdouble SERVER MOUNT [squash]``; it says ``ready`` on standard output.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REMEMBERED_S = 60.0
NOBODY = 65534
BROKEN = ".broken"


@contextmanager
def mounted(server: Path, mount: Path, *, squash: bool = False) -> Iterator[Path]:
    """Mount a client; the mount and its process are gone in the end."""
    mount.mkdir(parents=True, exist_ok=True)
    arguments = [str(server), str(mount), *(["squash"] if squash else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.nfsdouble", *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the double of an NFS client did not start"
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=False, stderr=subprocess.DEVNULL)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def main() -> None:
    import pyfuse3
    import trio

    from uenvd.cache.identity import CacheUser

    server, mount = Path(sys.argv[1]), sys.argv[2]
    squash = "squash" in sys.argv[3:]

    def caught(error: OSError) -> pyfuse3.FUSEError:
        return pyfuse3.FUSEError(error.errno or errno.EIO)

    class Client(pyfuse3.Operations):
        def __init__(self) -> None:
            super().__init__()
            self.paths: dict[int, Path] = {pyfuse3.ROOT_INODE: server}
            self.names: dict[int, set[bytes]] = {}
            self.directories: dict[int, int] = {}
            self.shown: dict[int, tuple[int, int]] = {}

        def acting(self, ctx: Any) -> CacheUser:
            uid = NOBODY if squash and ctx.uid == 0 else ctx.uid
            return CacheUser(uid, NOBODY if squash and ctx.gid == 0 else ctx.gid, ())

        def number(self, path: Path, status: os.stat_result) -> int:
            inode = pyfuse3.ROOT_INODE if path == server else status.st_ino
            self.paths[inode] = path
            return inode

        def attributes(self, path: Path, fd: int | None = None) -> Any:
            status = os.fstat(fd) if fd is not None else os.lstat(path)
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = self.number(path, status)
            for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"):
                setattr(entry, name, getattr(status, name))
            for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
                setattr(entry, name, getattr(status, name))
            entry.st_blksize, entry.st_blocks = 4096, status.st_blocks
            entry.entry_timeout = entry.attr_timeout = REMEMBERED_S
            self.shown[entry.st_ino] = (status.st_mtime_ns, status.st_size)
            return entry

        def attempt(self, ctx: Any, work: Callable[[], Any]) -> Any:
            if (server / BROKEN).exists():
                raise pyfuse3.FUSEError(errno.EIO)
            try:
                with self.acting(ctx):
                    return work()
            except OSError as error:
                raise caught(error) from None

        async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
            self.names.setdefault(parent, set()).add(name)
            try:
                return self.attempt(ctx, lambda: self.attributes(self.paths[parent] / os.fsdecode(name)))
            except pyfuse3.FUSEError as error:
                if error.errno != errno.ENOENT:
                    raise
                absent = pyfuse3.EntryAttributes()
                absent.st_ino = 0
                absent.entry_timeout = REMEMBERED_S
                return absent

        async def getattr(self, inode: int, ctx: Any = None) -> Any:
            try:
                return self.attributes(self.paths[inode])
            except OSError as error:
                raise caught(error) from None

        async def opendir(self, inode: int, ctx: Any) -> int:
            path = self.paths[inode]
            changed = self.attempt(ctx, lambda: (os.listdir(path), path.stat().st_mtime_ns)[1])
            if self.directories.get(inode) != changed:
                self.directories[inode] = changed
                # In a thread: the kernel waits for look-ups that we answer meanwhile.
                names, self.names[inode] = self.names.get(inode, set()), set()
                await trio.to_thread.run_sync(self.forget_names, inode, names)
            return inode

        def forget_names(self, inode: int, names: set[bytes]) -> None:
            for name in names:
                with suppress(OSError):
                    pyfuse3.invalidate_entry(inode, name)

        async def readdir(self, fh: int, start: int, token: Any) -> None:
            path = self.paths[fh]
            for index, name in enumerate(sorted(os.listdir(path))):
                if index < start:
                    continue
                try:
                    entry = self.attributes(path / name)
                except FileNotFoundError:
                    continue
                self.names.setdefault(fh, set()).add(os.fsencode(name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index + 1):
                    return

        async def open(self, inode: int, flags: int, ctx: Any) -> Any:
            path = self.paths[inode]
            try:
                fd = self.attempt(
                    ctx, lambda: os.open(path, flags & ~os.O_CREAT & ~os.O_EXCL | os.O_NOFOLLOW)
                )
            except pyfuse3.FUSEError as error:
                raise pyfuse3.FUSEError(
                    errno.ESTALE if error.errno == errno.ENOENT else error.errno
                ) from None
            status = os.fstat(fd)
            if status.st_ino != inode:
                os.close(fd)
                raise pyfuse3.FUSEError(errno.ESTALE)
            if self.shown.get(inode) != (status.st_mtime_ns, status.st_size):
                self.shown[inode] = (status.st_mtime_ns, status.st_size)
                await trio.to_thread.run_sync(self.forget_attributes, inode)
            return pyfuse3.FileInfo(fh=fd, keep_cache=False)

        def forget_attributes(self, inode: int) -> None:
            with suppress(OSError):
                pyfuse3.invalidate_inode(inode, attr_only=True)

        async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
            path = self.paths[parent] / os.fsdecode(name)
            self.names.setdefault(parent, set()).add(name)
            fd = self.attempt(ctx, lambda: os.open(path, flags | os.O_CREAT, mode))
            return pyfuse3.FileInfo(fh=fd), self.attributes(path, fd)

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            if (server / BROKEN).exists():
                raise pyfuse3.FUSEError(errno.EIO)
            if os.fstat(fh).st_nlink == 0:
                raise pyfuse3.FUSEError(errno.ESTALE)
            return os.pread(fh, size, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            if (server / BROKEN).exists():
                raise pyfuse3.FUSEError(errno.EIO)
            if os.fstat(fh).st_nlink == 0:
                raise pyfuse3.FUSEError(errno.ESTALE)
            try:
                return os.pwrite(fh, data, offset)
            except OSError as error:
                raise caught(error) from None

        async def release(self, fh: int) -> None:
            os.close(fh)

        async def fsync(self, fh: int, datasync: bool) -> None:
            if (server / BROKEN).exists():
                raise pyfuse3.FUSEError(errno.EIO)
            os.fsync(fh)

        async def fsyncdir(self, fh: int, datasync: bool) -> None:
            pass

        async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
            path: Any = self.paths[inode]

            def change() -> Any:
                where = fh if fh is not None else path
                if fields.update_mode:
                    os.chmod(where, attr.st_mode & 0o7777)
                if fields.update_uid or fields.update_gid:
                    uid = attr.st_uid if fields.update_uid else -1
                    os.chown(where, uid, attr.st_gid if fields.update_gid else -1)
                if fields.update_size:
                    os.truncate(where, attr.st_size)
                if fields.update_atime or fields.update_mtime:
                    status = os.stat(where)
                    now_ns = time.time_ns()
                    atime = attr.st_atime_ns or now_ns if fields.update_atime else status.st_atime_ns
                    mtime = attr.st_mtime_ns or now_ns if fields.update_mtime else status.st_mtime_ns
                    os.utime(where, ns=(atime, mtime))
                return self.attributes(path, fh)

            return self.attempt(ctx, change)

        async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
            path = self.paths[parent] / os.fsdecode(name)
            self.names.setdefault(parent, set()).add(name)
            self.attempt(ctx, lambda: os.mkdir(path, mode))
            return self.attributes(path)

        async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
            self.attempt(ctx, lambda: os.unlink(self.paths[parent] / os.fsdecode(name)))

        async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
            self.attempt(ctx, lambda: os.rmdir(self.paths[parent] / os.fsdecode(name)))

        async def rename(
            self, parent: int, old: bytes, new_parent: int, new: bytes, flags: int, ctx: Any
        ) -> None:
            source = self.paths[parent] / os.fsdecode(old)
            target = self.paths[new_parent] / os.fsdecode(new)
            self.names.setdefault(new_parent, set()).add(new)
            self.attempt(ctx, lambda: os.rename(source, target))
            self.paths[os.lstat(target).st_ino] = target

        async def link(self, inode: int, parent: int, name: bytes, ctx: Any) -> Any:
            path = self.paths[parent] / os.fsdecode(name)
            self.names.setdefault(parent, set()).add(name)
            if os.lstat(self.paths[inode]).st_ino != inode:
                raise pyfuse3.FUSEError(errno.ESTALE)  # LINK names a file handle, not a name
            self.attempt(ctx, lambda: os.link(self.paths[inode], path))
            return self.attributes(path)

        async def statfs(self, ctx: Any) -> Any:
            found, status = pyfuse3.StatvfsData(), os.statvfs(server)
            for name in (
                "f_bsize",
                "f_frsize",
                "f_blocks",
                "f_bfree",
                "f_bavail",
                "f_files",
                "f_ffree",
                "f_favail",
            ):
                setattr(found, name, getattr(status, name))
            return found

    options = set(pyfuse3.default_options) - {"default_permissions"} | {"fsname=nfsdouble", "allow_other"}
    pyfuse3.init(Client(), mount, options)
    print("ready", flush=True)
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    main()
