"""What an image's `python -m venv` does besides: the view's packages, and the mark of ``uenvctl venv``."""

from __future__ import annotations

import os
import sys
import venv
from pathlib import Path

import pytest

from uenvd.publish.build.venv_hook import PATH_FILE, on_image

LIBRARY = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be the Python of a view; nothing is mounted."""
    image = tmp_path / "image"
    monkeypatch.setattr(sys, "base_prefix", str(image / "python-3.11"))
    monkeypatch.setattr(sys, "prefix", str(image / "env/default"))
    monkeypatch.delenv("UENV_MOUNT_LIST", raising=False)
    return image / "env/default"


def make(directory: Path, *, packages: bool = True) -> Path:
    """Make a virtual environment with the hook around what makes its directories; return where its packages are."""

    def create(_builder: venv.EnvBuilder, env_dir: object) -> None:
        Path(str(env_dir), LIBRARY).mkdir(parents=True)

    on_image(create)(venv.EnvBuilder(system_site_packages=packages), str(directory))
    return directory / LIBRARY


def test_the_views_packages_are_there(view: Path, tmp_path: Path) -> None:
    assert (make(tmp_path / "own") / PATH_FILE).read_text() == (
        f"import site; site.addsitedir('{view}/{LIBRARY}')\n"
    )


def test_not_where_they_were_not_wanted(view: Path, tmp_path: Path) -> None:
    assert list(make(tmp_path / "own", packages=False).iterdir()) == []


@pytest.mark.parametrize("prefix", ["python-3.11", "../home/venv", "environment/default"])
def test_only_from_a_view(view: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Python itself, and a virtual environment of the user's own, do what they always do."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "image" / prefix))
    assert list(make(tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("body", ['echo "$1 $2" > {out}', "exit 3", "kill -9 $$"])
def test_it_is_marked_where_the_image_is_mounted(
    view: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """A fault of the mark is none of the virtual environment's."""
    out = tmp_path / "said"
    program = tmp_path / "bin" / "uenvctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body.format(out=out)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    make(tmp_path / "first")
    assert not out.exists()
    monkeypatch.setenv("UENV_MOUNT_LIST", "x:/y")
    make(tmp_path / "second")
    if "out" in body:
        assert out.read_text() == f"venv {tmp_path}/second\n"
