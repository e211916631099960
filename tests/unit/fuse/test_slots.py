"""Request slots: what a successor sees of its predecessor's request."""

from __future__ import annotations

import mmap
import os
import struct

import pytest

from uenvd.errors import InternalError
from uenvd.fuse.slots import BUFFER_BYTES, Slots


def request(unique: int, size: int = 48) -> bytes:
    return struct.pack("=IIQ", size, 15, unique).ljust(size, b"\1")


def test_life_of_a_request() -> None:
    slots = Slots(mmap.mmap(-1, Slots.size_bytes(3)), 3)
    slot = slots[1]
    assert [one.busy() for one in slots] == [False] * 3
    slot.buffer[:48] = request(7)
    assert [one.busy() for one in slots] == [False, True, False]
    assert (slot.unique, slot.length, slot.attempts, slot.started_ns) == (7, 48, 0, 0)
    assert [slot.begin(), slot.begin()] == [1, 2]
    assert slot.attempts == 2
    assert slot.started_ns > 0
    slot.parked = True
    assert slot.parked
    slot.rewind()
    assert (slot.busy(), slot.attempts, slot.parked) == (True, 0, False)
    slot.begin()
    slot.clear()
    assert (slot.busy(), slot.attempts, slot.started_ns, slot.unique) == (False, 0, 0, 0)
    assert slot.begun_ns > 0, "the only thing that is remembered"


def test_what_a_killed_process_had_in_hand_is_there() -> None:
    slots = Slots(mmap.mmap(-1, Slots.size_bytes(2)), 2)
    asked, ask = os.pipe()
    os.write(ask, request(99))
    pid = os.fork()
    if pid == 0:
        os.readv(asked, slots[0].vector)
        slots[0].begin()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert (slots[0].busy(), slots[0].unique, slots[0].attempts, slots[0].length) == (True, 99, 1, 48)
    os.close(asked)
    os.close(ask)


def test_a_length_beyond_the_buffer_is_cut() -> None:
    slots = Slots(memoryview(bytearray(Slots.size_bytes(1))), 1)
    slots[0].buffer[:48] = struct.pack("=IIQ", 1 << 30, 15, 1).ljust(48, b"\0")
    assert slots[0].length == BUFFER_BYTES


def test_some_are_a_workers_own_and_memory_must_do() -> None:
    memory = mmap.mmap(-1, Slots.size_bytes(4))
    slots = Slots(memory, 4)
    assert slots.some(2, 2) == (slots[2], slots[3])
    with pytest.raises(InternalError):
        Slots(memory, 5 * len(memory) // Slots.size_bytes(1))
