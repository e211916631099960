"""Requests that are cut off, changed or made up: an answer that the kernel takes, in bounded memory, or none; never an exception.

``UENVD_FUZZ_REQUESTS=100000`` makes the long run; ``COUNT:SEED`` repeats one.
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Iterator

import pytest

from support.images import build_tree, make_image
from uenvd.errors import ProtocolError
from uenvd.fuse.answers import MAX_PARTS, Answers
from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol import Negotiated, negotiate
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.tree import Tree

COUNT, _, SEED = os.environ.get("UENVD_FUZZ_REQUESTS", "4000").partition(":")
HEADER = struct.Struct("=IIQQIIIHH")
READ = struct.Struct("=QQIIQII")
LOOKUP, FORGET, GETATTR, READLINK, READ_OP, STATFS, RELEASE = 1, 2, 3, 5, 15, 17, 18
GETXATTR, LISTXATTR, INIT, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET, READDIRPLUS = (
    22,
    23,
    26,
    28,
    29,
    36,
    42,
    44,
)
FIXED = {LOOKUP: 128, GETATTR: 104, STATFS: 80, RELEASE: 0, RELEASEDIR: 0, 38: 0}
"""Size of the body of an answer that is no error."""
SILENT = {FORGET, INTERRUPT, BATCH_FORGET}
NAMES = (
    b"one",
    b"many",
    b"links",
    b"nothing",
    b"sizes",
    b"..",
    b".",
    b"n" * 255,
    b"n" * 300,
    b"\xff\n",
    b"a/b",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    base = tmp_path_factory.mktemp("fuzz")
    tree = build_tree(base / "tree", block_sizes=(4 << 10,), many=300, large_bytes=(1 << 20) + 5)
    image = make_image(tree, base / "image", block_size=4 << 10)
    fd = os.open(image, os.O_RDONLY)
    shared = SharedBlocks.create(1 << 20)
    yield Answers(Tree(fd, cache_bytes=1 << 20, shared=shared), Faults("fuzz"))
    os.close(shared.fd)
    os.close(fd)


def message(opcode: int, node: int, body: bytes = b"", unique: int = 2) -> bytes:
    return HEADER.pack(HEADER.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def reachable(answers: Answers) -> list[int]:
    """Inode numbers from a walk by READDIRPLUS, as the kernel does it."""
    found, waiting = [1], [1]
    while waiting:
        node, offset = waiting.pop(), 0
        while True:
            request = message(READDIRPLUS, node, READ.pack(0, offset, 4096, 0, 0, 0, 0))
            parts = answers.answer(request, len(request))
            assert parts is not None
            listing = b"".join(map(bytes, parts))[16:]
            if not listing:
                break
            for ino, after, name, kind in direntries(listing, plus=True):
                offset = after
                if name not in (b".", b".."):
                    found.append(ino)
                    if kind == 4:
                        waiting.append(ino)
    return found


def direntries(listing: bytes, *, plus: bool) -> Iterator[tuple[int, int, bytes, int]]:
    """Parse a listing as the kernel does (fs/fuse/readdir.c); AssertionError for what it refuses."""
    at = 0
    while at < len(listing):
        if plus:
            node = struct.unpack_from("=Q", listing, at)[0]
            assert node > 0
            at += 128
        assert len(listing) - at >= 24
        ino, offset, size, kind = struct.unpack_from("=QQII", listing, at)
        assert 0 < size <= 1024
        assert offset > 0
        name = listing[at + 24 : at + 24 + size]
        assert len(name) == size
        assert b"/" not in name
        assert b"\0" not in name
        yield ino, offset, name, kind
        at += 24 + size + -size % 8
    assert at == len(listing)


def check(request: bytes, parts: list[bytes | memoryview] | None) -> None:
    """Be the kernel that gets an answer (``fuse_dev_do_write``, ``copy_out_args`` and the callers)."""
    opcode, unique = struct.unpack_from("=IQ", request, 4) if len(request) >= 16 else (0, 0)
    if parts is None:
        assert len(request) < HEADER.size or opcode in SILENT
        return
    assert opcode not in SILENT
    assert 0 < len(parts) <= MAX_PARTS + 1
    reply = b"".join(map(bytes, parts))
    length, error, answered = struct.unpack_from("=IiQ", reply)
    assert (length, answered) == (len(reply), unique)
    assert -512 < error <= 0
    body = reply[16:]
    if error:
        assert not body
        return
    if opcode in FIXED:
        assert len(body) == FIXED[opcode]
    elif opcode in (READ_OP, READDIR, READDIRPLUS):
        room = struct.unpack_from("=I", request, HEADER.size + 16)[0]
        assert len(body) <= room
        if opcode != READ_OP:
            list(direntries(body, plus=opcode == READDIRPLUS))
    elif opcode in (GETXATTR, LISTXATTR):
        room = struct.unpack_from("=I", request, HEADER.size)[0]
        assert len(body) <= room if room else len(body) == 8
    elif opcode == READLINK:
        assert 0 < len(body) <= 4096
    else:
        raise AssertionError(f"opcode {opcode} was answered")


def made_up(rng: random.Random, nodes: list[int]) -> bytes:
    """Return a request like a kernel's, mostly about something that is there."""
    node = (
        rng.choice(nodes)
        if rng.random() < 0.9
        else rng.choice((0, 1, 2, 3, rng.getrandbits(64), rng.getrandbits(20)))
    )
    opcode = rng.choice(
        (
            LOOKUP,
            GETATTR,
            READLINK,
            READ_OP,
            READ_OP,
            READDIR,
            READDIRPLUS,
            GETXATTR,
            LISTXATTR,
            rng.randrange(60),
        )
    )
    body = b""
    if opcode in (READ_OP, READDIR, READDIRPLUS):
        offset = rng.choice((0, 0, 2, 300, 4096, 1 << 20, rng.getrandbits(22), rng.getrandbits(64)))
        body = READ.pack(
            0, offset, rng.choice((0, 1, 151, 4096, 32768, 1 << 20, rng.getrandbits(32))), 0, 0, 0, 0
        )
    elif opcode == LOOKUP:
        body = rng.choice(NAMES) + b"\0"
    elif opcode == GETXATTR:
        body = (
            struct.pack("=II", rng.choice((0, 1, 100, 65536)), 0)
            + rng.choice((b"user.a", b"user.long", b"x", b""))
            + b"\0"
        )
    elif opcode == LISTXATTR:
        body = struct.pack("=II", rng.choice((0, 1, 65536)), 0)
    return message(opcode, node, body, rng.getrandbits(63) | 1)


def mutated(rng: random.Random, request: bytes) -> bytes:
    data = bytearray(request)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        match rng.randrange(4):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data) + 1) :]
            case 2:
                data += rng.randbytes(rng.randrange(200))
            case _ if len(data) > 16:
                at = rng.randrange(len(data))
                data[at : at + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, rng.randbytes(8)))
    return bytes(data[:8192])


def test_requests(answers: Answers, caplog: pytest.LogCaptureFixture) -> None:
    nodes = reachable(answers)
    assert len(nodes) > 300
    seed = int(SEED or 6)
    rng = random.Random(seed)
    kinds: dict[tuple[int, bool], int] = {}
    for number in range(int(COUNT)):
        request = mutated(rng, made_up(rng, nodes))
        buffer = memoryview(
            bytearray(request.ljust(8192, b"\xa5"))
        )  # as in a slot: what a longer request left is behind it
        try:
            parts = answers.answer(buffer, len(request))
            check(request, parts)
        except BaseException as error:
            raise AssertionError(f"request {number} of seed {seed}: {request.hex()}: {error!r}") from error
        if parts:
            error_number = struct.unpack_from("=i", parts[0], 4)[0]
            key = (struct.unpack_from("=I", request, 4)[0], error_number == 0)
            kinds[key] = kinds.get(key, 0) + 1
    for opcode in (LOOKUP, GETATTR, READ_OP, READDIR, READDIRPLUS):
        assert kinds.get((opcode, True), 0) > int(COUNT) / 400, (
            f"opcode {opcode} was hardly ever answered: {kinds}"
        )
    assert not [record for record in caplog.records if record.exc_info], "a bug was logged as a fault"


def test_init_requests() -> None:
    seed = int(SEED or 6)
    rng = random.Random(seed)
    kernel = message(INIT, 0, struct.pack("=IIIII", 7, 45, 131072, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(44))
    agreed = 0
    for _ in range(int(COUNT) // 10):
        request = mutated(rng, kernel)
        try:
            reply, negotiated = negotiate(request)
        except ProtocolError:
            continue
        agreed += 1
        assert len(reply) == struct.unpack_from("=I", reply)[0] == 80
        assert struct.unpack_from("=i", reply, 4)[0] == 0
        assert Negotiated.from_wire(negotiated.to_wire()) == negotiated
    assert agreed


def test_errors_have_numbers_that_the_kernel_knows(answers: Answers) -> None:
    for node, opcode, expected in (
        (1, READ_OP, errno.EISDIR),
        (1, READLINK, errno.EINVAL),
        (0, GETATTR, errno.ESTALE),
        (1, 14, errno.ENOSYS),
        (1, 27, errno.ENOSYS),
    ):
        request = message(opcode, node, READ.pack(0, 0, 4096, 0, 0, 0, 0))
        parts = answers.answer(request, len(request))
        assert parts is not None
        assert struct.unpack_from("=Ii", parts[0]) == (16, -expected)
