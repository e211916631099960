"""Run the commands that docs/uenvctl.md shows, and put what really came out into the page: ``.venv/bin/python scripts/doc_examples.py`` as root.

A block that begins with three backticks and ``console`` is what a terminal shows: lines after a prompt (``$``, with the session before it if there is
one) are commands, all else is replaced. The blocks of the page are typed one after the other into one shell of an ordinary user, on a machine with a
registry and a uenvd of its own, all gone at the end. Names of temporary things are replaced by those of a story, nothing else is. ``--check`` writes
nothing and fails if the page says anything else than the programs do (digests and times apart).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests"))

from support.daemon import Daemon, running_daemon  # noqa: E402
from support.publishing import Publisher, env_json, make_squashfs  # noqa: E402
from support.terminal import Terminal, terminal  # noqa: E402
from support.users import TestUser, ordinary_user  # noqa: E402
from uenvd.oci.attach import META_TYPE, attach, directory_content  # noqa: E402
from uenvd.oci.index import Entry, update_index  # noqa: E402
from uenvd.oci.reference import repository_of  # noqa: E402

PAGES = (CHECKOUT / "docs" / "uenvctl.md",)
PROGRAMS = Path(sys.prefix).resolve() / "bin"
MOUNT = "/user-environment"
SYSTEM, UARCH = "santis", "gh200"
FENCE = "```console\n"
PROMPT = "$ "
TYPED = re.compile(r"^(?:\[[^]]+\] )?\$ (.*)$")
READY = r"^(?:\[[^]]+\] )?\$ \Z"
COMMAND_S = 60.0
RC = f"PS1='{PROMPT}'\nbind 'set enable-bracketed-paste off'\nunset PROMPT_COMMAND HISTFILE\n"
JOB = 31415

RELEASES = {
    "24.7": ("2026-11-03", 11, ("gcc@12.3", "hdf5@1.12 +mpi", "openblas@0.3.28")),
    "24.11": ("2026-11-19", 12, ("gcc@13.3", "hdf5@1.14 +mpi", "openblas@0.3.28", "py-mpi4py@4.0")),
}
"""Version of the image -> date, size (MiB), what its recipe asks for."""


@dataclass(frozen=True)
class Site:
    """Where the story happens."""

    directory: Path
    user: TestUser
    daemon: Daemon

    def replaced(self, text: str) -> str:
        """Return a text with the names of the story."""
        for old, new in (
            (str(self.user.home), "/home/ada"),
            (self.user.name, "ada"),
            (str(self.daemon.socket_path), "/run/uenvd/control"),
            (str(self.daemon.cache), "/var/cache/uenvd"),
            (str(self.directory / "registry"), "/srv/registry"),
            (os.uname().nodename, "node1"),
        ):
            text = text.replace(old, new)
        return text


def publish(directory: Path, registry: str, home: Path) -> None:
    """Put two releases of prgenv-gnu into a registry, tested, with their recipes; the file of the newer one into the user's home."""
    publisher = Publisher(registry, system=SYSTEM, uarch=UARCH)
    views = {
        "default": {"list": {"PATH": [{"op": "prepend", "value": [f"{MOUNT}/bin"]}]}, "scalar": {}},
        "modules": {
            "list": {"MODULEPATH": [{"op": "prepend", "value": [f"{MOUNT}/modules"]}]},
            "scalar": {},
        },
    }
    for version, (date, megabytes, specs) in RELEASES.items():
        gcc = specs[0].partition("@")[2]
        meta = env_json("prgenv-gnu", views=views).replace(
            b"prgenv-gnu for tests", b"GNU compilers, MPI, Python"
        )
        meta = meta.replace(b"the view default", b"everything in PATH").replace(
            b"the view modules", b"modules of the packages"
        )
        image = make_squashfs(
            directory / f"{version}.squashfs",
            {
                "bin/mpicc": f"#!/bin/sh\necho 'gcc (GCC) {gcc}'\n",
                "lib/ballast": random.Random(version).randbytes(megabytes << 20),
            },
            meta=meta,
            options=("-mkfs-time", "1700000000", "-noD"),
        )
        digest = publisher.push(
            image, f"prgenv-gnu/{version}", "v1", "latest", created=f"{date}T08:00:00Z", architecture="x86_64"
        )
        repository = repository_of("deploy", SYSTEM, UARCH, "prgenv-gnu", version)
        recipe = directory / version / "meta" / "recipe"
        recipe.mkdir(parents=True)
        lines = "".join(f"  - {spec}\n" for spec in specs)
        (recipe / "environments.yaml").write_text(f"gcc-env:\n  specs:\n{lines}")
        created = f"{date}T09:00:00Z"
        attach(
            publisher.remote,
            repository,
            digest,
            META_TYPE,
            [directory_content(recipe.parent, "meta")],
            created=created,
        )
        entry = Entry(
            repository,
            digest,
            ("latest", "v1"),
            publisher.remote.manifest(repository, digest).layers[0].digest,
            image.stat().st_size,
            date=f"{date}T08:00:00Z",
            mount=MOUNT,
            views=(("default", "everything in PATH"), ("modules", "modules of the packages")),
            verdict="passed",
            remark="48 of 48 tests passed",
        )
        update_index(
            publisher.remote,
            "deploy",
            SYSTEM,
            lambda index, place=repository, one=entry: index.with_repository(place, [one]),
        )
    (home / "my.squashfs").write_bytes(image.read_bytes())


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Start everything."""
    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="uenvd-docs-", dir="/var/tmp"))
        )
        directory.chmod(0o755)
        user = stack.enter_context(ordinary_user(directory))
        registry = f"oci-layout:{directory / 'registry'}"
        publish(directory, registry, user.home)
        daemon = stack.enter_context(
            running_daemon(
                directory / "uenvd",
                registry,
                system=SYSTEM,
            )
        )
        for step, version in ((0, "24.7"), (1, "24.11")):
            with daemon.client() as client:
                job = {"id": JOB, "step": step}
                lease = client.ask("mount", uenv=f"prgenv-gnu/{version}:v1", uid=user.uid, job=job)["lease"]
                client.ask("wait", lease=lease)
        daemon.ask("evict", uenv="prgenv-gnu/24.11:v1")
        yield Site(directory, user, daemon)


@contextlib.contextmanager
def shell(place: Site) -> Iterator[Terminal]:
    """Start the user's shell."""
    (place.user.home / ".bashrc").write_text(RC)
    environ = {
        **place.user.environ(),
        "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin",
        "UENVD_SOCKET": str(place.daemon.socket_path),
        "TERM": "dumb",
    }
    user = place.user
    become = ["setpriv", "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups"]
    with terminal([*become, "bash", "-i"], environ, user.home, columns=150) as running:
        running.expect(READY, COMMAND_S)
        yield running


def replay(block: str, running: Terminal, place: Site) -> str:
    """Type the commands of a block; return what the terminal shows."""
    begin = len(running.text)
    prompt = running.text.rpartition("\n")[2]
    for line in block.splitlines():
        typed = TYPED.match(line)
        if typed:
            running.type(typed[1])
            running.expect(READY, COMMAND_S)
    shown = prompt + running.text[begin:]
    return place.replaced(shown.rpartition("\n")[0] + "\n")


def remade(page: str, running: Terminal, place: Site) -> str:
    """Return a page with its blocks as they are now."""
    first, *blocks = page.split(FENCE)
    done = first
    for piece in blocks:
        block, end, rest = piece.partition("```\n")
        done += FENCE + replay(block, running, place) + end + rest
    return done


def comparable(page: str) -> str:
    """Return a page without what differs from one run, or machine, to another: digests, today's times, what the machine has free, how fast it is."""
    page = re.sub(r"\b[0-9a-f]{16,64}\b", lambda found: "d" * len(found[0]), page)
    page = re.sub(r"(?m)^(cache|activity):.*$", r"\1:", page)
    return re.sub(r"(\"locked\": \"|^\d +)\d{4}-\d\d-\d\dT[\d:]{8}Z", r"\1now", page, flags=re.MULTILINE)


def main() -> int:
    """Remake or check the pages; return the exit status."""
    status = 0
    with site() as place:
        for path in PAGES:
            page = path.read_text()
            with shell(place) as running:
                fresh = remade(page, running, place)
            if "--check" not in sys.argv:
                path.write_text(fresh)
            elif comparable(fresh) != comparable(page):
                sys.stderr.writelines(
                    difflib.unified_diff(
                        comparable(page).splitlines(keepends=True),
                        comparable(fresh).splitlines(keepends=True),
                        path.name,
                        "now",
                    )
                )
                print(f"{path} is not what the programs say: run scripts/doc_examples.py", file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
