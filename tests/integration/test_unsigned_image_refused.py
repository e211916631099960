"""Where the site demands signatures, uenvd hands out nothing else: asked, mounted or pulled, online or not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import uenvd.daemon.signed
from support.daemon import Client, Daemon, running_daemon
from support.fusetools import until
from support.publishing import Publisher, simple_image
from support.registry import RealRegistry, docker_registry
from uenvd.oci.attach import Content, attach
from uenvd.oci.signatures import ENVELOPE_TYPE, SIGNATURE_TYPE, envelope, make_keys, read_private_key, sign

pytestmark = pytest.mark.usefixtures("node")

DEADLINE_S = 30.0


@dataclass
class Site:
    directory: Path
    registry: RealRegistry
    keys: Path
    digests: dict[str, str]

    def publisher(self, namespace: str = "deploy") -> Publisher:
        return Publisher(self.registry.url, namespace=namespace)

    def daemon(self, name: str, tags: str = "no", **how: Any) -> Any:
        extra = f"namespaces: [deploy, build]\nresolve: {{ttl: 0s}}\nsignatures: {{required: [deploy], keys: {self.keys}, tags: {tags}}}\n"
        return running_daemon(self.directory / name, self.registry.url, extra=extra, **how)


@pytest.fixture
def site(node: None) -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        keys = directory / "keys"
        keys.mkdir()
        make_keys(directory / "release", keys / "release.pub")
        make_keys(directory / "mallory", directory / "mallory.pub")
        with docker_registry(directory / "registry") as registry:
            site = Site(directory, registry, keys, {})
            for word in ("good", "bare", "foreign", "moved", "forged"):
                image = simple_image(directory / f"{word}.squashfs", word, word)
                site.digests[word] = site.publisher().push(image, f"{word}/1", "v1")
            remote = site.publisher().remote
            release, mallory = (
                read_private_key(directory / "release"),
                read_private_key(directory / "mallory"),
            )
            sign(remote, "deploy/demo/zen3/good/1", site.digests["good"], release)
            sign(remote, "deploy/demo/zen3/foreign/1", site.digests["foreign"], mallory)
            # Good images under other names, and one with a signature that was tampered with.
            image = directory / "good.squashfs"
            site.digests["moved"] = site.publisher().push(image, "moved/1", "v1")
            other = Content(
                "s.json", envelope(release, "demo/zen3/good/1", site.digests["good"]), ENVELOPE_TYPE
            )
            attach(remote, "deploy/demo/zen3/moved/1", site.digests["moved"], SIGNATURE_TYPE, [other])
            raw = bytearray(envelope(release, "demo/zen3/forged/1", site.digests["forged"]))
            place = raw.index(b'"sig":"') + 10
            raw[place] = ord("A") if raw[place] != ord("A") else ord("B")
            attach(
                remote,
                "deploy/demo/zen3/forged/1",
                site.digests["forged"],
                SIGNATURE_TYPE,
                [Content("s.json", bytes(raw), ENVELOPE_TYPE)],
            )
            site.publisher("build").push(directory / "bare.squashfs", "bare/1", "7")
            yield site
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def ask(daemon: Daemon, op: str, uenv: str, **fields: Any) -> dict[str, Any]:
    with Client(daemon.socket_path) as client:
        answer = client.ask(op, uenv=uenv, **fields)
        if answer["ok"] and "lease" in answer:
            answer = client.ask("wait", lease=answer["lease"])
        return answer


def refused(answer: dict[str, Any]) -> str:
    assert not answer["ok"], answer
    assert answer["error"]["code"] == "signature"
    return str(answer["error"]["message"])


def test_only_signed_images_are_handed_out(site: Site) -> None:
    with site.daemon("uenvd") as daemon:
        assert ask(daemon, "mount", "good/1:v1")["ok"]
        for word, reason in (
            ("bare", "is not signed"),
            ("foreign", "an unknown key"),
            ("moved", "is for demo/zen3/good/1, not demo/zen3/moved/1"),
            ("forged", "is forged or damaged"),
        ):
            for op in ("resolve", "mount", "pull"):
                for label in (f"{word}/1:v1", f"{word}/1@{site.digests[word]}"):
                    said = refused(ask(daemon, op, label))
                    assert reason in said
                    assert f"'deploy::{word}/1" in said
        assert not ask(daemon, "resolve", site.digests["bare"])["ok"], "the cache learnt nothing of it"
        # Another namespace asks for none; a signature that comes later counts at once.
        assert ask(daemon, "resolve", "build::bare/1:7")["ok"]
        sign(
            site.publisher().remote,
            "deploy/demo/zen3/bare/1",
            site.digests["bare"],
            read_private_key(site.directory / "release"),
        )
        assert ask(daemon, "mount", "bare/1:v1")["ok"]
        assert "is refused" in daemon.log


def test_an_old_release_is_not_passed_off_as_a_newer_one(site: Site) -> None:
    """Whoever may write tags puts what was signed under the name of another version, or of another release of the same."""
    remote, release = site.publisher().remote, read_private_key(site.directory / "release")
    repository = "deploy/demo/zen3/good/1"
    digest = site.publisher().push(site.directory / "foreign.squashfs", "good/1", "v7", "latest")
    sign(remote, repository, digest, release, ["v7"])
    site.publisher().push(site.directory / "foreign.squashfs", "good/1", "v8")
    newer = site.publisher().push(site.directory / "foreign.squashfs", "good/2", "v7")
    assert newer == digest
    with site.daemon("uenvd") as daemon:
        for label in ("good/1:v7", "good/1", "good/1:latest", f"good/1@{digest}", f"good/1:v8@{digest}"):
            assert ask(daemon, "mount", label)["ok"], label
        for op in ("resolve", "mount", "pull"):
            assert "is for the tag v7, not v8" in refused(ask(daemon, op, "good/1:v8"))
        # Signed for one version, and taken over with its signature to another.
        other = Content("s.json", envelope(release, "demo/zen3/good/1", digest, ["v7"]), ENVELOPE_TYPE)
        attach(remote, "deploy/demo/zen3/good/2", digest, SIGNATURE_TYPE, [other])
        said = refused(ask(daemon, "resolve", "good/2:v7"))
        assert "is for demo/zen3/good/1, not demo/zen3/good/2" in said
        assert ask(daemon, "mount", "good/1:v1")["ok"], "signed without tags: as before"
        sign(remote, repository, digest, release, ["v8"])
        assert ask(daemon, "mount", "good/1:v8")["ok"]
    with site.daemon("strict", tags="yes") as daemon:
        assert ask(daemon, "mount", "good/1:v7")["ok"] and ask(daemon, "mount", "good/1:v8")["ok"]
        assert "does not say that it is for the tag v1" in refused(ask(daemon, "resolve", "good/1:v1"))
        assert ask(daemon, "mount", f"good/1@{site.digests['good']}")["ok"]


def test_without_the_registry_and_with_other_keys(site: Site) -> None:
    with site.daemon("uenvd") as daemon:
        assert ask(daemon, "pull", "good/1:v1")["ok"]
        refused(ask(daemon, "resolve", "bare/1:v1"))
    site.registry.process.kill()
    site.registry.process.wait()
    with site.daemon("uenvd") as daemon:
        # What is remembered is the signature, checked anew after the restart.
        answer = ask(daemon, "mount", "good/1:v1")
        assert answer["ok"], answer
        assert not ask(daemon, "resolve", "bare/1:v1")["ok"]
        # The key is taken away: nothing that was believed yesterday is believed now.
        (site.keys / "release.pub").unlink()

        def gone() -> bool:
            return not ask(daemon, "resolve", "good/1:v1")["ok"]

        until(gone, "the key to count no more", uenvd.daemon.signed.KEYS_S + DEADLINE_S)
    site.keys.chmod(0o777)
    with site.daemon("uenvd") as daemon:
        answer = ask(daemon, "resolve", "good/1:v1")
        assert answer["error"]["code"] == "config"
        assert "only its owner may change" in answer["error"]["message"]
