import errno
import os
from pathlib import Path

import pytest

from uenvd.fuse import killed
from uenvd.fuse.killed import is_being_killed, release_killed
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol.request import HEADER, Opcode
from uenvd.fuse.slots import Slot, Slots

DYING = (
    "Name:\tcat\nState:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000100\nSigBlk:\t0\n"
)
ALIVE = "Name:\tcat\nState:\tS (sleeping)\nSigPnd:\t0000000000002000\nShdPnd:\t0000000000004002\nSigBlk:\t0\n"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (DYING, True),
        (ALIVE, False),
        (DYING.replace("ShdPnd:\t0000000000000100", "ShdPnd:\t0"), True),
        (DYING.replace("SigPnd:\t0000000000000100", "SigPnd:\t0"), True),
        ("", False),
        ("SigPnd:\n", False),
        ("SigPnd:\tdamaged\n", False),
    ],
)
def test_only_a_pending_kill_counts(status: str, expected: bool) -> None:
    assert is_being_killed(status) is expected


def test_this_process_lives() -> None:
    assert not is_being_killed(Path("/proc/self/status").read_text())


@pytest.fixture
def slots() -> Slots:
    return Slots(memoryview(bytearray(Slots.size_bytes(3))), 3)


def park(slot: Slot, unique: int, pid: int) -> None:
    slot.buffer[: HEADER.size] = HEADER.pack(80, Opcode.READ, unique, 1, 0, 0, pid, 0, 0)
    slot.begin()
    slot.park()


def test_who_is_killed_and_waits_for_bytes_is_answered_and_nobody_else(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    park(slots[0], 40, os.getpid())
    park(slots[1], 42, 2**22 + 7)  # nobody has this number
    slots[2].buffer[: HEADER.size] = HEADER.pack(80, Opcode.READ, 44, 1, 0, 0, os.getpid(), 0, 0)
    reader, writer = os.pipe()
    try:
        assert release_killed(slots, writer) == 0
        monkeypatch.setattr(killed, "is_being_killed", lambda _status: True)
        assert release_killed(slots, writer) == 1
        assert os.read(reader, 100) == r.refusal(40, errno.EINTR)
        assert slots[0].unique == 40, "the slot is its worker's"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_slot_that_was_taken_anew_meanwhile_is_left_alone(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    park(slots[0], 40, os.getpid())

    def meanwhile(_status: str) -> bool:
        park(slots[0], 46, 1)
        return True

    monkeypatch.setattr(killed, "is_being_killed", meanwhile)
    assert release_killed(slots, -1) == 0


def test_a_connection_that_is_over_is_no_error(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    park(slots[0], 40, os.getpid())
    monkeypatch.setattr(killed, "is_being_killed", lambda _status: True)
    assert release_killed(slots, -1) == 0
