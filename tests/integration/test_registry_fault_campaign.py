"""Random faults in registry, network and cache, many at a time: no wrong byte, no request without end, and all is well when they are gone.

``UENVD_FAULTS`` (default 60) faults are injected, from ``UENVD_FAULT_SEED`` on.
"""

import contextlib
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from support.registry import PASSWORD, USER, FakeRegistry
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.errors import UenvError
from uenvd.oci import mirrors as mirrors_module
from uenvd.oci import transport
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import no_progress, open_remote

FAULTS = int(os.environ.get("UENVD_FAULTS", "60"))
SEED = int(os.environ.get("UENVD_FAULT_SEED", "1"))
REPOSITORY = "deploy/demo/zen3/app/1.0"
PIECE = 32 << 10
DEADLINE_S = 8.0


def fault(chance: random.Random) -> dict[str, Any]:
    size = chance.randrange(PIECE)
    kinds: list[dict[str, Any]] = [
        {"corrupt": True},
        {"truncate_bytes": size},
        {"swap_bytes": 1 + size},
        {"reset": True},
        {"stall_bytes": size},
        {"silent": True},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 500},
        {"status": 503},
        {"status": 416, "headers": {"Content-Length": "1000000"}, "body": b"short"},
        {"status": 401, "headers": {"WWW-Authenticate": 'Bearer realm="http://127.0.0.1:1/token"'}},
        {"ignore_range": True},
        {"ignore_range": True, "truncate_bytes": 3 * size},
        {"shorter_bytes": 1 + size},
        {"extra_bytes": 1 + size},
        {"headers": {"Content-Range": "bytes 0-5/6"}},
        {"drip_headers_s": 0.1},
        {"body": b"x" * size},
    ]
    return chance.choice(kinds)


def harm_the_cache(store: Store, chance: random.Random) -> None:
    """What a disk or another program does to the parts while nobody writes them."""
    for path in (store.root / "partial").iterdir():
        size = path.stat().st_size
        if size and chance.random() < 0.5:
            with path.open("r+b") as file:
                if chance.random() < 0.5:
                    file.truncate(chance.randrange(size))
                else:
                    file.seek(chance.randrange(size))
                    file.write(bytes([chance.randrange(256)]))


def test_random_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(transfer_module, "BACKOFF_CAP_S", 0.05)
    monkeypatch.setattr(mirrors_module, "SKIP_S", 0.2)
    chance = random.Random(SEED)
    injected = outcomes = 0
    while injected < FAULTS:
        data = chance.randbytes(chance.randrange(1, 20 * PIECE))
        layer = Descriptor("application/x-squashfs", digest_of(data), len(data))
        store = Store(tmp_path / f"cache{injected}")
        store.prepare()
        auth = chance.choice(["none", "bearer"])
        with FakeRegistry(auth=auth) as fake, FakeRegistry() as mirror:
            for place in (fake, mirror):
                place.put_blob(data)
            remote = open_remote(
                parse_registry(fake.url),
                credential=Credential(USER, PASSWORD),
                timeout_connect_s=1,
                timeout_read_s=0.15,
                mirrors=[parse_registry(mirror.url)] if chance.random() < 0.3 else [],
            )
            tuning = Tuning(connections=chance.randrange(1, 5), piece_bytes=PIECE)
            for place in (fake, mirror):
                for _ in range(chance.randrange(1, 5)):
                    place.spoil("/blobs/", **fault(chance), times=chance.choice([1, 1, 2, 6, None]))
                    injected += 1
            for _ in range(2):
                begin = time.monotonic()

                def is_over(begin: float = begin, patience: float = chance.choice([0.2, 5.0])) -> bool:
                    return time.monotonic() - begin > patience

                with contextlib.suppress(UenvError):
                    pull_blob(
                        remote,
                        REPOSITORY,
                        layer,
                        store,
                        progress=no_progress,
                        cancelled=is_over,
                        tuning=tuning,
                    )
                    outcomes += 1
                assert time.monotonic() - begin < DEADLINE_S
                if not store.has(layer.digest):
                    harm_the_cache(store, chance)
                    injected += 1
            for place in (fake, mirror):
                place.spoils.clear()
            monkeypatch.setattr(mirrors_module, "SKIP_S", 0.0)
            end = time.monotonic() + 20
            pull_blob(
                remote,
                REPOSITORY,
                layer,
                store,
                progress=no_progress,
                cancelled=lambda end=end: time.monotonic() > end,  # type: ignore[misc]
                tuning=tuning,
            )
            remote.close()
            with os.fdopen(store.open(layer.digest), "rb") as file:
                assert file.read() == data
            assert list((store.root / "partial").iterdir()) == []
    print(f"{injected} faults, {outcomes} pulls succeeded in spite of them")
