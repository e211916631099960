"""For whom a request is: nobody but root speaks for others, and what root says of them need not be looked up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from uenvd.daemon import cached
from uenvd.daemon.cached import user_of
from uenvd.daemon.peer import Identity, Peer
from uenvd.errors import AccessDenied
from uenvd.protocol import Request

if TYPE_CHECKING:
    from uenvd.daemon.control import Connection

LOOKED_UP = Identity(1000, 1, (2, 3))


@pytest.fixture(autouse=True)
def database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "identity_of", lambda uid: LOOKED_UP if uid == LOOKED_UP.uid else None)


async def whose(peer_uid: int, **fields: Any) -> Identity:
    peer = Peer(1, Identity(peer_uid, peer_uid, ()))
    return await user_of(
        cast("Connection", SimpleNamespace(peer=peer)), Request(op="mount", uenv="a", **fields)
    )


async def test_a_user_speaks_for_himself_with_the_groups_that_the_kernel_tells() -> None:
    assert await whose(1000) == Identity(1000, 1000, ())
    assert await whose(1000, uid=1000, gid=7, groups=(8,)) == Identity(1000, 1000, ())


@pytest.mark.parametrize("fields", [{}, {"gid": 0, "groups": (0,)}])
async def test_nobody_but_root_speaks_for_others(fields: dict[str, Any]) -> None:
    with pytest.raises(AccessDenied, match="uid 1000 cannot speak for uid 1001"):
        await whose(1000, uid=1001, **fields)


async def test_root_may_say_the_groups_too_or_have_them_looked_up() -> None:
    assert await whose(0, uid=1000) == LOOKED_UP
    assert await whose(0, uid=1000, gid=5) == LOOKED_UP
    assert await whose(0, uid=1000, gid=5, groups=()) == Identity(1000, 5, ())
    assert await whose(0, uid=1001, gid=5, groups=(5, 6)) == Identity(1001, 5, (5, 6))
