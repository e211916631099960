"""An image that works for its builder only: audit --run uses it as another user, where nothing of this machine is but a shell and glibc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.sources import make_source_recipe, make_tarball
from uenvd.errors import AuditFailed
from uenvd.publish.build import Site, build
from uenvd.publish.recipe import load_recipe

PROGRAM = Path(sys.executable).parent / "uenvd-publish"
MOUNT = "/nowhere-on-this-machine/deeper"
_LOADS = """#include <dlfcn.h>
int main(void) { return dlopen("libz.so.1", RTLD_NOW) == 0; }
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound for the audit, but two of its commands need what only this machine has; its mount point is not on this machine."""
    place = tmp_path_factory.mktemp("elsewhere")
    secret = place / "secret"
    secret.write_text("here\n")
    secret.chmod(0o644)
    make_tarball(place / "tiny.tar.gz", {"loads.c": _LOADS})
    recipe = make_source_recipe(
        place, place / "tiny.tar.gz", mount=MOUNT, package="build: script\n      script: build"
    )
    (recipe / "build").write_text(f'#!/bin/sh\ngcc loads.c -o "$UENV_ROOT/bin/loads"\ntest -e {secret}\n')
    commands = [
        "loads",
        f"cat {secret}",
        "test $(id -u) = 65534 -a ! -e /home -a ! -e /usr/lib/python3",
        "command -v sh",
    ]
    (recipe / "extra").mkdir()
    (recipe / "extra/smoke.yaml").write_text(f"commands:\n  default: {json.dumps(commands)}\n")
    return build(
        load_recipe(recipe), place / "out", cache=place / "cache", site=Site(memory_bytes=1 << 29)
    ).image


def audit(image: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [PROGRAM, "audit", image, "--json", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=dict(os.environ),
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_what_only_the_builder_has_is_missed(image: Path) -> None:
    assert audit(image) == (0, [])
    status, findings = audit(image, "--run")
    assert status == AuditFailed.exit_status
    assert {(finding["path"], finding["kind"]) for finding in findings} == {("view default", "run")}
    details = [finding["detail"] for finding in findings]
    assert len(details) == 2
    assert details[0].startswith("loads: status 1")
    assert "secret: status 1" in details[1]
    assert "No such file" in details[1]
