import os
import threading
from collections.abc import Iterator

import pytest
import trio

from uenvd.daemon import disk
from uenvd.errors import NotFound, StorageError


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """Set: what hangs may go on."""
    event = threading.Event()
    yield event
    event.set()


async def until(condition: threading.Event) -> None:
    with trio.fail_after(20):
        while not condition.is_set():
            await trio.sleep(0.01)


async def test_results_and_errors_come_through() -> None:
    assert await disk.call(lambda a, b: a + b, 1, 2) == 3

    def absent() -> None:
        raise NotFound("no such blob")

    with pytest.raises(NotFound):
        await disk.call(absent)


async def test_a_file_system_that_hangs_is_an_error_in_time(hanging: threading.Event) -> None:
    with trio.fail_after(20), pytest.raises(StorageError, match="not answered"):
        await disk.call(hanging.wait, 60, deadline_s=0.05)


async def test_hanging_calls_leave_trios_own_threads_alone(hanging: threading.Event) -> None:
    async def hang() -> None:
        with pytest.raises(StorageError):
            await disk.call(hanging.wait, 60, deadline_s=0.3)

    async with trio.open_nursery() as nursery:
        for _ in range(disk.THREADS + 20):
            nursery.start_soon(hang)
        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(lambda: 1) == 1
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0


async def test_what_nobody_waits_for_any_more_is_disposed_of(hanging: threading.Event) -> None:
    closed = threading.Event()

    def dispose(fd: int) -> None:
        os.close(fd)
        closed.set()

    def opened() -> int:
        hanging.wait(60)
        return os.open("/dev/null", os.O_RDONLY)

    with pytest.raises(StorageError):
        await disk.call(opened, deadline_s=0.05, dispose=dispose)
    hanging.set()
    await until(closed)


async def test_what_the_caller_got_is_his() -> None:
    fd = await disk.call(os.open, "/dev/null", os.O_RDONLY, dispose=os.close)
    os.close(fd)


async def test_who_is_cancelled_does_not_wait(hanging: threading.Event) -> None:
    with trio.fail_after(20), trio.move_on_after(0.05) as scope:
        await disk.call(hanging.wait, 60)
    assert scope.cancelled_caught
