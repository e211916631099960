"""The block cache: one decode a block, bounded, errors shared."""

from __future__ import annotations

import threading

import pytest

from uenvd.errors import FormatError
from uenvd.fuse.blocks import BlockCache
from uenvd.squashfs import Block


def block(number: int) -> Block:
    return Block(number * 1000, 100, True, 1000)


def keep_all(_data: bytes) -> bool:
    return True


def never(_block: Block) -> bytes:
    raise AssertionError("decoded again")


def test_least_recently_used_goes_first() -> None:
    cache = BlockCache(3000)
    for number in range(3):
        cache.put(block(number), bytes(1000))
    assert cache.get(block(0)) is not None
    cache.put(block(3), bytes(1000))
    assert [cache.get(block(number)) is not None for number in range(4)] == [True, False, True, True]
    assert cache.used_bytes == 3000


def test_bound_holds_for_blocks_of_any_size() -> None:
    cache = BlockCache(2500)
    cache.put(block(0), bytes(2501))
    assert cache.used_bytes == 0
    for number in range(50):
        cache.put(block(number), bytes(number * 37))
        cache.put(block(number), bytes(number * 37))
        assert cache.used_bytes <= 2500


def test_nothing_is_kept_that_is_not_worth_it() -> None:
    cache = BlockCache(2500)
    assert cache.load(block(0), lambda _block: b"x", keep=lambda _data: False) == b"x"
    assert cache.get(block(0)) is None


def test_many_threads_one_decode() -> None:
    cache = BlockCache(1 << 20)
    release, entered = threading.Event(), threading.Event()
    decodes: list[Block] = []

    def decode(wanted: Block) -> bytes:
        decodes.append(wanted)
        entered.set()
        assert release.wait(10)
        return b"data"

    results: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(cache.load(block(1), decode, keep=lambda _data: False))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    assert cache.load(block(2), lambda _block: b"other", keep=keep_all) == b"other", (
        "other blocks do not wait"
    )
    release.set()
    for thread in threads:
        thread.join(10)
    assert results == [b"data"] * 8
    assert len(decodes) <= 8  # a thread that came late decodes anew: the block was not worth keeping
    assert cache.load(block(2), never, keep=keep_all) == b"other"


@pytest.mark.parametrize("error", [FormatError("bad"), OSError(5, "Input/output error"), MemoryError()])
def test_error_reaches_all_who_wait_and_is_forgotten(error: Exception) -> None:
    cache = BlockCache(1 << 20)
    release, entered = threading.Event(), threading.Event()

    def decode(_block: Block) -> bytes:
        entered.set()
        assert release.wait(10)
        raise error

    met: list[Exception] = []

    def load() -> None:
        try:
            cache.load(block(1), decode, keep=keep_all)
        except Exception as caught:
            met.append(caught)

    first = threading.Thread(target=load)
    first.start()
    assert entered.wait(10)
    others = [threading.Thread(target=load) for _ in range(3)]
    for thread in others:
        thread.start()
    release.set()
    for thread in (first, *others):
        thread.join(10)
    assert [type(caught) for caught in met] == [type(error)] * 4
    assert cache.load(block(1), lambda _block: b"good now", keep=keep_all) == b"good now"
