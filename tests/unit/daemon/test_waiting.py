"""`wait`: whatever happens to the images while the client is being told how it goes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from uenvd.config import Config, RegistryConfig
from uenvd.daemon.control import Connection
from uenvd.daemon.leases import Lease
from uenvd.daemon.meanings import Meanings
from uenvd.daemon.peer import Identity
from uenvd.daemon.requests import Wanted
from uenvd.daemon.served import FileSource, Served
from uenvd.daemon.service import Service
from uenvd.errors import FormatError, SessionError
from uenvd.label import Description
from uenvd.protocol import Request

OWNER = Identity(1000, 1000, ())


def make_service(served: Served, views: tuple[Any, ...] = ()) -> Service:
    config = Config(system="demo", registry=RegistryConfig("x"))
    anything = cast("Any", None)
    catalogue = cast("Any", SimpleNamespace(remote=None, meanings=Meanings(0.0)))
    service = Service(config, catalogue=catalogue, store=anything, pulls=anything, served=anything)
    wanted = Wanted(Description(None, "/x.squashfs", "/user-environment"), None, "/x.squashfs")
    lease = Lease(OWNER, [wanted], views, ["/user-environment"], None, [served], name="l")
    service._leases._by_name["l"] = lease
    return service


async def wait_while(happens: Callable[[Served], None]) -> dict[str, Any]:
    """Wait for an image to which something happens while the first progress event is sent."""
    served = Served("/x.squashfs", FileSource("/x.squashfs", OWNER), state="starting")
    service = make_service(served)

    async def send(_frame: object) -> None:
        happens(served)
        await trio.lowlevel.checkpoint()

    connection = SimpleNamespace(peer=SimpleNamespace(identity=OWNER), send=send)
    with trio.fail_after(5):
        answer = await service.handle(cast("Connection", connection), Request(op="wait", lease="l"))
    return answer.frame


async def test_the_image_becomes_ready_meanwhile() -> None:
    frame = await wait_while(lambda served: served.set_state("serving"))
    assert frame["ok"]


async def test_the_image_fails_meanwhile() -> None:
    def fail(served: Served) -> None:
        served.error = FormatError("damaged")
        served.set_state("failed")

    with pytest.raises(FormatError):
        await wait_while(fail)


async def test_the_image_is_gone_meanwhile() -> None:
    with pytest.raises(SessionError):
        await wait_while(lambda served: served.set_state("gone"))
