"""A site's configuration and recipes for tests of the pipeline: two environments that are quick to build, on three kinds of nodes.

They are one program in C, built from source in a second; the full campaigns build Python environments, as large as real ones are at least.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.building import make_cache, make_recipe, make_wheel
from support.reframetests import HEAD
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attachments
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote

PROGRAM = (sys.executable, "-P", "-m", "uenvd.publish.main")
MOUNT = "/user-environment"
NAMES = ("tiny", "small")
MACHINES = (("alpha", "zen3"), ("alpha", "zen2"), ("beta", "zen3"))
DEADLINE_S = 240.0

TEST = (
    HEAD
    + """
@rfm.simple_test
class Runs(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+tiny']
    executable = 'tiny'

    @sanity_function
    def said(self):
        return sn.assert_found(r'^tiny says 42$', self.stdout)
"""
)


PROGRAM_TEXT = '#include <stdio.h>\nint main(void) { puts("tiny says 42"); return 0; }\n'
SCRIPT = """#!/bin/sh
set -eu
cc -O1 -o "$UENV_ROOT/bin/tiny" tiny.c
"""
CONFIG = f"""name: tiny
description: for tests
store: {MOUNT}
builder: source
source: {{toolchain: host}}
"""
ENVIRONMENTS = """tiny:
  packages:
  - {name: tiny, version: 1.0, source: tiny.tar, build: script, script: make-tiny}
  views:
    default: {description: run it}
"""


def source_recipe(directory: Path) -> Path:
    """Write the recipe tiny/1.0 of a program in C; return its directory."""
    recipe = directory / "recipes/tiny/1.0"
    recipe.mkdir(parents=True)
    archive = directory / "tiny.tar"
    with tarfile.open(archive, "w") as tar:
        for name, text in (("tiny.c", PROGRAM_TEXT),):
            member = tarfile.TarInfo(f"tiny-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (recipe / "sources.lock").write_text(f"tiny.tar sha256:{digest} file://{archive}\n")
    (recipe / "config.yaml").write_text(CONFIG)
    (recipe / "environments.yaml").write_text(ENVIRONMENTS)
    (recipe / "make-tiny").write_text(SCRIPT)
    (directory / "cache").mkdir()
    return recipe


def python_recipe(directory: Path) -> Path:
    """Write the recipe tiny/1.0 of a Python environment; return its directory."""
    wheel = make_wheel(directory)
    recipe = make_recipe(directory / "recipes", wheel, mount=MOUNT)
    make_cache(directory / "cache", wheel)
    return recipe


@dataclass
class Site:
    """``directory`` has config.yaml, recipes/ and cache/."""

    directory: Path
    names: Sequence[str] = NAMES
    machines: Sequence[tuple[str, str]] = MACHINES

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def cells(self) -> list[str]:
        """Return the ids of all cells, in their order."""
        return [f"{name}/1.0-{system}/{uarch}" for name in self.names for system, uarch in self.machines]

    def words(self, registry: str, *words: str, config: bool = True) -> list[str]:
        """Return the command that runs the plan; without ``config``, that runs what the words say."""
        return [
            *PROGRAM,
            "run",
            *([f"--config={self.config}"] if config else []),
            f"--registry={registry}",
            f"--cache={self.directory / 'cache'}",
            "--through=file",
            *words,
        ]

    def run(
        self, registry: str, *words: str, env: Mapping[str, str] | None = None, config: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the plan to its end, in the site's directory."""
        return subprocess.run(
            self.words(registry, *words, config=config),
            cwd=self.directory,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def change_test(self, name: str, text: str) -> None:
        """Replace the test of one environment: its images are built anew."""
        (self.directory / "recipes" / name / "1.0/extra/reframe/runs.py").write_text(text)


def make_site(
    directory: Path,
    *,
    names: Sequence[str] = NAMES,
    machines: Sequence[tuple[str, str]] = MACHINES,
    python: bool = False,
) -> Site:
    """Write a site; ``python``: of Python environments."""
    first = python_recipe(directory) if python else source_recipe(directory)
    (first / "extra/reframe").mkdir(parents=True)
    (first / "extra/reframe.yaml").write_text("tiny: {features: [tiny], views: [default]}\n")
    (first / "extra/reframe/runs.py").write_text(TEST)
    for name in names:
        if name != "tiny":
            shutil.copytree(first.parent, directory / "recipes" / name)
            config = directory / "recipes" / name / "1.0/config.yaml"
            config.write_text(config.read_text().replace("name: tiny", f"name: {name}"))
    site = Site(directory, names, machines)
    systems = dict.fromkeys(system for system, _uarch in machines)
    uarchs = list(dict.fromkeys(uarch for _system, uarch in machines))
    body = {
        "clusters": {
            system: {
                "targets": [{"uarch": uarch} for one, uarch in machines if one == system],
                "runner": {"slurm-tag": f"{system}-slurm"},
            }
            for system in systems
        },
        "uenvs": {
            name: {
                "1.0": {
                    "recipes": dict.fromkeys(uarchs, "1.0"),
                    "deploy": {
                        system: [uarch for one, uarch in machines if one == system] for system in systems
                    },
                    "mount": MOUNT,
                }
            }
            for name in names
        },
    }
    site.config.write_text(json.dumps(body, indent=1))
    return site


def events(stdout: str) -> list[dict[str, Any]]:
    """Return what ``run --json`` told."""
    return [json.loads(line) for line in stdout.splitlines()]


def outcome(stdout: str) -> dict[str, Any]:
    """Return the last event, its cells by id."""
    last = events(stdout)[-1]
    assert last["event"] == "end", stdout
    return {cell["cell"]: cell for cell in last["cells"]}


def registry_of(url: str) -> Remote:
    return open_remote(parse_registry(url))


def visible_images(remote: Remote, site: Site) -> dict[str, dict[str, str]]:
    """Return repository -> tag -> digest of all that users and pipelines can see; each must be whole."""
    found: dict[str, dict[str, str]] = {}
    for namespace in ("build", "deploy"):
        for name in site.names:
            for system, uarch in site.machines:
                repository = f"{namespace}/{system}/{uarch}/{name}/1.0"
                for tag in remote.tags(repository):
                    manifest = remote.manifest(repository, tag)
                    for blob in manifest.layers:
                        assert (
                            sum(map(len, remote.stream_blob(repository, blob, 0, lambda: False)))
                            == squashfs_layer(manifest).size_bytes
                        )
                    types = [one.artifact_type for one in attachments(remote, repository, manifest.digest)]
                    assert META_TYPE in types, (repository, tag)
                    if namespace == "deploy":
                        assert REFRAME_TYPE in types, (repository, tag)
                    assert len(types) == len(set(types)), types
                    found.setdefault(repository, {})[tag] = manifest.digest
    return found
