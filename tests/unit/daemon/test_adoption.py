"""What the next daemon finds behind the sockets of supervisors."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from uenvd.daemon import adoption
from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.supervision import HELLO_DEADLINE_S, receive, send
from uenvd.handover import Duty, Message, SupervisorState, WorkerReport

DUTY = Duty(name="one", label="app/1.0", source="uenvd:app")
STATE = SupervisorState("serving", 4711, workers=(1, 2), negotiated={})
Behaviour = Callable[[trio.socket.SocketType], Awaitable[None]]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[ImageDirectory]:
    made = ImageDirectory(tmp_path / "images")
    yield made
    made.close()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A character device that passes for ``/dev/fuse``."""
    descriptor = os.open("/dev/null", os.O_RDWR)
    assert stat.S_ISCHR(os.fstat(descriptor).st_mode)
    monkeypatch.setattr(adoption, "_DEVICE", os.fstat(descriptor).st_rdev)
    yield descriptor
    os.close(descriptor)


async def find(directory: ImageDirectory, *behaviours: Behaviour) -> list[adoption.Adopted]:
    """Look for what a supervisor offers that treats its visitors so, one after the other."""
    found: list[adoption.Adopted] = []
    with trio.socket.from_stdlib_socket(directory.listen("one")) as listener:
        async with trio.open_nursery() as nursery:

            async def be_supervisor() -> None:
                for behaviour in behaviours:
                    channel, _address = await listener.accept()
                    with channel:
                        await behaviour(channel)

            nursery.start_soon(be_supervisor)
            found = await adoption.find(directory, {}, resend=True)
            nursery.cancel_scope.cancel()
    return found


def answers(device: int) -> Behaviour:
    async def answer(channel: trio.socket.SocketType) -> None:
        message, _none = await receive(channel)
        assert (message.op, message.fields) == ("hello", {"adopt": True})
        state = Message("state", {"state": STATE.to_wire(), "duty": DUTY.to_wire()}, ("fuse", "slots"))
        await send(channel, state, [device, device])
        await send(channel, Message("report", {"report": json.loads(WorkerReport().encode())}))
        await trio.sleep_forever()

    return answer


async def hangs_up(channel: trio.socket.SocketType) -> None:
    await receive(channel)


async def refuses(channel: trio.socket.SocketType) -> None:
    await receive(channel)
    await channel.send(Message("refused").encode().replace(b'"v": 1', b'"v": 99'))


async def is_silent(_channel: trio.socket.SocketType) -> None:
    await trio.sleep_forever()


async def test_who_dies_while_it_is_asked_has_a_successor(directory: ImageDirectory, device: int) -> None:
    (one,) = await find(directory, hangs_up, hangs_up, answers(device))
    assert (one.duty, one.state, one.mount_fd) == (DUTY, STATE, None)
    one.close()


async def test_other_version_is_left_alone_at_once(
    directory: ImageDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    began_s = trio.current_time()
    assert await find(directory, refuses) == []
    assert trio.current_time() - began_s < HELLO_DEADLINE_S
    assert "version 99" in caplog.text
    assert directory.names() == ["one"]


async def test_who_does_not_answer_is_left_alone(
    directory: ImageDirectory, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    assert await find(directory, is_silent) == []
    assert "does not answer" in caplog.text
    assert directory.names() == ["one"]


async def test_where_nobody_listens_nothing_is_left(directory: ImageDirectory) -> None:
    directory.listen("one").close()
    assert await adoption.find(directory, {}, resend=True) == []
    assert directory.names() == []


@pytest.mark.parametrize("file", [None, (1, 2, 3, 4, 5)])
async def test_own_file_of_which_only_descriptors_are_left(
    directory: ImageDirectory, device: int, file: tuple[int, ...] | None
) -> None:
    """It can be gone on with if it is known which file it was."""
    duty = replace(DUTY, path="/home/user/app.squashfs", reader=(1000, 1000, ()))
    directory.record(duty, replace(STATE, file=file))
    stored = {"one": {"fuse": os.dup(device), "slots": os.dup(device)}}
    found = await adoption.find(directory, stored, resend=False)
    assert [(one.duty, one.state.file) for one in found] == ([] if file is None else [(duty, file)])
    for one in found:
        one.close()
