"""A virtual environment on top of an image works in sessions of it, and elsewhere says what it needs instead of using another Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.publishing import env_json, make_squashfs
from support.sessions import MOUNT, UENVCTL, SessionSite, session_site

pytestmark = pytest.mark.usefixtures("node")

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
INTERPRETER = Path("/usr/bin/python3").resolve()


@pytest.fixture(scope="module")
def site() -> Iterator[SessionSite]:
    """A site with an image that has an interpreter of its own and a package beside its standard library."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    with session_site() as made:
        make_squashfs(
            made.directory / "python.squashfs",
            {
                f"bin/{VERSION}": INTERPRETER.read_bytes(),
                "lib/python3/dist-packages/of_the_image.py": "WORD = 'from the image'\n",
            },
            links={"bin/python3": VERSION, f"lib/{VERSION}": f"/usr/lib/{VERSION}"},
            meta=env_json(
                "python",
                views={
                    "default": {
                        "list": {"PATH": [{"op": "prepend", "value": [f"{MOUNT}/bin"]}]},
                        "scalar": {},
                    }
                },
            ),
        )
        yield made


def inside(site: SessionSite, *command: str) -> tuple[int, str, str]:
    done = site.run(UENVCTL, "run", "--view=default", str(site.directory / "python.squashfs"), "--", *command)
    return done.returncode, done.stdout, done.stderr


def test_plain_venv_works_in_a_session(site: SessionSite) -> None:
    """What people do without knowing of `uenvctl venv`; outside it is a link that leads nowhere."""
    status, _out, err = inside(
        site, "python3", "-m", "venv", "--without-pip", "--system-site-packages", "plain"
    )
    assert status == 0, err
    show = "import of_the_image, sys; print(of_the_image.WORD, sys.prefix)"
    assert inside(site, "plain/bin/python", "-c", show) == (0, f"from the image {site.user.home}/plain\n", "")
    assert site.run("sh", "-c", "plain/bin/python -c 1").returncode == 127

    # and when it is marked
    status, _out, err = inside(site, UENVCTL, "venv", "plain")
    assert status == 0, err
    assert f"plain needs {site.directory}/python.squashfs:{MOUNT}" in err
    for python in ("python", "python3", VERSION):
        assert inside(site, f"plain/bin/{python}", "-c", show) == (
            0,
            f"from the image {site.user.home}/plain\n",
            "",
        )
    assert inside(site, UENVCTL, "venv", "plain") == (0, "", "")


def test_made_used_and_used_elsewhere(site: SessionSite) -> None:
    status, _out, err = inside(site, UENVCTL, "venv", "venv", "--", "--without-pip")
    assert status == 0, err
    site.write(
        f"venv/lib/{VERSION}/site-packages/mine.py",
        "import of_the_image, subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', 'import of_the_image; print(of_the_image.WORD)'],"
        " capture_output=True, text=True, check=True).stdout.strip())\n",
    )
    script = site.write("venv/bin/mine", f"#!{site.user.home}/venv/bin/python\nimport mine\n", mode=0o755)
    for command in (
        [str(script)],
        ["bash", "-c", ". venv/bin/activate && mine"],
    ):
        assert inside(site, *command) == (0, "from the image\n", "")
    for command in (
        ["venv/bin/python", "-c", "1"],
        [str(script)],
        ["bash", "-c", ". venv/bin/activate && python -c 1"],
    ):
        done = site.run(*command)
        assert (done.returncode, done.stdout) == (93, "")
        name, hint = done.stderr.splitlines()
        image = f"{site.directory}/python.squashfs:{MOUNT}"
        assert name.endswith(f"this virtual environment needs the uenv {image}, which is not mounted here")
        assert hint == f"hint: start it: uenvctl start --view=python:default {image}"
    # what it says is what helps
    words = hint.partition("uenvctl start ")[2].split()
    assert site.run(UENVCTL, "run", *words, "--", *command).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["no-python"], 66, "is not the image's"),
        (["full"], 66, "is there already, and no virtual environment"),
        (["host"], 66, "is not that of an image of this session"),
    ],
)
def test_what_cannot_be_done(site: SessionSite, arguments: list[str], status: int, says: str) -> None:
    site.write("full/file", "x")
    if arguments == ["host"]:
        made = site.run("/usr/bin/python3", "-m", "venv", "--without-pip", "host")
        assert made.returncode == 0, made.stderr
    done = site.inside(UENVCTL, "venv", *arguments)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "hint: " in done.stderr or arguments == ["full"]


def test_outside_a_session(site: SessionSite) -> None:
    done = site.run(UENVCTL, "venv", "new")
    assert done.returncode == 93
    assert "there is no image mounted here" in done.stderr
    assert "hint: start a session first" in done.stderr
