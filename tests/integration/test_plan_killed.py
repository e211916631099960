"""``uenvd-publish run`` killed at random points: what it published is whole, and the next run finishes without doing anything twice.

``UENVD_TEST_PLAN_KILLS`` says at how many points (30 is the full campaign), ``UENVD_TEST_PLAN_SEED`` which.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.plans import NAMES, Site, make_site, outcome, registry_of, visible_images
from support.registry import FakeRegistry
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attachments

pytestmark = pytest.mark.usefixtures("node")
KILLS = int(os.environ.get("UENVD_TEST_PLAN_KILLS", "3"))
SEED = int(os.environ.get("UENVD_TEST_PLAN_SEED", "7"))
ENDS_S = 60.0


@pytest.fixture
def site(node: None, tmp_path: Path) -> Site:
    return make_site(tmp_path, names=NAMES[:1], machines=(("alpha", "zen3"),))


def descendants(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def started(site: Site, url: str, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        site.words(url, "--deploy=v1", f"--work={work}"),
        cwd=site.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        left = descendants(process.pid)
        process.kill()
        process.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def cut_short(site: Site, url: str, work: Path, moment_s: float, *, all_at_once: bool) -> None:
    """Run and kill: only the run, whose stages then end by themselves, or all its processes at once."""
    with started(site, url, work) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment_s)
        below = descendants(process.pid)
        process.kill()
        process.wait()
        for pid in below if all_at_once else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + ENDS_S
        while any(map(alive, below)):
            assert time.monotonic() < deadline, "stages outlive their run"
            time.sleep(0.05)


def test_killed_run_resumes(site: Site, tmp_path: Path) -> None:
    choose = random.Random(SEED)
    work = tmp_path / "work"

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)

    with FakeRegistry() as first:
        fresh()
        began_s = time.monotonic()
        done = site.run(first.url, "--deploy=v1", f"--work={work}", "--json")
        length_s = time.monotonic() - began_s
        assert done.returncode == 0, done.stdout + done.stderr
        expected = visible_images(registry_of(first.url), site)
        cells = outcome(done.stdout)
    left = KILLS
    while left > 0:
        # Each plan is killed once or a few times on its way, then finished.
        with FakeRegistry() as registry:
            remote = registry_of(registry.url)
            fresh()
            before: dict[str, dict[str, str]] = {}
            for _kill in range(min(left, choose.choice((1, 2, 3)))):
                moment_s = choose.uniform(0.02, 0.95) * length_s
                cut_short(site, registry.url, work, moment_s, all_at_once=choose.random() < 0.5)
                left -= 1
                now = visible_images(remote, site)
                for repository, tags in before.items():
                    assert tags.items() <= now[repository].items()
                before = now
            done = site.run(registry.url, "--deploy=v1", f"--work={work}", "--json")
            assert done.returncode == 0, done.stdout + done.stderr
            assert visible_images(remote, site) == expected
            assert outcome(done.stdout) == cells
            for repository, tags in expected.items():
                for digest in set(tags.values()):
                    types = [one.artifact_type for one in attachments(remote, repository, digest)]
                    assert types.count(REFRAME_TYPE) == types.count(META_TYPE) == 1
        assert not list((work / "tests").iterdir()), "a test's files are left"
