"""Random faults in registry, network and cache, many at a time: no wrong byte, no request without end, and all is well when they are gone.

``UENVD_FAULTS`` (default 60) faults are injected, from ``UENVD_FAULT_SEED`` on; ``make faults`` injects 2,000.
"""

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.harm import Place, places
from support.puller import Pullers
from support.registry import PASSWORD, USER, FakeRegistry
from uenvd.cache import blobs as blobs_module
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.transfer import Tuning
from uenvd.errors import UenvError
from uenvd.oci import mirrors as mirrors_module
from uenvd.oci import transport
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.mirrors import MirroredRemote
from uenvd.oci.reference import parse_registry
from uenvd.oci.registry import RegistryRemote
from uenvd.oci.remote import Remote, open_remote

FAULTS = int(os.environ.get("UENVD_FAULTS", "60"))
SEED = int(os.environ.get("UENVD_FAULT_SEED", "1"))
REPOSITORY = "deploy/demo/zen3/app/1.0"
PIECE = 32 << 10
DEADLINE_S = 8.0
PATIENT_S = 5.0


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
        {"status": 401},
        {"status": 429},
        {"status": 503, "headers": {"Retry-After": "1"}},
        {"ignore_range": True},
        {"ignore_range": True, "truncate_bytes": 3 * size},
        {"shorter_bytes": 1 + size},
        {"extra_bytes": 1 + size},
        {"headers": {"Content-Range": "bytes 0-5/6"}},
        {"drip_headers_s": 0.1},
        {"body": b"x" * size},
    ]
    return chance.choice(kinds)


class Round:
    """One blob, one cache, one set of tuning; requests for it with and without trouble."""

    def __init__(self, place: Place, chance: random.Random) -> None:
        self.place, self.chance = place, chance
        self.data = chance.randbytes(chance.randrange(1, 20 * PIECE))
        self.layer = Descriptor("application/x-squashfs", digest_of(self.data), len(self.data))
        self.store = place.store()
        self.tuning = Tuning(connections=chance.randrange(1, 5), piece_bytes=PIECE)

    def pull(self, remote: Remote, patience_s: float, at: Callable[[], None] | None = None) -> str:
        """Ask for the blob; return how that ended: its error's code. ``at`` is called once, when the first bytes are there."""
        begin_s = time.monotonic()
        waiting = [at] if at is not None else []

        def progress(done_bytes: int, _total_bytes: int) -> None:
            if done_bytes and waiting:
                waiting.pop()()

        try:
            pull_blob(
                remote,
                REPOSITORY,
                self.layer,
                self.store,
                progress=progress,
                cancelled=lambda: time.monotonic() - begin_s > patience_s,
                tuning=self.tuning,
            )
            return "ok"
        except UenvError as error:
            return error.code
        finally:
            took_s = time.monotonic() - begin_s
            assert took_s < max(patience_s, 0.0) + DEADLINE_S, f"the request took {took_s:.1f} s"

    def check(self, *, there: bool = False) -> None:
        """No wrong byte has the blob's name."""
        try:
            fd = self.store.open(self.layer.digest)
        except UenvError as error:
            assert not there, error
            return
        with os.fdopen(fd, "rb") as file:
            assert file.read() == self.data


def wait_longer(remote: Remote) -> None:
    """Have this client, with all that it remembers of the trouble, wait as long for an answer as clients do: a busy machine is no fault."""
    if isinstance(remote, MirroredRemote):
        for one in (remote._source, *(mirror.remote for mirror in remote._mirrors)):
            wait_longer(one)
    else:
        assert isinstance(remote, RegistryRemote)
        remote._http.timeout_read_s = PATIENT_S
        for adapter in remote._http.session.adapters.values():
            adapter._timeouts = (PATIENT_S, PATIENT_S)


def test_random_faults(
    public_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(transfer_module, "BACKOFF_CAP_S", 0.05)
    monkeypatch.setattr(transfer_module, "REPORT_S", 0.0)
    monkeypatch.setattr(transfer_module, "_LOOK_S", 0.002)
    monkeypatch.setattr(blobs_module, "_ABSENT_S", 0.0)
    chance = random.Random(SEED)
    injected, outcomes = Counter[str](), Counter[str]()
    with places(public_dir) as all_places, Pullers() as pullers:
        while injected.total() < FAULTS:
            monkeypatch.setattr(mirrors_module, "SKIP_S", 0.2)
            place = chance.choice(all_places)
            round_ = Round(place, chance)
            layer = round_.layer
            with FakeRegistry(auth=chance.choice(["none", "bearer"])) as fake, FakeRegistry() as mirror:
                for one in (fake, mirror):
                    one.put_blob(round_.data)
                remote = open_remote(
                    parse_registry(fake.url),
                    credential=Credential(USER, PASSWORD),
                    timeout_connect_s=1,
                    timeout_read_s=0.15,
                    mirrors=[parse_registry(mirror.url)] if chance.random() < 0.3 else [],
                )
                for one in (fake, mirror):
                    for _ in range(chance.randrange(1, 4)):
                        one.spoil("/blobs/", **fault(chance), times=chance.choice([1, 1, 2, 6, None]))
                        injected["registry"] += 1
                for _ in range(2):
                    if place.kinds != ("eio",) and chance.random() < 0.4:
                        pullers.pull_and_kill(
                            place.cache,
                            chance.random() * 0.15,
                            registry=fake.url,
                            repository=REPOSITORY,
                            digest=layer.digest,
                            size_bytes=layer.size_bytes,
                            user=USER,
                            password=PASSWORD,
                            connections=round_.tuning.connections,
                            piece_bytes=PIECE,
                        )
                        injected["kill -9"] += 1
                        round_.check()
                    kind = chance.choice(place.kinds)

                    def harm(kind: str = kind, place: Place = place) -> None:
                        place.harm(kind, chance)
                        injected[kind] += 1

                    if chance.random() < 0.5 or kind == "bits":
                        harm()
                        outcomes[round_.pull(remote, chance.choice([0.2, 2.0]))] += 1
                    else:
                        for one in (fake, mirror):
                            one.spoil("/blobs/", bytes_per_s=1 << 20, times=4)
                        outcomes[round_.pull(remote, chance.choice([0.2, 2.0]), at=harm)] += 1
                    place.heal()
                    round_.check()
                for one in (fake, mirror):
                    one.spoils.clear()
                monkeypatch.setattr(mirrors_module, "SKIP_S", 0.0)
                wait_longer(remote)
                ended = round_.pull(remote, 20.0)
                assert ended == "ok", f"the trouble is gone, and the request still fails: {ended}"
                remote.close()
                round_.check(there=True)
                for directory in round_.store.writable:
                    directory.sweep()  # a blob may have got its name at the moment at which the directory was lost
                assert list((round_.store.root / "partial").iterdir()) == []
        place.clear()
    assert PASSWORD not in caplog.text and "token-" not in caplog.text
    print(f"{injected.total()} faults: {dict(injected)}; requests while they lasted: {dict(outcomes)}")
