"""What was demanded comes although the connections that fill the rest have given way, by a remote whose bytes come when the test says so."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from uenvd.cache import transfer as transfer_module
from uenvd.cache.store import Store
from uenvd.cache.transfer import YIELD_S, Transfer, Tuning
from uenvd.errors import Cancelled
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.remote import Remote

MB = 1 << 20
UNIT = 64 << 10
DATA = random.Random(8).randbytes(16 * MB)
LAYER = Descriptor("x", digest_of(DATA), len(DATA))


class Gate:
    """Lets units through, as many as it was told."""

    def __init__(self) -> None:
        self._units = threading.Semaphore(0)

    def open(self, units: int = 1_000_000) -> None:
        self._units.release(units)

    def pass_through(self, cancelled: Callable[[], bool]) -> None:
        while not self._units.acquire(timeout=0.05):
            if cancelled():
                raise Cancelled("the test is over")


class Range:
    ignores_range = False
    trusted = True

    def __init__(self, first: int, end: int, gate: Gate, cancelled: Callable[[], bool]) -> None:
        self.first_byte = self._at = first
        self.end_byte = end
        self._gate = gate
        self._cancelled = cancelled

    def readinto(self, buffer: memoryview) -> int:
        self._gate.pass_through(self._cancelled)
        count = min(UNIT, len(buffer), self.end_byte - self._at)
        buffer[:count] = DATA[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        pass


class Gated:
    """A remote that asks a gate for each range; that of all others is `rest`."""

    def __init__(self) -> None:
        self.rest = Gate()
        self.gates: dict[int, Gate] = {}
        self.opened: list[int] = []

    def open_range(self, _repository: str, _layer: Descriptor, first: int, end: int, cancelled: Any) -> Range:
        self.opened.append(first)
        return Range(first, end, self.gates.get(first, self.rest), cancelled)


class Steady:
    """A pace that the test sets."""

    alone = is_timing_one = False
    decided = True

    def __init__(self, connections: int) -> None:
        self.allowed = connections

    def gained(self, _count: int, _now_s: float, _waited_s: float, _connections: int) -> None:
        pass

    def served(self) -> None:
        pass


def soon(condition: Callable[[], bool]) -> bool:
    """Wait for less than a connection gives way."""
    end_s = time.monotonic() + YIELD_S / 2
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.002)
    return True


@pytest.fixture
def remote() -> Gated:
    return Gated()


@pytest.fixture
def transfer(tmp_path: Path, remote: Gated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfer]:
    monkeypatch.setattr(transfer_module, "Pace", Steady)
    store = Store(tmp_path / "cache")
    store.prepare()
    with store.begin(LAYER) as partial:
        tuning = Tuning(connections=3, piece_bytes=4 * MB)
        moving = Transfer(cast("Remote", remote), "r", LAYER, partial, tuning=tuning)
        thread = threading.Thread(target=moving.run)
        try:
            moving.test_start = thread.start  # type: ignore[attr-defined]
            yield moving
            remote.rest.open()
            for gate in remote.gates.values():
                gate.open()
            thread.join(20)
            assert not thread.is_alive()
            partial.commit()
        finally:
            moving.stop()
            thread.join(20)
    assert (store.root / "blobs" / "sha256" / LAYER.digest[7:]).read_bytes() == DATA


def start(transfer: Transfer, connections: int) -> None:
    transfer._pace.allowed = connections
    transfer.test_start()  # type: ignore[attr-defined]


def test_a_connection_that_gave_way_goes_on_when_somebody_waits_for_what_it_brings(
    transfer: Transfer, remote: Gated
) -> None:
    far = 12 * MB
    remote.gates[far] = Gate()
    start(transfer, 1)
    remote.rest.open(1)
    assert soon(lambda: transfer.done_bytes == UNIT)
    transfer.demand(far, far + UNIT)
    assert soon(lambda: far in remote.opened)
    remote.rest.open()
    assert soon(lambda: transfer.done_bytes == 2 * UNIT), "what it was reading comes yet, then it gives way"
    transfer.demand(2 * UNIT + 100, 2 * UNIT + 200)
    assert soon(lambda: transfer.has(2 * UNIT + 100, 2 * UNIT + 200))


def test_connections_that_gave_way_do_not_count_against_those_for_demands(
    transfer: Transfer, remote: Gated
) -> None:
    first, second = 13 * MB, 14 * MB
    remote.gates = {first: Gate(), second: Gate()}
    start(transfer, 3)
    remote.rest.open(1)
    assert soon(lambda: len(remote.opened) == 3)
    transfer.demand(first, first + UNIT)
    assert soon(lambda: first in remote.opened)
    remote.rest.open()
    transfer._pace.allowed = 1
    transfer.demand(second, second + UNIT)
    assert soon(lambda: second in remote.opened)
    remote.gates[second].open()
    assert soon(lambda: transfer.has(second, second + UNIT))
