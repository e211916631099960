"""A mount point that the user named himself counts only with the user's own rights: root must not open doors for him."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.slurmsite import DIGEST_1, Site, uenv_lines


@pytest.fixture
def owned(site: Site) -> Site:
    """All images carry the guard that the daemon gives to mount points outside of the site's list."""
    image = site.login.state.images[DIGEST_1]
    site.update(images={DIGEST_1: {**image, "guard": "owned"}})
    return site


def _attempt(site: Site, place: Path) -> tuple[int, str, str]:
    done = site.srun(f"--uenv=app/1:{place}", "cat", f"{place}/hello")
    return done.returncode, done.stdout, uenv_lines(done.stderr)


def _directory(path: Path, uid: int, gid: int, mode: int = 0o755) -> Path:
    path.mkdir(parents=True)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def test_own_directory(owned: Site) -> None:
    place = _directory(owned.user.home / "env", owned.user.uid, owned.user.gid, 0o700)
    assert _attempt(owned, place) == (0, "hello from app-1\n", "")


def test_own_directory_reached_through_a_group(owned: Site) -> None:
    gate = _directory(owned.cluster.dir / "project", 0, owned.user.groups[0], 0o750)
    place = _directory(gate / "env", owned.user.uid, owned.user.gid)
    assert _attempt(owned, place) == (0, "hello from app-1\n", "")


def test_own_directory_below_a_closed_one(owned: Site) -> None:
    closed = _directory(owned.cluster.dir / "closed", 0, 0, 0o700)
    place = _directory(closed / "env", owned.user.uid, owned.user.gid)
    status, _, said = _attempt(owned, place)
    assert status == 1
    assert said.startswith(f"uenv: node1: cannot use the mount point {place} of app/1: Permission denied\n")


def test_directory_of_somebody_else(owned: Site) -> None:
    for place in (Path("/etc"), owned.other.home):
        status, said, errors = _attempt(owned, place)
        assert (status, said) == (1, "")
        assert errors.startswith(f"uenv: node1: the mount point {place} of app/1 does not belong to you\n")


def test_symbolic_link(owned: Site) -> None:
    target = _directory(owned.user.home / "target", owned.user.uid, owned.user.gid)
    link = owned.user.home / "link"
    link.symlink_to(target)
    os.chown(link, owned.user.uid, owned.user.gid, follow_symlinks=False)
    status, _, said = _attempt(owned, link)
    assert status == 1
    assert said.startswith(f"uenv: node1: a symbolic link leads to the mount point {link} of app/1\n")


def test_root_keeps_its_rights_afterwards(owned: Site) -> None:
    place = _directory(owned.user.home / "env2", owned.user.uid, owned.user.gid)
    done = owned.srun(f"--uenv=app/1:{place}", "id")
    assert done.returncode == 0
    assert f"uid={owned.user.uid}" in done.stdout
    assert str(owned.user.groups[0]) in done.stdout
