"""Test images: a source tree with everything that a squashfs image can hold, mksquashfs, and what a tree looks like afterwards.

`build_tree` needs root (device nodes, foreign owners, ``trusted.`` attributes). `scan` describes any tree: the source, what unsquashfs
extracted, a mount; two of them are equal when their scans are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uenvd.squashfs import Image, Inode, Kind

COMPRESSORS = ("gzip", "lzo", "lzma", "xz", "lz4", "zstd")
BLOCK_SIZES = (4 << 10, 128 << 10, 1 << 20)
LARGE_BYTES = (5 << 20) + 123
MANY = 5000

_T0_S = 1_600_000_000
_LONG_NAME = b"n" * 255
_CAPABILITY = struct.pack(
    "<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0
)  # VFS_CAP_REVISION_2, effective, CAP_NET_RAW
_FIXED_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""SOURCE_DATE_EPOCH together with a time option makes mksquashfs 4.5.1 abort, so nothing of the caller's environment is passed."""


PathOf = Callable[[bytes | str], bytes]
"""A name in the tree -> its full path."""


def content(size_bytes: int, seed: int) -> bytes:
    """Return bytes that compress to about a third; no two 4 KiB pieces are equal."""
    rng = random.Random(seed)
    parts = []
    for at in range(0, size_bytes, 4096):
        parts.append(rng.randbytes(1024) + f"{seed}:{at} ".encode() * 400)
    return b"".join(part[:4096].ljust(4096, b".") for part in parts)[:size_bytes]


def build_tree(
    directory: Path,
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    many: int = MANY,
    large_bytes: int = LARGE_BYTES,
    special: bool = True,
) -> Path:
    """Make the tree in ``directory`` (which is created) and return it. Deterministic, times included; about 15 MB, 6 with holes.

    Args:
        directory: where to.
        block_sizes: files of sizes around the multiples of these are made.
        many: number of files in the directory ``many``; 5,000 give it an index.
        large_bytes: size of the file ``large``.
        special: also what needs root: devices, other owners, a file nobody may read, ``trusted.`` and ``security.`` attributes.
    """
    directory.mkdir(parents=True)
    root = os.fsencode(directory)

    def path(name: bytes | str) -> bytes:
        return os.path.join(root, name.encode() if isinstance(name, str) else name)

    def write(name: bytes | str, data: bytes, mode: int = 0o644) -> bytes:
        with open(path(name), "xb") as file:
            file.write(data)
        os.chmod(path(name), mode)
        return path(name)

    def make_dir(name: bytes | str, mode: int = 0o755) -> None:
        os.mkdir(path(name))
        os.chmod(path(name), mode)

    write("empty", b"")
    write("one", b"1")
    write("hello.txt", b"hello\n", 0o755)
    make_dir("sizes")
    for block_size in block_sizes:
        for size in (block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 77):
            write(f"sizes/{size}", content(size, size))
    write("large", content(large_bytes, 1))
    write("random", random.Random(2).randbytes(300_000))
    make_dir("holes")
    _write_holes(path, max(block_sizes))

    make_dir("links")
    write("links/first", content(9000, 3))
    os.link(path("links/first"), path("links/second"))
    os.link(path("links/first"), path("third"))
    os.symlink(b"first", path("links/relative"))
    os.symlink(b"/nowhere/at all", path("links/dangling"))
    os.symlink(b"x" * 4095, path("links/longest"))
    os.symlink(b"\xff\xfe/caf\xe9", path("links/not-utf-8"))

    make_dir("names")
    write(b"names/" + _LONG_NAME, b"long\n")
    write(b"names/caf\xe9 \xff\xfe", b"latin-1\n")
    write("names/smörgås \N{SNOWMAN}", b"utf-8\n")
    write(b"names/new\nline\t\x01", b"control\n")
    write(b"names/ ", b"space\n")
    make_dir(b"names/" + b"d" * 255)
    write(b"names/" + b"d" * 255 + b"/inside", b"inside\n")

    make_dir("modes")
    for mode in (0o600, 0o644, 0o755, 0o4755, 0o2755, 0o1644, 0o7777, *((0o000,) if special else ())):
        write(f"modes/{mode:04o}", b"%04o" % mode, mode)
    make_dir("modes/sticky", 0o1777)
    make_dir("modes/setgid", 0o2775)
    make_dir("modes/private", 0o700)
    write("modes/private/secret", b"secret\n", 0o600)

    deep = "deep"
    make_dir(deep)
    for level in range(60):
        deep += f"/{level}"
        make_dir(deep)
    write(deep + "/bottom", b"bottom\n")
    make_dir("no-files")

    make_dir("many")
    for i in range(many):
        with open(path(f"many/file-{i:05}-{'abcdefgh' * (i % 4)}"), "xb") as file:
            file.write(b"%d\n" % i if i % 100 == 0 else b"")

    os.mkfifo(path("fifo"))
    os.link(path("fifo"), path("links/fifo"))
    os.mknod(path("socket"), stat.S_IFSOCK | 0o755)
    os.setxattr(write("attributes", b"x"), "user.comment", b"a comment\0with NUL")
    if special:
        _make_special(path)
    _set_times(root)
    return directory


def _write_holes(path: PathOf, block_size_bytes: int) -> None:
    """Files with holes: nothing but, at the start, in the middle, at the end, in turn with data; and zeros that were written."""
    size = 3 * block_size_bytes + 1000
    sparse: dict[str, tuple[tuple[int, bytes], ...]] = {
        "all": (),
        "start": ((2 * block_size_bytes, b"end of it"),),
        "middle": ((0, b"start"), (size - 5, b"stop!")),
        "end": ((0, content(5000, 4)),),
        "alternate": tuple((i * 8192, b"data %d" % i) for i in range(12)),
    }
    for name, pieces in sparse.items():
        with open(path(f"holes/{name}"), "xb") as file:
            file.truncate(size)
            for at, data in pieces:
                file.seek(at)
                file.write(data)
    with open(path("holes/zeros-written"), "xb") as file:
        file.write(bytes(20_000))


def _make_special(path: PathOf) -> None:
    """What only root can make."""
    for name, kind, device in (
        ("null", stat.S_IFCHR, os.makedev(1, 3)),
        ("char-large", stat.S_IFCHR, os.makedev(511, 70_000)),
        ("block", stat.S_IFBLK, os.makedev(7, 300)),
    ):
        os.mknod(path(name), kind | 0o640, device)
    os.setxattr(path("null"), "trusted.device", b"on a device")
    for name, uid, gid in (
        ("hello.txt", 1000, 100),
        ("modes/0600", 12345, 54321),
        ("modes/private", 65534, 65534),
        ("no-files", 0, 4_000_000),
    ):
        os.chown(path(name), uid, gid)
    os.chown(path("links/relative"), 1000, 1000, follow_symlinks=False)
    os.setxattr(path("attributes"), "trusted.note", b"\0\1\2" * 10)
    os.setxattr(path("attributes"), "user.empty", b"")
    os.setxattr(path("links/dangling"), "trusted.on-a-link", b"yes", follow_symlinks=False)
    os.setxattr(path("no-files"), "user.on-a-directory", b"yes")
    os.setxattr(path("fifo"), "security.on-a-fifo", b"yes")
    os.setxattr(path("modes/0755"), "security.capability", _CAPABILITY)
    # Long values that are equal are stored once, out of line.
    for name in ("one", "random", "many"):
        os.setxattr(path(name), "user.long", content(2500, 5))
        os.setxattr(path(name), f"trusted.{name}", content(300, 6))


def _set_times(root: bytes) -> None:
    """Give each inode its own time, from its path."""
    for parent, directories, files in os.walk(root, topdown=False):
        for name in (*sorted(directories), *sorted(files), b"."):
            target = os.path.join(parent, name)
            # The least of the names of a hard-linked file: the last call of several would win.
            if not os.path.isdir(target) and os.lstat(target).st_nlink > 1:
                time_s = _T0_S
            else:
                time_s = _T0_S + int.from_bytes(
                    hashlib.sha256(os.path.relpath(target, root)).digest()[:3], "little"
                )
            os.utime(target, (time_s, time_s), follow_symlinks=False)


def make_image(
    tree: Path,
    out: Path,
    *,
    compressor: str = "zstd",
    block_size: int = 128 << 10,
    extra: Sequence[str] = (),
    append: bool = False,
) -> Path:
    """Run mksquashfs and return ``out``; the same tree gives the same bytes.

    Args:
        tree: the directory that becomes the root of the image.
        out: the image, replaced if there.
        compressor: see `COMPRESSORS`.
        block_size: in bytes.
        extra: more options, at the end of the command line.
        append: add to the image ``out`` instead (its compressor and block size stay).
    """
    command = [
        "mksquashfs",
        str(tree),
        str(out),
        "-no-progress",
        "-quiet",
        "-mkfs-time",
        str(_T0_S),
        "-processors",
        "2",
    ]
    if append:
        command += ["-no-recovery"]
    else:
        command += ["-noappend", "-comp", compressor, "-b", str(block_size)]
    done = subprocess.run(
        [*command, *extra], env=_FIXED_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return out


def extract(image: Path, directory: Path) -> Path:
    """Unpack the image with unsquashfs into ``directory`` (which must not exist) and return it."""
    command = ["unsquashfs", "-no-progress", "-quiet", "-d", str(directory), str(image)]
    done = subprocess.run(
        command, env=_FIXED_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return directory


@dataclass(frozen=True)
class Node:
    """What there is to say about one path of a tree."""

    kind: str
    """The letter of ``ls -l``: ``-``, ``d``, ``l``, ``b``, ``c``, ``p``, ``s``."""
    mode: int
    uid: int
    gid: int
    mtime_s: int
    size_bytes: int
    """Of files and symbolic links; 0 for all others, whose sizes depend on the file system."""
    nlink: int
    """0 for directories, for the same reason."""
    rdev: int
    same_as: bytes
    """The first (by bytes) of all paths of this inode."""
    content: str
    """SHA-256 of a file's bytes, target of a symbolic link (repr), else empty."""
    xattrs: dict[str, bytes] = field(default_factory=dict)


def scan(
    directory: Path, *, xattrs: bool = True, prefixes: Iterable[str] = ("user.", "trusted.", "security.")
) -> dict[bytes, Node]:
    """Describe the tree: path relative to ``directory`` (the root is ``b"."``) -> node. Symbolic links are not followed."""
    root = os.fsencode(directory)
    found: dict[bytes, Node] = {}
    first: dict[int, bytes] = {}
    wanted = tuple(prefixes)
    for path in sorted(_walk(root)):
        full = os.path.join(root, path)
        status = os.lstat(full)
        kind = stat.filemode(status.st_mode)[0]
        text = ""
        if kind == "-":
            with open(full, "rb") as file:
                text = hashlib.file_digest(file, "sha256").hexdigest()
        elif kind == "l":
            text = repr(os.readlink(full))
        found[path] = Node(
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_s=int(status.st_mtime),
            size_bytes=status.st_size if kind in "-l" else 0,
            nlink=0 if kind == "d" else status.st_nlink,
            rdev=status.st_rdev if kind in "bc" else 0,
            same_as=first.setdefault(status.st_ino, path),
            content=text,
            xattrs=_xattrs(full, wanted) if xattrs else {},
        )
    return found


def _walk(root: bytes) -> Iterable[bytes]:
    yield b"."
    for parent, directories, files in os.walk(root):
        for name in (*directories, *files):
            yield os.path.relpath(os.path.join(parent, name), root)


def _xattrs(path: bytes, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        raise
    return {
        name: os.getxattr(path, name, follow_symlinks=False) for name in names if name.startswith(prefixes)
    }


def differences(expected: dict[bytes, Node], actual: dict[bytes, Node]) -> list[str]:
    """Return one line for each path that differs, at most 20: a readable assertion for ``assert not differences(a, b)``."""
    lines = [
        f"{path!r}:\n  expected {expected.get(path)}\n  actual   {actual.get(path)}"
        for path in sorted(expected.keys() | actual.keys())
        if expected.get(path) != actual.get(path)
    ]
    return lines[:20]


_KIND_LETTERS = {
    Kind.FILE: "-",
    Kind.DIRECTORY: "d",
    Kind.SYMLINK: "l",
    Kind.BLOCK_DEVICE: "b",
    Kind.CHAR_DEVICE: "c",
    Kind.FIFO: "p",
    Kind.SOCKET: "s",
}


def open_image(path: Path) -> Image:
    """Return the reader on an image that is loaded into memory."""
    data = path.read_bytes()
    return Image(lambda pos, size: data[pos : pos + size], len(data))


def read_image(path: Path) -> dict[bytes, Node]:
    """Describe the tree of an image as `scan` does, through `uenvd.squashfs` alone."""
    data = path.read_bytes()
    image = Image(lambda pos, size: data[pos : pos + size], len(data))
    inodes: dict[bytes, Inode] = {}

    def walk(prefix: bytes, directory: Inode) -> None:
        for entry in image.entries(directory):
            inode = image.child(entry)
            inodes[prefix + entry.name] = inode
            if entry.kind is Kind.DIRECTORY:
                walk(prefix + entry.name + b"/", inode)

    root = image.inode(image.root)
    inodes[b"."] = root
    walk(b"", root)
    found: dict[bytes, Node] = {}
    first: dict[int, bytes] = {}
    for name, inode in sorted(inodes.items()):
        text = ""
        if inode.kind is Kind.FILE:
            text = hashlib.sha256(read_all(image, inode, data)).hexdigest()
        elif inode.kind is Kind.SYMLINK:
            text = repr(image.symlink_target(inode))
        found[name] = Node(
            kind=_KIND_LETTERS[inode.kind],
            mode=inode.mode,
            uid=inode.uid,
            gid=inode.gid,
            mtime_s=inode.mtime_s,
            size_bytes=inode.size_bytes if inode.kind in (Kind.FILE, Kind.SYMLINK) else 0,
            nlink=0 if inode.kind is Kind.DIRECTORY else inode.nlink,
            rdev=inode.rdev,
            same_as=first.setdefault(inode.inode_number, name),
            content=text,
            xattrs={key.decode(): value for key, value in image.xattrs(inode).items()},
        )
    return found


def read_all(image: Image, inode: Inode, data: bytes, offset: int = 0, size: int | None = None) -> bytes:
    """Return the file's bytes ``offset .. offset + size`` by its spans; ``data`` is the whole image."""
    spans = image.spans(inode, offset, inode.size_bytes if size is None else size)
    blocks = (span.block for span in spans)
    stored = (data[block.pos_bytes : block.pos_bytes + block.stored_bytes] for block in blocks)
    return b"".join(
        span.cut(image.decode(span.block, part)) for span, part in zip(spans, stored, strict=True)
    )
