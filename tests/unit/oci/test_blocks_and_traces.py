"""Block lists and traces: what is written is read back, what is damaged is refused."""

from __future__ import annotations

import hashlib
import random

import pytest

from uenvd.errors import ManifestError
from uenvd.oci.blocks import BlockList, Copy, in_common
from uenvd.oci.trace import coalesce, encode_trace, parse_trace

KB = 1 << 10


def listed(*blocks: bytes) -> BlockList:
    digests = b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in blocks)
    return BlockList(tuple(map(len, blocks)), digests)


def test_a_list_is_read_back_as_it_was_written() -> None:
    one = listed(b"a" * 10, b"b" * 20, b"c" * 30)
    assert BlockList.parse(one.encode(), 60) == one
    assert one.encode() == one.encode()


def test_a_damaged_list_is_refused() -> None:
    data = listed(*(bytes([n]) * (n + 1) for n in range(200))).encode()
    size = sum(range(1, 201))
    source = random.Random(3)
    for _ in range(500):
        wrong = bytearray(data)
        for _ in range(source.randint(1, 4)):
            wrong[source.randrange(len(wrong))] = source.randrange(256)
        try:
            found = BlockList.parse(bytes(wrong[: source.randint(0, len(wrong))]), size)
        except ManifestError:
            continue
        assert found.size_bytes == size
    with pytest.raises(ManifestError):
        BlockList.parse(data, size + 1)


def test_what_two_versions_share_is_found_wherever_it_lies() -> None:
    a, b, c, d = (bytes([n]) * (16 * KB) for n in range(4))
    old, new = listed(a, b, c), listed(d, a, b, c[:-1], c)
    assert in_common(new, old) == [
        Copy(0, 16 * KB, 32 * KB),
        Copy(32 * KB, 4 * 16 * KB - 1, 16 * KB),
    ]


def test_a_small_island_is_fetched_with_what_is_around_it() -> None:
    small, other, more = b"s" * 100, b"o" * 9000, b"m" * 9000
    assert in_common(listed(other, small, more), listed(small)) == []
    assert in_common(listed(small), listed(small)) == [Copy(0, 0, 100)]


def test_a_trace_is_bounded_by_the_image() -> None:
    data = encode_trace([(10, 20), (0, 5), (90, 200)])
    assert parse_trace(data, 100) == [(10, 20), (0, 5)]
    for wrong in (b"", b"[]", b'{"version": 2, "ranges": []}', b'{"version": 1, "ranges": [[1]]}'):
        with pytest.raises(ManifestError):
            parse_trace(wrong, 100)


def test_neighbours_of_a_trace_are_joined_and_the_first_stays_first() -> None:
    mb = 1 << 20
    ranges = [(50 * mb, 51 * mb), (0, 10), (51 * mb + 10, 52 * mb), (20, 30)]
    assert coalesce(ranges) == [(50 * mb, 52 * mb), (0, 30)]
